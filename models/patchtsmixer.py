"""PatchTSMixer, IBM's TSMixer: gated MLPs over the patches and the features of series, and on request over the series.

Paper: arXiv:2306.09364. Checked against huggingface/transformers 5.23.0, models/patchtsmixer.

    past_values (B, L, C) -> scaler -> patches (B, C, P, p), the newest steps -> linear: (B, C, P, D)
      -> blocks:  h <- h + mlp_C(gate_C(norm(h)))     over the series, mode "mix_channel" only
                  h <- h + gate_P(mlp_P(norm(h)))     over the patches, with a self-attention beside it on request
                  h <- h + gate_D(mlp_D(norm(h)))     over the features
      -> head -> scaler undone

P = floor((L - p) / s) + 1 patches of p steps, s apart. `mixers.gated_mlp` has the MLPs, `_series_heads` the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution

from ..mixers import TOKEN_MIXERS
from ..mixers._layers import make_norm
from ..mixers._registry import specs_per_block
from ._registry import register_models
from ._series import SeriesModel, make_scaler
from ._series_heads import (
    CrossChannelHead,
    ForecastHead,
    Parameters,
    PatchHead,
    PatchMask,
    PooledHead,
    ScaleInjection,
    family_of,
)
from .block import MetaFormerBlock, ResidualBranch

TASKS = ("forecast", "pretraining", "classification", "regression")


def sincos_positions(patches: int, dim: int) -> Tensor:
    """(P, D) table of sines and cosines, its mean taken out and its deviation scaled to 0.1."""
    rate = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.arange(patches, dtype=torch.float32).unsqueeze(1) * rate
    positions = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim]
    positions = positions - positions.mean()
    return positions / (10 * positions.std())


class PatchTSMixerBlock(nn.Sequential):
    """A MetaFormer block after one more branch, over the series: its mixers in the order of the arguments.

    Args:
        dim: width D.
        series: mixer over the series, None for no such branch. token, channel: see `MetaFormerBlock`.
        rank, grid_size: of the grid, (P,) or (C, P). norm, norm_eps: see `make_norm`.

    Shapes: ``(B, *grid, D) -> (B, *grid, D)``.
    """

    def __init__(
        self,
        dim: int,
        series: Any,
        token: Any,
        channel: Any,
        *,
        rank: int,
        grid_size: Sequence[int],
        norm: str = "layer",
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        common = {"rank": rank, "grid_size": grid_size, **dd}
        if series is not None:
            op = TOKEN_MIXERS.create(series, dim, **common)
            self.series = ResidualBranch(make_norm(norm, dim, eps=norm_eps, **dd), op, **dd)
        block = MetaFormerBlock(dim, token_mixer=token, channel_mixer=channel, norm=norm, norm_eps=norm_eps, **common)
        self.token, self.channel = block.token, block.channel


class PatchTSMixer(SeriesModel):
    """PatchTSMixer for forecasting, masked pre-training, classification or regression.

    Args:
        context_length, prediction_length, num_channels: past steps L, future steps T, series C. In mode
            "common_channel" forecasts take any number of series.
        task: "forecast" to ``(B, T, C)``, "pretraining" to patches ``(B, C, P, p)`` on the scale of the scaler,
            "classification" to logits, "regression" to ``(B, num_targets)``.
        patch_length, patch_stride: p and s. dim, ratio, depth: width D, hidden width of the MLPs over it, blocks.
        mode: "common_channel", series share all and do not meet, or "mix_channel".
        gated: gates of the MLPs. attn_heads: heads of the self-attention over patches, 0 for none.
        norm: "layer" or "batch". norm_eps: added to the variance.
        positions: None, "sincos" (fixed) or "random" (learned), added to the patches.
        scaling: "std", "mean" or None, see `make_scaler`.
        token_mixer: None for the gated MLPs over patches, or any mixer, of sequences of patches in mode
            "common_channel", of grids (series, patches) in mode "mix_channel"; one or a list with one for each block.
        drop_rate, head_drop_rate: dropout in the blocks and before the head.
        distribution: of each value: "student_t", "normal" or "negative_binomial"; the output is then its mean. None for
            point estimates. For forecasts and regression.
        output_channels: ascending indices of the series to forecast; None for all.
        cross_channel: steps on either side that the cross-channel reconciliation head sees; None for no such head.
        hierarchical: the loss reconciles forecasts with those of sums over ``patch_length`` steps.
        num_classes: of a classification. num_targets, output_range: number and bounds of a regression's outputs.
        pool: over patches, of classification and regression: "max", "avg", "last" or None.
        mask, mask_ratio, mask_patches, mask_consistent, mask_exempt, mask_value: see `PatchMask`.

    Inputs besides ``past_values``: ``past_observed_mask`` ``(B, L, C)``, 1 where a value is known (values elsewhere do
    not count in the scaler but pass the model: fill them); in pre-training ``patch_mask`` ``(B, C, P)``, 1 to hide a
    patch.
    """

    # layers with rows for every step of the forecast
    horizon_parts = ("head.time",)
    # parts that a model for another task may lack
    optional_parts = ("head.time", "head.patch", "head.fc", "injection", "aggregate", "cross_channel")

    def __init__(
        self,
        *,
        context_length: int = 512,
        prediction_length: int = 96,
        num_channels: int = 7,
        task: str = "forecast",
        patch_length: int = 16,
        patch_stride: int = 16,
        dim: int = 48,
        ratio: float = 3.0,
        depth: int = 2,
        mode: str = "common_channel",
        gated: bool = True,
        attn_heads: int = 0,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        positions: str | None = None,
        scaling: str | None = "std",
        token_mixer: Any = None,
        drop_rate: float = 0.5,
        head_drop_rate: float = 0.5,
        distribution: str | None = None,
        output_channels: Sequence[int] | None = None,
        cross_channel: int | None = None,
        hierarchical: bool = False,
        num_classes: int = 3,
        num_targets: int = 3,
        output_range: Sequence[float] | None = None,
        pool: str | None = "max",
        mask: str = "random",
        mask_ratio: float = 0.5,
        mask_patches: Sequence[int] = (2,),
        mask_consistent: bool = True,
        mask_exempt: Sequence[int] = (),
        mask_value: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(context_length=context_length, prediction_length=prediction_length, num_channels=num_channels)
        _check(task, mode, patch_length, patch_stride, context_length, positions)
        _check_heads(task, distribution, output_channels, cross_channel, hierarchical, num_channels)
        dd = {"device": device, "dtype": dtype}
        self.task, self.mixed, self.family = task, mode == "mix_channel", family_of(distribution)
        self.patch_length, self.patch_stride = patch_length, patch_stride
        self.num_patches = P = (context_length - patch_length) // patch_stride + 1
        self.num_classes = num_classes if task == "classification" else 0

        self.scaler = make_scaler(scaling)
        self.embedding = nn.Linear(patch_length, dim, **dd)
        self.positions = None
        if positions is not None:
            table = sincos_positions(P, dim) if positions == "sincos" else 0.1 * torch.randn(P, dim)
            self.positions = nn.Parameter(table.to(**dd), requires_grad=positions == "random")
        common = {
            "ratio": ratio,
            "gate": "after" if gated else None,
            "drop": drop_rate,
        }
        patches = ("gated_mlp", common | {"attn_heads": attn_heads, "attn_norm": norm})
        series = ("gated_mlp", common | {"axis": 0, "gate": "before" if gated else None})
        grid = {"rank": 2, "grid_size": (num_channels, P)} if self.mixed else {"rank": 1, "grid_size": (P,)}
        specs = [spec for (spec,) in specs_per_block(patches if token_mixer is None else token_mixer, [1] * depth)]
        # a mixer of somebody's choice mixes the series too
        crossed = series if self.mixed and token_mixer is None else None
        norms = {"norm": norm, "norm_eps": norm_eps}
        self.blocks = nn.Sequential(
            *(PatchTSMixerBlock(dim, crossed, spec, ("gated_mlp", common), **grid, **norms, **dd) for spec in specs)
        )

        self.mask = self.injection = self.aggregate = self.cross_channel = None
        heads = {"drop": head_drop_rate, **dd}
        if task == "forecast":
            chosen = {"channels": output_channels, "family": self.family}
            self.head = ForecastHead(P, dim, prediction_length, **chosen, **heads)
            outputs = num_channels if output_channels is None else len(output_channels)
            self.cross_channel = None if cross_channel is None else CrossChannelHead(outputs, cross_channel, **dd)
            if hierarchical:
                sums = -(-prediction_length // patch_length)
                self.aggregate = ForecastHead(P, dim, sums, channels=output_channels, **heads)
        elif task == "pretraining":
            self.head = PatchHead(dim, patch_length, **heads)
            hidden = {"ratio": mask_ratio, "counts": mask_patches, "consistent": mask_consistent}
            self.mask = PatchMask(num_channels, P, kind=mask, **hidden, exempt=mask_exempt, value=mask_value)
        else:
            self.injection = None if scaling is None else ScaleInjection(dim, **dd)
            outputs = num_classes if task == "classification" else num_targets
            pooled = {"pool": pool, "family": self.family, "limits": output_range if task == "regression" else None}
            self.head = PooledHead((num_channels, P, dim), outputs, **pooled, **heads)
        self.forward_inputs = ("past_observed_mask",) + ("patch_mask",) * (task == "pretraining")
        self._any_channels = not self.mixed and task == "forecast" and cross_channel is None
        self.apply(_init)

    def forward(
        self, past_values: Tensor, past_observed_mask: Tensor | None = None, patch_mask: Tensor | None = None
    ) -> Tensor:
        if self.task == "pretraining":
            return self._reconstruct(past_values, past_observed_mask, patch_mask)[0]
        self._check_inputs(past_values, past_observed_mask, patch_mask)
        h, loc, scale = self._encode(past_values, past_observed_mask)
        if self.family is not None:
            return self.family.mean(*self.head.outputs(h, self.family.used), loc, scale)
        return self._point(h) * scale + loc if self.task == "forecast" else self._point(h)

    def forward_features(self, past_values: Tensor, past_observed_mask: Tensor | None = None) -> Tensor:
        """Features that the head reads, ``(B, C, P, D)``; in pre-training those of unmasked patches."""
        self._check_inputs(past_values, past_observed_mask, None)
        scaled, loc, scale = self.scaler(past_values, past_observed_mask)
        h = self._mix(self._patches(scaled))
        return h if self.injection is None else self.injection(h, loc, scale)

    def distribution_parameters(self, past_values: Tensor, past_observed_mask: Tensor | None = None) -> Parameters:
        """Parameters of the distributions on the scale of the scaler, ``(B, T, C)`` or ``(B, K)`` each.

        Raises:
            ValueError: the head gives point estimates.
        """
        return self._estimate(past_values, past_observed_mask)[0]

    def distribution(self, past_values: Tensor, past_observed_mask: Tensor | None = None) -> Distribution:
        """Distributions of the values, independent of each other: ``(B, T, C)``, or ``(B, K)`` of a regression.

        Raises:
            ValueError: the head gives point estimates.
        """
        return self.family.build(*self._estimate(past_values, past_observed_mask))

    def loss(
        self,
        past_values: Tensor,
        target: Tensor | None = None,
        past_observed_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
    ) -> Tensor:
        """What the authors minimise, a scalar.

        Mean squared error of forecasts ``(B, T, C)`` and regressions, minus the log-likelihood of probabilistic ones;
        cross-entropy of classes ``(B,)``; in pre-training, which has no target, the squared error of hidden patches.
        """
        if self.task == "pretraining":
            y, patches, hidden = self._reconstruct(past_values, past_observed_mask, patch_mask)
            error = (y - patches).square().mean(-1)  # (B, C, P)
            return (error * hidden).sum() / (hidden.sum() + 1e-10)
        if target is None:
            raise ValueError(f"the loss of a {self.task} needs a target")
        if self.task == "classification":
            return F.cross_entropy(self(past_values, past_observed_mask), target)
        if self.family is not None:
            return -self.distribution(past_values, past_observed_mask).log_prob(self._chosen(target)).mean()
        if self.aggregate is not None:
            return self._hierarchical_loss(past_values, self._chosen(target), past_observed_mask)
        return F.mse_loss(self(past_values, past_observed_mask), self._chosen(target))

    def _chosen(self, target: Tensor) -> Tensor:
        """The series of a forecast's target that are forecast."""
        channels = self.head.channels if self.task == "forecast" else None
        return target if channels is None or target.shape[-1] == len(channels) else target[..., channels]

    def _hierarchical_loss(self, past_values: Tensor, target: Tensor, observed: Tensor | None) -> Tensor:
        """Online hierarchical patch reconciliation: errors of steps, of sums over patches, and between the two."""
        h, loc, scale = self._encode(past_values, observed)
        n = self.patch_length
        y = self._point(h) * scale + loc
        sums = self.aggregate(h)[0] * scale + n * loc  # (B, S, C)

        def total(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, 0, -x.shape[1] % n)).unflatten(1, (-1, n)).sum(2)

        return F.mse_loss(y, target) + (F.mse_loss(sums, total(target)) + F.mse_loss(total(y), sums)) / n

    def _check_family(self) -> None:
        if self.family is None:
            raise ValueError("this model gives point estimates; create it with distribution='student_t', for example")

    def _check_inputs(self, past_values: Tensor, observed: Tensor | None, patch_mask: Tensor | None) -> None:
        optional = {"past_observed_mask": observed, "patch_mask": patch_mask}
        self.check(past_values, optional, any_channels=self._any_channels)

    def _patches(self, x: Tensor) -> Tensor:
        """The newest whole patches of series: ``(B, L, C) -> (B, C, P, p)``."""
        used = self.patch_length + self.patch_stride * (self.num_patches - 1)
        return x[:, x.shape[1] - used :].transpose(1, 2).unfold(2, self.patch_length, self.patch_stride)

    def _mix(self, patches: Tensor) -> Tensor:
        """Embedding and blocks: ``(B, C, P, p) -> (B, C, P, D)``."""
        h = self.embedding(patches)
        h = h if self.positions is None else h + self.positions
        return self.blocks(h) if self.mixed else self.blocks(h.flatten(0, 1)).unflatten(0, h.shape[:2])

    def _encode(self, past_values: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Features, and location and scale ``(B, 1, C)`` of the series that the head forecasts."""
        scaled, loc, scale = self.scaler(past_values, observed)
        h = self._mix(self._patches(scaled))
        if self.task != "forecast":
            h = h if self.injection is None else self.injection(h, loc, scale)
            return h, loc.new_zeros(()), scale.new_ones(())
        channels = self.head.channels
        return h, loc if channels is None else loc[..., channels], scale if channels is None else scale[..., channels]

    def _point(self, h: Tensor) -> Tensor:
        """Point estimates on the scale of the scaler."""
        y = self.head(h)[0]
        return y if self.cross_channel is None else self.cross_channel(y)

    def _estimate(self, past_values: Tensor, observed: Tensor | None) -> tuple[Parameters, Tensor, Tensor]:
        """Parameters of the distributions, and location and scale of the values."""
        self._check_family()
        self._check_inputs(past_values, observed, None)
        h, loc, scale = self._encode(past_values, observed)
        return self.head(h), loc, scale

    def _reconstruct(
        self, past_values: Tensor, observed: Tensor | None, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructed patches, the patches ``(B, C, P, p)``, and the mask ``(B, C, P)``."""
        self._check_inputs(past_values, observed, hidden)
        patches = self._patches(self.scaler(past_values, observed)[0])
        hidden = self.mask(patches.shape[0], patches) if hidden is None else hidden
        seen = patches.masked_fill(hidden.unsqueeze(-1) > 0, self.mask.value)
        return self.head(self._mix(seen)), patches, hidden


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check(task: str, mode: str, patch: int, stride: int, context: int, positions: str | None) -> None:
    """Raise ValueError for what PatchTSMixer cannot be built with."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    if mode not in ("common_channel", "mix_channel"):
        raise ValueError(f"mode must be 'common_channel' or 'mix_channel', not {mode!r}")
    if patch < 1 or stride < 1:
        raise ValueError(f"patch_length and patch_stride must be at least 1, got {patch} and {stride}")
    if context <= patch:
        raise ValueError(f"context_length must be more than patch_length={patch}, not {context}")
    if positions not in (None, "sincos", "random"):
        raise ValueError(f"positions must be None, 'sincos' or 'random', not {positions!r}")


def _check_heads(
    task: str,
    distribution: str | None,
    output_channels: Sequence[int] | None,
    cross_channel: int | None,
    hierarchical: bool,
    channels: int,
) -> None:
    """Raise ValueError for heads that do not go together."""
    family_of(distribution)
    if distribution is not None and task not in ("forecast", "regression"):
        raise ValueError(f"distribution={distribution!r} is for forecasts and regression, not for {task}")
    if output_channels is not None:
        wanted = sorted(set(output_channels))
        if list(output_channels) != wanted or not wanted or not 0 <= wanted[0] <= wanted[-1] < channels:
            raise ValueError(
                f"output_channels must be ascending indices below {channels}, not {list(output_channels)}; forecasts "
                "come in that order"
            )
    reconciled = cross_channel is not None or hierarchical
    if reconciled and (task != "forecast" or distribution is not None):
        raise ValueError("cross_channel and hierarchical are for point forecasts: task='forecast', distribution=None")


_GRANITE = {
    "context_length": 512,
    "prediction_length": 96,
    "num_channels": 7,
    "task": "forecast",
    "patch_length": 16,
    "patch_stride": 16,
    "dim": 48,
    "ratio": 3.0,
    "depth": 2,
    "mode": "common_channel",
    "gated": True,
    "attn_heads": 0,
    "scaling": "std",
    "drop_rate": 0.5,
    "head_drop_rate": 0.7,
}
_ETT = {
    "patchtsmixer_etth1_512": _GRANITE,
    "patchtsmixer_etth2_512": _GRANITE,
    "patchtsmixer_mixchannel_512": _GRANITE | {"mode": "mix_channel"},
    # of the authors' notebooks: training from scratch, and transfer from another data set
    "patchtsmixer_etth1_p8_512": _GRANITE | {"patch_length": 8, "patch_stride": 8, "depth": 3},
    "patchtsmixer_electricity_512": _GRANITE
    | {
        "num_channels": 321,
        "patch_length": 8,
        "patch_stride": 8,
        "dim": 16,
        "ratio": 2.0,
        "depth": 8,
        "drop_rate": 0.2,
        "head_drop_rate": 0.2,
    },
}
_PRETRAINING = _GRANITE | {"task": "pretraining", "head_drop_rate": 0.5, "mask": "forecast", "mask_patches": (2,)}
_OTHER = {
    "patchtsmixer_student_t_512_96": _GRANITE | {"head_drop_rate": 0.5, "distribution": "student_t"},
    "patchtsmixer_pretraining_512": _PRETRAINING,
    "patchtsmixer_classification_512": _GRANITE | {"task": "classification", "num_classes": 5},
    "patchtsmixer_regression_512": _GRANITE | {"task": "regression", "num_targets": 3},
}

register_models(PatchTSMixer, {"patchtsmixer": _GRANITE}, modality="series", classifier=None, note="open: any sizes")
register_models(
    PatchTSMixer,
    {
        f"{name}_{horizon}": row | {"prediction_length": horizon}
        for name, row in _ETT.items()
        for horizon in (96, 192, 336, 720)
    },
    modality="series",
    classifier=None,
)
register_models(PatchTSMixer, _OTHER, modality="series", classifier=None)
