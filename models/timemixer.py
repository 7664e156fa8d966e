"""TimeMixer: a series at several scales, decomposed and mixed over time, and one predictor for every scale.

Paper: arXiv:2405.14616. Checked against kwuking/TimeMixer at 8d230b7.

    x: (B, L, C) -> scales x_i: (B, L_i, C), means over windows -> instance norm of each
      -> rows: one for every channel (B C, L_i, 1), or, with channels mixed, one for all (B, L_i, C)
      -> embedding: circular convolution of 3 steps, plus a linear map of the time marks -> (rows, L_i, D)
      -> blocks of past-decomposable mixing -> sum of the scales' predictors -> (B, T, C) -> norm undone

With channels mixed the trend part of every scale goes round all this through two matrices over time. Imputation and
anomaly detection read the finest scale alone; classification flattens it. `mixers.decomposable_mixing` has the mixing.

The authors pair the time marks of a sample with rows of other samples (rows are channel-fastest, marks sample-fastest);
``legacy=True`` does it too, for weights trained that way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..mixers._decomposition import check_decomposition, trend
from ..mixers._layers import Dropout
from ..mixers._registry import specs_per_block
from ..mixers._tables import widen
from ..mixers.decomposable_mixing import (
    FutureMultipredictorMixing,
    PastDecomposableMixing,
    TimeLinear,
    pooled_scales,
    scale_lengths,
)
from ._registry import register_models
from ._series import InstanceNorm, SeriesModel
from .block import MetaFormerBlock

TASKS = ("forecast", "imputation", "anomaly", "classification")
# time features of each frequency as the forecasting libraries make them
FREQUENCIES = {"h": 4, "t": 5, "s": 6, "m": 1, "a": 1, "w": 2, "d": 3, "b": 3}
# calendar fields of integer marks in the order of their columns, with the number of values
_FIELDS = (("month", 13), ("day", 32), ("weekday", 7), ("hour", 24), ("minute", 4))


class CalendarEmbedding(nn.Module):
    """Sum of one embedding for each field of integer time marks ``(..., F)``: month, day, weekday, hour, minute.

    Args:
        dim: width D. minutes: there is a fifth column. fixed: tables of sines and cosines that are not trained.
    """

    def __init__(self, dim: int, *, minutes: bool, fixed: bool, device=None, dtype=None):
        super().__init__()
        fields = _FIELDS if minutes else _FIELDS[:-1]
        self.tables = nn.ModuleDict({n: nn.Embedding(size, dim, device=device, dtype=dtype) for n, size in fields})
        if fixed:
            for table in self.tables.values():
                table.weight.requires_grad_(False).copy_(sinusoids(*table.weight.shape))

    def forward(self, marks: Tensor) -> Tensor:
        columns = marks.long().unbind(-1)
        return sum(table(column) for table, column in zip(self.tables.values(), columns, strict=False))


def sinusoids(count: int, dim: int) -> Tensor:
    """(count, dim) table: even columns sin, odd ones cos of position / 10000^(2k / dim)."""
    rate = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.arange(count, dtype=torch.float32).unsqueeze(1) * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim]


def _mark_embedding(embed: str | None, dim: int, freq: str, **dd) -> nn.Module | None:
    if freq not in FREQUENCIES:
        raise ValueError(f"freq must be one of {', '.join(FREQUENCIES)}, not {freq!r}")
    if embed is None:
        return None
    if embed == "timeF":
        return nn.Linear(FREQUENCIES[freq], dim, bias=False, **dd)
    if embed not in ("fixed", "learned"):
        raise ValueError(f"embed must be 'timeF', 'fixed', 'learned' or None, not {embed!r}")
    return CalendarEmbedding(dim, minutes=freq == "t", fixed=embed == "fixed", **dd)


class SeriesEmbedding(nn.Module):
    """Circular convolution of three steps without bias: ``(L, rows, c) -> (L, rows, D)``, time first."""

    def __init__(self, channels: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, channels, 3, device=device, dtype=dtype))
        nn.init.kaiming_normal_(self.weight, nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.stack([x.roll(1, 0), x, x.roll(-1, 0)], -1)  # (L, rows, c, 3)
        return steps.flatten(2) @ self.weight.flatten(1).t()


class _ConvPool(nn.Module):
    """Coarser scales by one learned convolution of three steps over all channels: ``(B, L, C) -> [(B, L_i, C)]``."""

    def __init__(self, channels: int, window: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv1d(channels, channels, 3, window, 1, padding_mode="circular", bias=False, **dd)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        scales = [x]
        for length in lengths[1:]:
            coarse = self.conv(scales[-1].transpose(1, 2))[..., :length]  # (B, C, L_i)
            scales.append(coarse.transpose(1, 2))
        return scales


class Bypass(nn.Module):
    """Predictor of the trend that goes round the blocks: ``(B, L, C) -> (B, T, C)``, R (O r + o) + c over time."""

    def __init__(self, length: int, horizon: int, *, device=None, dtype=None):
        super().__init__()
        self.inner = TimeLinear(length, length, device=device, dtype=dtype)
        self.outer = TimeLinear(length, horizon, device=device, dtype=dtype)

    def forward(self, trend: Tensor) -> Tensor:
        # nothing is between the two, so their product, which is small, is formed first
        outer, inner = self.outer, self.inner
        bias = F.linear(inner.bias.unsqueeze(0), outer.weight, outer.bias).squeeze(0)
        return (outer.weight @ inner.weight) @ trend + bias.unsqueeze(1)


class PerScale(nn.Module):
    """MetaFormer blocks with any token mixer over time, one for each scale: ``[(B, L_i, C)] -> [(B, L_i, C)]``."""

    def __init__(self, dim: int, lengths: Sequence[int], *, token_mixer: Any, hidden: int, device=None, dtype=None):
        super().__init__()
        mixers = {"token_mixer": token_mixer, "channel_mixer": ("mlp", {"ratio": hidden / dim})}
        common = {"rank": 1, "norm_eps": 1e-5, "device": device, "dtype": dtype}
        self.scales = nn.ModuleList(MetaFormerBlock(dim, grid_size=(length,), **mixers, **common) for length in lengths)

    def forward(self, scales: Sequence[Tensor], finest: bool = False) -> list[Tensor]:
        return [block(h) for block, h in zip(self.scales, scales, strict=True)][: 1 if finest else None]


class FlatHead(nn.Module):
    """Classifier over all steps: ``(B, L, D) -> (B, classes)``, after a GELU; unobserved steps are left out."""

    def __init__(self, length: int, dim: int, num_classes: int, drop: float, *, device=None, dtype=None):
        super().__init__()
        self.drop = Dropout(drop)
        self.fc = nn.Linear(length * dim, num_classes, device=device, dtype=dtype)

    def reset(self, num_classes: int) -> None:
        """A new linear layer."""
        weight = self.fc.weight
        self.fc = nn.Linear(weight.shape[1], num_classes, device=weight.device, dtype=weight.dtype)

    def forward(self, h: Tensor, observed: Tensor | None = None) -> Tensor:
        y = self.drop(F.gelu(h))
        y = y if observed is None else y * observed.unsqueeze(-1)
        return self.fc(y.flatten(1))


class TimeMixer(SeriesModel):
    """TimeMixer for forecasting, imputation, anomaly detection or classification.

    Args:
        context_length, prediction_length, num_channels: past steps L, future steps T, channels C.
        task: "forecast" to ``(B, T, C)``, "imputation" and "anomaly" to ``(B, L, C)``, "classification" to logits.
        dim, hidden, depth: width D, width of the MLPs over it, number of blocks.
        levels, window: scales besides the series itself, and steps that one of the next scale is made of.
        downsample: "avg", "max", or "conv" (learned, three steps).
        channel_independence: every channel is a row of its own; otherwise the embedding mixes them.
        use_norm: instance norm of every scale (of forecasting and anomaly detection; imputation always norms).
        kernel, decomposition, top_k: see `PastDecomposableMixing`.
        embed: of time marks: "timeF" (features), "fixed" or "learned" (calendar fields), None for a model without.
        freq: frequency of the marks, which is their number: h 4, t 5, s 6, m and a 1, w 2, d and b 3.
        future_marks: add the embedding of the marks of the horizon before the projection.
        token_mixer: None for past-decomposable mixing, or any mixer of sequences, which then mixes each scale by
            itself; one for all blocks or a list with one for each.
        drop_rate: dropout after the embedding. num_classes: of the classification.
        legacy: pair marks with rows as the authors' code does, and, with mixed channels, reshape imputed series as it
            does; for weights trained with it.

    Inputs besides ``past_values`` ``(B, L, C)``: ``past_time_features`` ``(B, L, F)`` and ``future_time_features``
    ``(B, T, F)`` of models with marks, ``past_observed_mask`` of imputation ``(B, L, C)``, 1 where a value is known,
    and of classification ``(B, L)``; `forward_inputs` names those the model takes, `num_marks` is F.
    """

    # layers with rows for every step of the forecast
    horizon_parts = ("head.time", "bypass")

    def __init__(
        self,
        *,
        context_length: int = 96,
        prediction_length: int = 96,
        num_channels: int = 7,
        task: str = "forecast",
        dim: int = 16,
        hidden: int = 32,
        depth: int = 2,
        levels: int = 3,
        window: int = 2,
        downsample: str = "avg",
        channel_independence: bool = True,
        use_norm: bool = True,
        kernel: int = 25,
        decomposition: str = "moving_average",
        top_k: int = 5,
        embed: str | None = "timeF",
        freq: str = "h",
        future_marks: bool = False,
        token_mixer: Any = None,
        drop_rate: float = 0.1,
        num_classes: int = 2,
        legacy: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(context_length=context_length, prediction_length=prediction_length, num_channels=num_channels)
        _check(task, downsample, channel_independence, future_marks, embed)
        check_decomposition(decomposition, kernel, top_k)
        dd = {"device": device, "dtype": dtype}
        forecasts = task == "forecast"
        self.task, self.window, self.downsample, self.legacy = task, window, downsample, legacy
        self.mixed, self.num_classes = not channel_independence, num_classes if task == "classification" else 0
        self.lengths = scale_lengths(context_length, window, levels)
        self.trend = partial(trend, decomposition=decomposition, kernel=kernel, top_k=top_k)

        self.pool = _ConvPool(num_channels, window, **dd) if downsample == "conv" and levels else None
        norms = len(self.lengths) if use_norm and task in ("forecast", "anomaly") else 0
        self.norms = nn.ModuleList(InstanceNorm(num_channels, **dd) for _ in range(norms))
        self.embedding = SeriesEmbedding(num_channels if self.mixed else 1, dim, **dd)
        self.marks = _mark_embedding(embed if forecasts else None, dim, freq, **dd)
        self.num_marks = 0 if self.marks is None else FREQUENCIES[freq] if embed == "timeF" else len(self.marks.tables)
        self.drop = Dropout(drop_rate)
        split = {"decomposition": decomposition, "kernel": kernel, "top_k": top_k, "cross": self.mixed}
        blocks = [
            PastDecomposableMixing(dim, self.lengths, hidden=hidden, **split, **dd)
            if token_mixer is None
            else PerScale(dim, self.lengths, token_mixer=spec, hidden=hidden, **dd)
            for (spec,) in specs_per_block(token_mixer or "identity", [1] * depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        if not forecasts and token_mixer is None:
            # the head reads the finest scale alone, which this part of the last block does not reach
            self.blocks[-1].down.requires_grad_(False)
        outputs = num_channels if self.mixed else 1
        bypassed = self.lengths if forecasts and self.mixed else ()
        self.bypass = nn.ModuleList(Bypass(length, prediction_length, **dd) for length in bypassed)
        if forecasts:
            self.head = FutureMultipredictorMixing(dim, self.lengths, prediction_length, outputs, **dd)
        elif task == "classification":
            self.head = FlatHead(context_length, dim, num_classes, drop_rate, **dd)
        else:
            self.head = nn.ModuleDict({"projection": nn.Linear(dim, outputs, **dd)})
        if self.marks is not None:
            self.forward_inputs = ("past_time_features",) + ("future_time_features",) * future_marks
        elif task in ("imputation", "classification"):
            self.forward_inputs = ("past_observed_mask",)

    def forward(
        self,
        past_values: Tensor,
        past_time_features: Tensor | None = None,
        future_time_features: Tensor | None = None,
        past_observed_mask: Tensor | None = None,
    ) -> Tensor:
        given = {"past_time_features": past_time_features, "future_time_features": future_time_features}
        self.check(past_values, given | {"past_observed_mask": past_observed_mask})
        if self.task == "classification":
            return self.head(self._mix(self._scales(past_values), finest=True)[0], past_observed_mask)
        if self.task == "imputation":
            return self._impute(past_values, past_observed_mask)
        scales, statistics = self._normed(self._scales(past_values))
        if self.task == "anomaly":
            y = self._read(self._mix(scales, finest=True)[0], past_values.shape[0])
            return self._restore(y, statistics)
        inputs, trends = self._split(scales)
        future = None if future_time_features is None else self._rows(self.marks(future_time_features.transpose(0, 1)))
        y = self.head(self._mix(inputs, past_time_features), future)  # (rows, T, K)
        y = y.reshape(past_values.shape[0], -1, *y.shape[1:])  # (B, C, T, 1) or (B, 1, T, C)
        y = y.squeeze(1) if self.mixed else y.squeeze(-1).transpose(1, 2)  # (B, T, C)
        for bypass, slow in zip(self.bypass, trends, strict=True):
            y = y + bypass(slow)
        return self._restore(y, statistics)

    def forward_features(self, past_values: Tensor, past_time_features: Tensor | None = None) -> list[Tensor]:
        """Maps of all scales after the last block, ``(B C, L_i, D)``, or ``(B, L_i, D)`` with mixed channels."""
        self.check(past_values, {"past_time_features": past_time_features})
        if self.task == "imputation":
            return self._mix(self._scales(self._centred(past_values, None)[0]))
        scales = self._scales(past_values)
        if self.task == "classification":
            return self._mix(scales)
        scales, _ = self._normed(scales)
        return self._mix(self._split(scales)[0] if self.task == "forecast" else scales, past_time_features)

    def _scales(self, x: Tensor) -> list[Tensor]:
        return self.pool(x, self.lengths) if self.pool else pooled_scales(x, self.lengths, self.window, self.downsample)

    def _normed(self, scales: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
        """Scales with their instance norms, and the statistics of the finest."""
        if not self.norms:
            return scales, None
        normed = [norm(x) for norm, x in zip(self.norms, scales, strict=True)]
        return [z for z, _, _ in normed], normed[0][1:]

    def _restore(self, y: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
        return y if statistics is None else self.norms[0].inverse(y, *statistics)

    def _split(self, scales: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs of the embedding, and the trends that go round the blocks, ``(B, L_i, C)``."""
        if not self.bypass:
            return scales, []
        trends = [self.trend(z.transpose(0, 1)).transpose(0, 1) for z in scales]
        return [z - slow for z, slow in zip(scales, trends, strict=True)], trends

    def _rows(self, marks: Tensor) -> Tensor:
        """Embedded marks of samples ``(L, B, D)`` for rows ``(L, rows, D)``."""
        if self.mixed:
            return marks
        C = self.num_channels
        return marks.repeat(1, C, 1) if self.legacy else marks.repeat_interleave(C, 1)

    def _mix(self, scales: list[Tensor], marks: Tensor | None = None, finest: bool = False) -> list[Tensor]:
        """Embedding and blocks: ``[(B, L_i, C)]`` to ``[(rows, L_i, D)]``, or the finest; time-first in memory."""
        maps = []
        for z in scales:
            first = z.transpose(0, 1)  # (L_i, B, C)
            e = self.embedding(first if self.mixed else first.reshape(first.shape[0], -1, 1))  # (L_i, rows, D)
            if marks is not None:
                # the first mark of each window, as many as there are steps
                marks = marks[:, :: self.window][:, : len(first)] if maps else marks
                e = e + self._rows(self.marks(marks.transpose(0, 1)))
            maps.append(self.drop(e).transpose(0, 1))
        for i, block in enumerate(self.blocks, 1):
            maps = block(maps, finest=finest and i == len(self.blocks))
        return maps

    def _read(self, h: Tensor, batch: int) -> Tensor:
        """Series from the finest map: ``(rows, L, D) -> (B, L, C)``."""
        y = self.head["projection"](h.transpose(0, 1))  # (L, rows, K)
        if self.mixed and self.legacy:
            return y.transpose(0, 1).reshape(batch, y.shape[-1], -1).transpose(1, 2)
        return y.reshape(len(y), batch, -1).transpose(0, 1)

    @staticmethod
    def _centred(x: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Series with the mean and deviation of their observed values taken out, zero where they are unobserved."""
        wide = widen(x).detach()
        mask = torch.ones_like(wide) if observed is None else observed.to(wide.dtype)
        n = mask.sum(1, keepdim=True).clamp(min=1)
        mean = torch.where(mask > 0, wide, 0).sum(1, keepdim=True) / n
        std = ((torch.where(mask > 0, wide - mean, 0).square().sum(1, keepdim=True) / n) + 1e-5).sqrt()
        z = torch.where(mask > 0, (widen(x) - mean) / std, 0)
        return z.to(x.dtype), mean, std

    def _impute(self, x: Tensor, observed: Tensor | None) -> Tensor:
        z, mean, std = self._centred(x, observed)
        y = self._read(self._mix(self._scales(z), finest=True)[0], x.shape[0])
        return (widen(y) * std + mean).to(y.dtype)


def _check(task: str, downsample: str, channel_independence: bool, future_marks: bool, embed: str | None) -> None:
    """Raise ValueError for what TimeMixer cannot be built with."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    if downsample not in ("avg", "max", "conv"):
        raise ValueError(f"downsample must be 'avg', 'max' or 'conv', not {downsample!r}")
    if task == "classification" and channel_independence:
        raise ValueError("task='classification' reads all channels together: give channel_independence=False")
    if future_marks and (task != "forecast" or embed is None or not channel_independence):
        raise ValueError("future_marks=True is for forecasts with time marks (embed) and channel_independence=True")


_ETT = {
    "context_length": 96,
    "prediction_length": 96,
    "num_channels": 7,
    "task": "forecast",
    "dim": 16,
    "hidden": 32,
    "depth": 2,
    "levels": 3,
    "window": 2,
    "downsample": "avg",
    "channel_independence": True,
    "use_norm": True,
    "kernel": 25,
    "embed": "timeF",
    "freq": "h",
    "drop_rate": 0.1,
}
_WIDE = _ETT | {"channel_independence": False, "use_norm": False, "embed": None}
_SOLAR = _WIDE | {"num_channels": 137, "dim": 512, "hidden": 2048, "depth": 3, "levels": 2}
_PEMS = _WIDE | {"dim": 128, "hidden": 256, "depth": 5, "levels": 1, "prediction_length": 12}
_M4 = _ETT | {"num_channels": 1, "dim": 32, "hidden": 32, "depth": 4, "levels": 1, "embed": None}
# configurations of the authors' scripts at one horizon after the other
_LONG_TERM = {
    "timemixer_etth1_96": _ETT,
    "timemixer_etth2_96": _ETT,
    "timemixer_ettm1_96": _ETT,
    "timemixer_ettm2_96": _ETT | {"dim": 32},
    "timemixer_weather_96": _ETT | {"num_channels": 21, "depth": 3},
    "timemixer_electricity_96": _ETT | {"num_channels": 321, "depth": 3},
    "timemixer_traffic_96": _ETT | {"num_channels": 862, "dim": 32, "hidden": 64, "depth": 3},
    "timemixer_solar_96": _SOLAR,
    "timemixer_etth1_512": _ETT | {"context_length": 512},
}
_SHORT_TERM = {
    "timemixer_pems03_96_12": _PEMS | {"num_channels": 358},
    "timemixer_pems04_96_12": _PEMS | {"num_channels": 307},
    "timemixer_pems07_96_12": _PEMS | {"num_channels": 883},
    "timemixer_pems08_96_12": _PEMS | {"num_channels": 170},
    "timemixer_m4_yearly_12_6": _M4 | {"context_length": 12, "prediction_length": 6},
    "timemixer_m4_quarterly_16_8": _M4 | {"context_length": 16, "prediction_length": 8, "hidden": 64},
    "timemixer_m4_monthly_36_18": _M4 | {"context_length": 36, "prediction_length": 18},
    "timemixer_m4_weekly_26_13": _M4 | {"context_length": 26, "prediction_length": 13},
    "timemixer_m4_daily_28_14": _M4 | {"context_length": 28, "prediction_length": 14, "hidden": 16},
    "timemixer_m4_hourly_96_48": _M4 | {"context_length": 96, "prediction_length": 48},
}
_OTHER_TASKS = {
    "timemixer_imputation_96": _ETT | {"task": "imputation", "embed": None},
    "timemixer_anomaly_96": _ETT | {"task": "anomaly", "embed": None},
    "timemixer_classification_96": _WIDE | {"task": "classification", "num_classes": 2},
}

register_models(TimeMixer, {"timemixer": _ETT}, modality="series", classifier=None, note="open: any sizes")
register_models(
    TimeMixer,
    {
        f"{name}_{horizon}": row | {"prediction_length": horizon}
        for name, row in _LONG_TERM.items()
        for horizon in (96, 192, 336, 720)
    },
    modality="series",
    classifier=None,
)
register_models(TimeMixer, _SHORT_TERM | _OTHER_TASKS, modality="series", classifier=None)
