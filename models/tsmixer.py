"""TSMixer of Google, an all-MLP forecaster: MLPs over time and over the channels in turn.

Paper: arXiv:2303.06053. Checked against thuml/Time-Series-Library at 4e938a1, models/TSMixer.py. IBM's TSMixer is
`patchtsmixer`.

    x: (B, L, C) -> blocks:  x <- x + mlp_L(norm(x))   over time, Linear - ReLU - Linear of hidden width D
                             x <- x + mlp_C(norm(x))   over channels, the same
      -> linear over time: (B, T, C)

That library's edition, the rows below, has no norms. The paper's has norms over time and channels together, which
``norm="group"`` is up to the shape of its weight, and one layer over time in place of two.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor

from ..mixers._registry import specs_per_block
from ..mixers.mlp import TokenLinear
from ._registry import register_models
from ._series import InstanceNorm, SeriesModel
from .block import MetaFormerBlock


class TSMixer(SeriesModel):
    """TSMixer: ``past_values`` ``(B, L, C)`` to a forecast ``(B, T, C)``.

    Args:
        context_length, prediction_length, num_channels: past steps L, future steps T, channels C.
        hidden, depth: width D of the MLPs, number of blocks.
        act: activation, see `make_activation`.
        norm: before every branch, see `make_norm`; None for none.
        instance_norm: reversible instance norm around the model.
        token_mixer: None for the MLPs over time, or any mixer of sequences; one or a list with one for each block.
        drop_rate: dropout at the end of a branch.
    """

    # layers with rows for every step of the forecast
    horizon_parts = ("head.time",)

    def __init__(
        self,
        *,
        context_length: int = 96,
        prediction_length: int = 96,
        num_channels: int = 7,
        hidden: int = 512,
        depth: int = 2,
        act: str = "relu",
        norm: str | None = None,
        instance_norm: bool = False,
        token_mixer: Any = None,
        drop_rate: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__(context_length=context_length, prediction_length=prediction_length, num_channels=num_channels)
        dd = {"device": device, "dtype": dtype}
        self.instance_norm = InstanceNorm(num_channels, **dd) if instance_norm else None
        mlp = ("gated_mlp", {"hidden": hidden, "act": act, "gate": None, "drop": drop_rate, "drop_hidden": False})
        specs = [spec for (spec,) in specs_per_block(mlp if token_mixer is None else token_mixer, [1] * depth)]
        common = {"rank": 1, "grid_size": (context_length,), "norm": norm, "norm_eps": 1e-5, **dd}
        self.blocks = nn.Sequential(
            *(MetaFormerBlock(num_channels, token_mixer=spec, channel_mixer=mlp, **common) for spec in specs)
        )
        self.head = nn.ModuleDict({"time": TokenLinear(context_length, prediction_length, **dd)})

    def forward(self, past_values: Tensor) -> Tensor:
        self.check(past_values, {})
        if self.instance_norm is None:
            return self.head["time"](self.blocks(past_values))
        x, mean, std = self.instance_norm(past_values)
        return self.instance_norm.inverse(self.head["time"](self.blocks(x)), mean, std)

    def forward_features(self, past_values: Tensor) -> Tensor:
        """Series after the last block, ``(B, L, C)``."""
        self.check(past_values, {})
        return self.blocks(past_values if self.instance_norm is None else self.instance_norm(past_values)[0])


_BASE = {
    "context_length": 96,
    "prediction_length": 96,
    "num_channels": 7,
    "hidden": 512,
    "depth": 2,
    "drop_rate": 0.1,
}

register_models(TSMixer, {"tsmixer_allmlp": _BASE}, modality="series", classifier=None, note="open: any sizes")
register_models(
    TSMixer,
    {
        f"tsmixer_allmlp_{context}_{horizon}": _BASE | {"context_length": context, "prediction_length": horizon}
        for context in (96, 512)
        for horizon in (96, 192, 336, 720)
    },
    modality="series",
    classifier=None,
)
