"""TSM2: time-series MambaMixer, selective scans along time and along the series in turn.

Paper: arXiv:2403.19888, a preliminary version, which published neither code nor weights: what it leaves open is decided
here (normalisation of every series, patches of 16 every 8 steps, widths), so no checkpoint of its authors can exist.

    x: (B, L, C) -> every series to mean 0, variance 1
      -> patches of p steps, s apart, the last value repeated s times at the end -> linear: (B, C, P, D)
      -> l layers:  x + time(norm(x))    a causal gated scan along the patches, series apart
                    x + series(norm(x))  a gated scan along the series from both ends, patches apart
      -> norm -> linear over (P, D): (B, T, C), back on the scale of the series

Norms see series, patches and features together. Every branch takes a learned combination of all results so far, see
`WeightedAverages`. Forecasts depend on the order of the series, not on their number.

Static features and known future ones become 2 L further steps before the patches:

    [x | linear(series(time(z))) | linear(s)]        z: (B, C, T, F), s: (B, C, S); the layers of z have width F
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..mixers import TOKEN_MIXERS
from ..mixers._layers import is_symbolic, make_norm
from ..mixers._registry import specs_per_block
from ._averaging import Chain, WeightedAverages
from ._registry import register_models
from ._series import SeriesModel, StdScaler
from ._series_heads import ForecastHead
from .block import ResidualBranch


class AlongAxis(nn.Module):
    """A mixer of sequences along one axis of ``(B, C, P, D)``, the other is part of the batch.

    Args:
        mixer: the mixer.
        axis: 1 or 2.
    """

    def __init__(self, mixer: nn.Module, axis: int):
        super().__init__()
        self.mixer, self.axis = mixer, axis

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2) if self.axis == 1 else x
        y = self.mixer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return y.transpose(1, 2) if self.axis == 1 else y


class SeriesMixerBlock(nn.Module):
    """A branch along time, then one along the series: ``(B, C, P, D) -> (B, C, P, D)``.

    Args:
        dim: width D.
        time_mixer, series_mixer: mixers of sequences, a name or ``(name, {options})``.
        patches, series: P and C, for mixers whose parameters depend on the length.
        drop: dropout of what mixers give.
    """

    def __init__(
        self,
        dim: int,
        time_mixer: Any,
        series_mixer: Any,
        *,
        patches: int,
        series: int,
        drop: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}

        def branch(spec: Any, axis: int, length: int) -> ResidualBranch:
            op = TOKEN_MIXERS.create(spec, dim, rank=1, grid_size=(length,), **dd)
            return ResidualBranch(make_norm("group", dim, eps=1e-5, **dd), AlongAxis(op, axis), drop=drop, **dd)

        self.token = branch(time_mixer, 2, patches)
        self.channel = branch(series_mixer, 1, series)

    @property
    def branches(self) -> tuple[tuple[str, nn.Module], ...]:
        """The kind of every branch, "token" or "channel", and the branch, in order."""
        return ("token", self.token), ("channel", self.channel)

    def forward(self, x: Tensor, chain: Chain | None = None) -> Tensor:
        return self.channel(self.token(x)) if chain is None else chain.run(self.branches)


class FutureFeatures(nn.Module):
    """Known features of the future as further steps of every series: ``(B, C, T, F) -> (B, C, L)``."""

    def __init__(self, horizon: int, features: int, context: int, series: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        sizes = {"patches": horizon, "series": series, "drop": 0.0}
        self.block = SeriesMixerBlock(features, _CAUSAL, _BOTH_WAYS, **sizes, **dd)
        self.proj = nn.Linear(horizon * features, context, **dd)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj(self.block(z).flatten(2))


_CAUSAL = ("selective_token", {"bidirectional": False})
_BOTH_WAYS = ("selective_token", {"bidirectional": True})


class TSM2(SeriesModel):
    """TSM2: ``past_values`` ``(B, L, C)`` to a forecast ``(B, T, C)``.

    Args:
        context_length, prediction_length, num_channels: past steps L, future steps T, series C. Unless a mixer's
            parameters depend on it, another number of series can be forecast.
        patch_length, patch_stride: p and s.
        dim, depth: width D, layers.
        token_mixer: along the patches: any mixer of sequences, one or a list with one for each layer.
        series_mixer: along the series, the same.
        weighted_average: give every branch a learned combination of all results so far; otherwise the latest.
        num_static, num_future: features S of every series and F of every future step, 0 for none.
        drop_rate: dropout of the embedding, of the branches and before the head.

    Inputs besides ``past_values``: ``past_observed_mask`` ``(B, L, C)``, 1 where a value is known (values elsewhere do
    not count in the normalisation but pass the model: fill them); with ``num_static`` also ``static_features``
    ``(B, C, S)``; with ``num_future`` ``future_time_features`` ``(B, T, F)``, the same for all series, or
    ``(B, T, C, F)``.

    Raises:
        ValueError: sizes that leave no patch.
    """

    # layers with rows for every step of the forecast
    horizon_parts = ("head.time",)

    def __init__(
        self,
        *,
        context_length: int = 512,
        prediction_length: int = 96,
        num_channels: int = 7,
        patch_length: int = 16,
        patch_stride: int = 8,
        dim: int = 32,
        depth: int = 2,
        token_mixer: Any = _CAUSAL,
        series_mixer: Any = _BOTH_WAYS,
        weighted_average: bool = True,
        num_static: int = 0,
        num_future: int = 0,
        drop_rate: float = 0.3,
        device=None,
        dtype=None,
    ):
        super().__init__(context_length=context_length, prediction_length=prediction_length, num_channels=num_channels)
        steps = context_length * (1 + (num_static > 0) + (num_future > 0))
        if min(patch_length, patch_stride, depth) < 1 or min(num_static, num_future) < 0:
            raise ValueError(
                "patch_length, patch_stride and depth must be at least 1, num_static and num_future at least 0; got "
                f"{patch_length}, {patch_stride}, {depth}, {num_static}, {num_future}"
            )
        if steps + patch_stride < patch_length:
            raise ValueError(f"patch_length={patch_length} is more than the {steps} steps and patch_stride")
        dd = {"device": device, "dtype": dtype}
        self.patch_length, self.patch_stride = patch_length, patch_stride
        self.num_patches = P = (steps + patch_stride - patch_length) // patch_stride + 1
        self.num_static, self.num_future = num_static, num_future
        self.scaler = StdScaler()
        self.static = nn.Linear(num_static, context_length, **dd) if num_static else None
        self.future = None
        if num_future:
            self.future = FutureFeatures(prediction_length, num_future, context_length, num_channels, **dd)
        self.embedding = nn.Linear(patch_length, dim, **dd)
        self.drop = nn.Dropout(drop_rate)
        sizes = {"patches": P, "series": num_channels, "drop": drop_rate}
        along_time = [spec for (spec,) in specs_per_block(token_mixer, [1] * depth, "token_mixer")]
        along_series = [spec for (spec,) in specs_per_block(series_mixer, [1] * depth, "series_mixer")]
        self.blocks = nn.ModuleList(
            SeriesMixerBlock(dim, *specs, **sizes, **dd) for specs in zip(along_time, along_series, strict=True)
        )
        kinds = [kind for block in self.blocks for kind, _ in block.branches]
        self.averages = WeightedAverages(kinds, **dd) if weighted_average else None
        self.norm = make_norm("group", dim, eps=1e-5, **dd)
        self.head = ForecastHead(P, dim, prediction_length, drop=drop_rate, **dd)
        self.forward_inputs = ("past_observed_mask",)
        self.forward_inputs += ("static_features",) * (num_static > 0) + ("future_time_features",) * (num_future > 0)
        self._any_channels = not any(map(TOKEN_MIXERS.needs_grid, along_series))

    def forward(
        self,
        past_values: Tensor,
        past_observed_mask: Tensor | None = None,
        static_features: Tensor | None = None,
        future_time_features: Tensor | None = None,
    ) -> Tensor:
        h, loc, scale = self._encode(past_values, past_observed_mask, static_features, future_time_features)
        return self.head(h)[0] * scale + loc

    def forward_features(
        self,
        past_values: Tensor,
        past_observed_mask: Tensor | None = None,
        static_features: Tensor | None = None,
        future_time_features: Tensor | None = None,
    ) -> Tensor:
        """Features that the head reads, ``(B, C, P, D)``."""
        return self._encode(past_values, past_observed_mask, static_features, future_time_features)[0]

    def _encode(self, past_values, observed, static, future) -> tuple[Tensor, Tensor, Tensor]:
        """Features, and location and scale ``(B, 1, C)`` of the series."""
        self._check_inputs(past_values, observed, static, future)
        scaled, loc, scale = self.scaler(past_values, observed)
        parts = [scaled.transpose(1, 2)]  # (B, C, L)
        if future is not None:
            z = future.unsqueeze(2) if future.ndim == 3 else future  # (B, T, 1 or C, F)
            parts.append(self.future(z.transpose(1, 2).expand(-1, past_values.shape[2], -1, -1)))
        if static is not None:
            parts.append(self.static(static))
        steps = F.pad(torch.cat(parts, -1), (0, self.patch_stride), mode="replicate")
        x = self.drop(self.embedding(steps.unfold(2, self.patch_length, self.patch_stride)))  # (B, C, P, D)
        if self.averages is None:
            for block in self.blocks:
                x = block(x)
        else:
            x = self.averages(x, self.blocks)
        return self.norm(x), loc, scale

    def _check_inputs(self, past_values, observed, static, future) -> None:
        given = {"past_observed_mask": observed, "static_features": static, "future_time_features": future}
        self.check(past_values, given, any_channels=self._any_channels)
        missing = [name for name in self.forward_inputs[1:] if given[name] is None]
        if missing:
            raise ValueError(f"the model was created with {missing[0]} and needs them")
        if is_symbolic(past_values):
            return
        B, _, C = past_values.shape
        if static is not None and static.shape != (B, C, self.num_static):
            raise ValueError(f"static_features must be {(B, C, self.num_static)}, got {tuple(static.shape)}")
        if future is not None:
            common = (B, self.prediction_length, self.num_future)
            each = (B, self.prediction_length, C, self.num_future)
            if tuple(future.shape) not in (common, each):
                raise ValueError(f"future_time_features must be {common} or {each}, got {tuple(future.shape)}")


_BASE = {
    "context_length": 512,
    "prediction_length": 96,
    "num_channels": 7,
    "patch_length": 16,
    "patch_stride": 8,
    "dim": 32,
    "depth": 2,
    "drop_rate": 0.3,
}

register_models(
    TSM2, {"tsm2": _BASE}, modality="series", classifier=None, note="open: any sizes; no code was published"
)
