"""ViM2: vision MambaMixer, selective token and channel mixing with learned combinations of earlier features.

Paper: arXiv:2403.19888, a preliminary version ("results might change"), which published neither code nor weights. What
it leaves open is decided here, so that a model of its tables can be built, not one of its checkpoints loaded.

    unit:   token branch, token branch, channel branch            each x + mixer(LayerNorm(x)), on a map (B, H, W, C)
    stage:  a chain of units, in which each branch takes a learned combination of all results so far

Table 8 of the paper has two token layers for a channel layer in every stage. The token mixer is VMamba's first block,
with which the paper compares itself. The channel mixer scans groups of 16 channels of a token. Patches of 4 and a norm
enter the model, merged patches of 2 x 2 enter later stages; norm, mean and classifier end it.

Without the classifier ViM2-S and B have 42.9 and 74.6 M parameters where the paper, which counts so, prints 43 and 74.
ViM2-T has 23.3 M where it prints 20: T and S differ by token and channel layers of width 384 alone, and no layers that
explain 43 M leave 20 M for T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..mixers import CHANNEL_MIXERS, TOKEN_MIXERS
from ..mixers._layers import Linear, make_norm
from ._averaging import Chain
from ._registry import register_models
from .block import make_branch
from .metaformer import MetaFormer


class PatchMerging(nn.Module):
    """2 x 2 positions side by side, norm, linear layer without bias: ``(B, C, H, W) -> (B, C', H / 2, W / 2)``.

    Odd sides get a row or column of zeros, so that they are halved and rounded up, as by a convolution of kernel 1.

    Args:
        in_chans, out_chans: C, C'.
        kernel, stride, padding: 1, 2, 0.
        norm, norm_eps: of the 4 C channels, see `make_norm`.
        norm_first: true.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel: int = 1,
        stride: int = 2,
        padding: int = 0,
        *,
        norm: str | None = "layer",
        norm_eps: float = 1e-5,
        norm_first: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if (kernel, stride, padding, norm_first) != (1, 2, 0, True):
            given = f"kernel={kernel}, stride={stride}, padding={padding}, norm_first={norm_first}"
            raise ValueError(f"patch merging has kernel=1, stride=2, padding=0, norm_first=True; got {given}")
        self.norm = make_norm(norm, 4 * in_chans, eps=norm_eps, device=device, dtype=dtype)
        self.reduction = Linear(4 * in_chans, out_chans, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        quarters = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = self.reduction(self.norm(torch.cat(quarters, -1)))  # (B, H / 2, W / 2, C')
        return x.permute(0, 3, 1, 2)


class MambaMixerBlock(nn.Module):
    """Two token branches, then a channel branch, pre-norm.

    Args:
        dim, token_mixer, channel_mixer, grid_size, norm, norm_eps, layer_scale, res_scale, drop_path: see
            `MetaFormerBlock`; both token branches have the same mixer.

    Shapes: ``(B, H, W, C) -> (B, H, W, C)``; in a ``chain`` its branches take what that gives them.
    """

    def __init__(
        self,
        dim: int,
        *,
        token_mixer: Any = "selective_token",
        channel_mixer: Any = "selective_channel",
        grid_size: Sequence[int] | None = None,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        layer_scale: float | None = None,
        res_scale: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        common = {"grid_size": grid_size, "norm": norm, "norm_eps": norm_eps, "layer_scale": layer_scale}
        common |= {"res_scale": res_scale, "drop_path": drop_path, "device": device, "dtype": dtype}
        self.first = make_branch(TOKEN_MIXERS, token_mixer, dim, **common)
        self.second = make_branch(TOKEN_MIXERS, token_mixer, dim, **common)
        self.channel = make_branch(CHANNEL_MIXERS, channel_mixer, dim, **common)
        tokens = ("first", "second") if TOKEN_MIXERS.needs_grid(token_mixer) else ()
        self._grid_ops = (*tokens, *(("channel",) if CHANNEL_MIXERS.needs_grid(channel_mixer) else ()))

    @property
    def branches(self) -> tuple[tuple[str, nn.Module], ...]:
        """The kind of every branch, "token" or "channel", and the branch, in order."""
        return ("token", self.first), ("token", self.second), ("channel", self.channel)

    def forward(self, x: Tensor, chain: Chain | None = None) -> Tensor:
        if chain is not None:
            return chain.run(self.branches)
        return self.channel(self.second(self.first(x)))

    @torch.jit.ignore
    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize the mixers whose parameters depend on the grid."""
        for name in self._grid_ops:
            getattr(self, name).op.set_grid_size(grid_size)


_WIDE, _NARROW = (("selective_channel", {"expand": expand, "group": 16}) for expand in (2.0, 1.0))

# depths are in units of three branches
_VIM2 = {
    "token_mixer": "selective_token",
    "channel_mixer": [_WIDE, _WIDE, _WIDE, _NARROW],
    "block": MambaMixerBlock,
    "weighted_average": True,
    "norm": "layer",
    "norm_eps": 1e-5,
    "stem_kernel": 4,
    "stem_stride": 4,
    "stem_padding": 0,
    "stem_norm": "post",
    "downsampling": PatchMerging,
    "down_norm": "pre",
    "down_norm_kind": "layer",
    "down_norm_eps": 1e-5,
    "down_kernel": 1,
    "down_padding": 0,
    "head_norm": "layer",
    "head_norm_eps": 1e-5,
    "head_norm_first": True,
}

register_models(
    MetaFormer,
    {
        "vim2_t": _VIM2 | {"depths": (1, 1, 3, 1), "dims": (96, 192, 384, 768)},
        "vim2_s": _VIM2 | {"depths": (1, 1, 9, 1), "dims": (96, 192, 384, 768)},
        "vim2_b": _VIM2 | {"depths": (1, 1, 9, 1), "dims": (128, 256, 512, 1024)},
    },
    crop_pct=0.875,
    note="no code or weights were published",
)
