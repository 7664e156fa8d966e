"""GFNet: global filters and MLPs under one residual connection, isotropic or in a hierarchy.

Paper: arXiv:2107.00645. Checked against raoyongming/GFNet at 2de48b6.

    x <- x + l mlp(norm2(filter(norm1(x))))        l: layer scale, in the hierarchical models

The isotropic models embed patches of 16 pixels. The hierarchical ones embed patches of 4, and of 2 x 2 positions
between stages, without norms. Both add a position embedding after the first embedding and end in norm, mean,
classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..mixers import CHANNEL_MIXERS, TOKEN_MIXERS
from ..mixers._layers import make_norm
from ._registry import register_models
from .block import ResidualBranch
from .isotropic import IsotropicMetaFormer
from .metaformer import MetaFormer


class MixThenTransform(nn.Module):
    """Token mixer, norm, channel mixer, with no skip between them: ``(B, *grid, C) -> (B, *grid, C)``."""

    def __init__(self, token: nn.Module, norm: nn.Module, channel: nn.Module):
        super().__init__()
        self.token = token
        self.norm = norm
        self.channel = channel

    def forward(self, x: Tensor) -> Tensor:
        return self.channel(self.norm(self.token(x)))


class GFNetBlock(nn.Module):
    """One residual branch around token mixer and channel mixer.

    Args:
        dim, token_mixer, channel_mixer, grid_size, norm, norm_eps, layer_scale, drop_path: see `MetaFormerBlock`.
        res_scale: None; the block takes no residual scale.

    Shapes: ``(B, H, W, C) -> (B, H, W, C)``.
    """

    def __init__(
        self,
        dim: int,
        *,
        token_mixer: Any = "global_filter",
        channel_mixer: Any = "mlp",
        grid_size: Sequence[int] | None = None,
        norm: str = "layer",
        norm_eps: float = 1e-6,
        layer_scale: float | None = None,
        res_scale: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        token = TOKEN_MIXERS.create(token_mixer, dim, grid_size=grid_size, **dd)
        channel = CHANNEL_MIXERS.create(channel_mixer, dim, grid_size=grid_size, **dd)
        first, second = (make_norm(norm, dim, eps=norm_eps, **dd) for _ in range(2))
        op = MixThenTransform(token, second, channel)
        scales = {"layer_scale": layer_scale, "res_scale": res_scale}
        self.branch = ResidualBranch(first, op, dim=dim, **scales, drop_path=drop_path, **dd)
        self._grid_ops = tuple(
            name
            for name, registry, spec in (
                ("token", TOKEN_MIXERS, token_mixer),
                ("channel", CHANNEL_MIXERS, channel_mixer),
            )
            if registry.needs_grid(spec)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize the mixers whose parameters depend on the grid."""
        for name in self._grid_ops:
            getattr(self.branch.op, name).set_grid_size(grid_size)


_BOTH = {"token_mixer": "global_filter", "channel_mixer": "mlp", "norm": "layer", "norm_eps": 1e-6, "block": GFNetBlock}
_ISOTROPIC = _BOTH | {"patch_size": 16, "pos_embed": True, "final_norm_eps": 1e-6}
_HIERARCHICAL = _BOTH | {
    "pos_embed": (0,),
    "stem_kernel": 4,
    "stem_stride": 4,
    "stem_padding": 0,
    "down_kernel": 2,
    "down_padding": 0,
    "head": "linear",
    "head_norm": "layer",
    "head_norm_eps": 1e-6,
    "head_norm_first": True,
}

register_models(
    IsotropicMetaFormer,
    {
        "gfnet_ti": _ISOTROPIC | {"dim": 256, "depth": 12},
        "gfnet_xs": _ISOTROPIC | {"dim": 384, "depth": 12},
        "gfnet_s": _ISOTROPIC | {"dim": 384, "depth": 19},
        "gfnet_b": _ISOTROPIC | {"dim": 512, "depth": 19},
    },
    reduction=16,
    crop_pct=0.875,
    fixed_input_size=True,
)
register_models(
    MetaFormer,
    {
        "gfnet_h_ti": _HIERARCHICAL | {"depths": (3, 3, 10, 3), "dims": (64, 128, 256, 512), "layer_scale": 1e-3},
        "gfnet_h_s": _HIERARCHICAL | {"depths": (3, 3, 10, 3), "dims": (96, 192, 384, 768), "layer_scale": 1e-5},
        "gfnet_h_b": _HIERARCHICAL | {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768), "layer_scale": 1e-6},
    },
    crop_pct=0.875,
    fixed_input_size=True,
)
