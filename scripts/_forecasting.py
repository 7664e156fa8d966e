"""Forecasting as a `Task` of the training loop: batches, losses, errors on the scaled series, pictures of forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from ._anchors import Forecast, anchor_forecasts, score
from ._data import EpochSampler
from ._runs import leave_signals_to_parent, write_atomically
from ._series_data import Scaler, Series, Splits, Windows
from ._tables import Column, text_table
from ._training import Loaders

LOSSES = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}
# optional inputs of a model and what they are called in a batch
_INPUTS = {"past_time_features": "past_time", "future_time_features": "future_time"}


@dataclass(frozen=True)
class ForecastData:
    """A series cut and scaled for one look-back and horizon.

    Attributes:
        values: (T, C), scaled by ``scaler``, which was fitted on the training rows.
        marks: (T, F) or None.
    """

    series: Series
    splits: Splits
    scaler: Scaler
    values: np.ndarray
    marks: np.ndarray | None
    context: int
    horizon: int

    def windows(self, rows: tuple[int, int], *, lookback: bool = True) -> Windows:
        """Windows whose forecasts lie in ``rows``."""
        marks = None if self.marks is None else torch.from_numpy(self.marks)
        values = torch.from_numpy(self.values.astype(np.float32))
        return Windows(values, marks, rows, self.context, self.horizon, lookback=lookback)


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def make_loaders(data: ForecastData, *, batch_size: int, workers: int, seed: int, processes: int) -> Loaders:
    """Batches of windows; every window of the validation and test stretches is in one.

    Args:
        batch_size: of one process. processes: that share the data.
    """
    options = {
        "collate_fn": _as_it_is,  # windows come in batches
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": leave_signals_to_parent,
    }
    train = data.windows(data.splits.train, lookback=False)
    # measuring needs no gradients: larger batches, the same result
    val, test = (
        DataLoader(data.windows(rows), 2 * batch_size, **options) for rows in (data.splits.val, data.splits.test)
    )
    sampler = EpochSampler(len(train), seed)
    # a last batch of a few windows would count as much as a whole one
    batches = BatchSampler(sampler, batch_size, drop_last=len(train) >= batch_size * processes)
    return Loaders(DataLoader(train, batch_sampler=batches, **options), val, test, sampler, batch_size, "val")


class Forecasting:
    """Errors of forecasts on the scaled series.

    Args:
        inputs: names of the optional inputs that the model takes (its ``forward_inputs``).
        loss: name in `LOSSES`.
    """

    metric = "mse"
    higher_is_better = False
    items = "windows"

    def __init__(self, inputs: Sequence[str], *, loss: str = "mse"):
        self.inputs = {name: key for name, key in _INPUTS.items() if name in inputs}
        self._loss = LOSSES[loss]

    def forecast(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, H, C); inputs that the data does not have are left to the model."""
        return model(batch["past"], **{name: batch[key] for name, key in self.inputs.items() if key in batch})

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and mean squared error over all steps and channels."""
        forecast = self.forecast(model, batch).float()
        return self._loss(forecast, batch["future"]), {"mse": F.mse_loss(forecast.detach(), batch["future"])}

    def measure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean squared and absolute error of every window and channel (B, C)."""
        error = self.forecast(model, batch).float() - batch["future"]  # (B, H, C)
        return {"mse": error.square().mean(1), "mae": error.abs().mean(1)}

    def summarize(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Errors pooled over all windows, steps and channels."""
        return {name: value.double().mean().item() for name, value in measured.items()}

    def describe(self, values: Mapping[str, float]) -> str:
        return ", ".join(f"{name.upper()} {values[name]:.4f}" for name in ("mse", "mae") if name in values)


def anchors_of(data: ForecastData) -> dict[str, Forecast]:
    """The anchors for the data, see `anchor_forecasts`."""
    return anchor_forecasts(data.values, data.splits.train, data.context, data.horizon, data.series.season)


def scores_of(data: ForecastData, anchors: Mapping[str, Forecast]) -> dict[str, dict[str, float]]:
    """Errors of the anchors on every window of the test stretch."""
    sizes = (data.values, data.splits.test, data.context, data.horizon)
    return {title: score(forecast, *sizes) for title, forecast in anchors.items()}


def result_table(result: Mapping[str, float], name: str, scores: Mapping[str, Mapping[str, float]]) -> str:
    """The result beside the anchors, the first of which is the linear map."""
    linear = next(iter(scores.values()))["mse"]
    rows = [{"name": name, **result}, *({"name": title, **values} for title, values in scores.items())]
    for row in rows:
        row["against"] = (row["mse"] / linear - 1) * 100 if linear else None
    columns = [
        Column("name", "forecast", left=True),
        Column("mse", "MSE", "{:.4f}".format),
        Column("mae", "MAE", "{:.4f}".format),
        Column("against", "MSE against linear", "{:+.1f} %".format),
    ]
    return text_table(columns, rows)


def verdict(result: Mapping[str, float], scores: Mapping[str, Mapping[str, float]]) -> str:
    """One sentence: whether the network forecasts better than the linear map."""
    title, linear = next(iter(scores.items()))
    if result["mse"] < linear["mse"]:
        return f"better than the linear map by {(1 - result['mse'] / linear['mse']) * 100:.1f} % in MSE"
    return f"not better than one matrix fitted in closed form ({title}): nothing was learnt beyond it"


def channel_table(measured: Mapping[str, Tensor], columns: Sequence[str]) -> str:
    """Errors of every channel."""
    rows = [
        {"name": name, **{key: value[:, i].double().mean().item() for key, value in measured.items()}}
        for i, name in enumerate(columns)
    ]
    shown = [Column("name", "channel", left=True), *(Column(k, k.upper(), "{:.4f}".format) for k in ("mse", "mae"))]
    return text_table(shown, rows)


def draw_forecasts(
    task: Forecasting, model: nn.Module, data: ForecastData, anchors: Mapping[str, Forecast], path: Path
) -> None:
    """Forecasts of three test windows, spread evenly, for up to four channels, in units of the file."""
    from matplotlib.figure import Figure

    windows = data.windows(data.splits.test)
    picked = sorted({0, (len(windows) - 1) // 2, len(windows) - 1})
    batch = windows.__getitems__(picked)
    device = next(model.parameters()).device
    with torch.no_grad():
        forecast = task.forecast(model, {name: part.to(device) for name, part in batch.items()}).float().cpu().numpy()
    past, future = batch["past"].numpy(), batch["future"].numpy()
    channels = np.unique(np.linspace(0, len(data.series.columns) - 1, min(4, len(data.series.columns))).astype(int))
    linear = next(iter(anchors.values()))
    shown = min(data.context, 2 * data.horizon)
    figure = Figure(figsize=(4.2 * len(picked), 2.1 * len(channels) + 0.4), layout="constrained")
    axes = figure.subplots(len(channels), len(picked), squeeze=False)
    ahead = np.arange(data.horizon)
    for row, channel in zip(axes, channels, strict=True):
        mean, std = data.scaler.mean[channel], data.scaler.std[channel]
        for column, axis in enumerate(row):
            context = past[column, :, channel]
            truth = np.concatenate([context[-shown:], future[column, :, channel]]) * std + mean
            axis.plot(np.arange(-shown, data.horizon), truth, color="0.5", lw=1, label="data")
            axis.plot(ahead, linear(context[None].astype(float))[0] * std + mean, color="C1", lw=1, label="linear")
            axis.plot(ahead, forecast[column, :, channel] * std + mean, color="C0", lw=1.4, label="model")
            axis.axvline(-0.5, color="0.8", lw=0.8)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(data.series.columns[channel])
    for column, index in enumerate(picked):
        start = data.splits.test[0] + index
        when = f", {data.series.dates[start]}" if data.series.dates else ""
        axes[0][column].set_title(f"forecast from row {start}{when}", fontsize=9)
        axes[-1][column].set_xlabel("steps ahead")
    axes[0][0].legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
