"""Selective token mixing: a gated selective scan over the tokens, as in Mamba, VMamba and MambaMixer.

Papers: arXiv:2403.19888 (MambaMixer), arXiv:2312.00752 (Mamba), arXiv:2401.10166 (VMamba). Checked against
MzeroMiko/VMamba at 2ed52ea (its first block, forward type v0) and state-spaces/mamba at e9594ce.

    [u, z] = x W_in                                        x: (B, *grid, C), u, z: (B, *grid, E), no biases
    sequence:  y = scans(silu(conv(u)))                    causal depthwise convolution; one scan, or one each way
    image:     y = LayerNorm(scans(silu(conv(u))))         3 x 3 depthwise convolution; four scans, added up
    out = (y silu(z)) W_out

The four scans read an image by rows, by columns, and both backwards. Their projections do not depend on the order of
tokens and are taken once, on the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._layers import Linear, linear
from ._registry import register_mixer
from ._selection import SelectiveScans, SequenceScans


def _read(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """What four directions read, ``(B, L, 4, ...)``, of two maps ``(B, H, W, ...)`` for rows and two for columns."""
    forth, back = (x.flatten(1, 2) for x in rows)
    down, up = (x.transpose(1, 2).flatten(1, 2) for x in columns)
    return torch.stack([forth, down, back.flip(1), up.flip(1)], 2)


class CrossScans(nn.Module):
    """3 x 3 convolution, SiLU, four scans of an image, LayerNorm of their sum: ``(B, H, W, E) -> (B, H, W, E)``.

    Args:
        channels, states, dt_rank: see `SelectiveScans`. kernel_size: odd side of the convolution.
    """

    def __init__(self, channels: int, *, states: int, dt_rank: int, kernel_size: int, device=None, dtype=None):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, so that the map keeps its size; got {kernel_size}")
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, **dd)
        self.scans = SelectiveScans(4, channels, states=states, dt_rank=dt_rank, **dd)
        self.norm = nn.LayerNorm(channels, eps=1e-5, **dd)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            x = x * mask.unsqueeze(-1).to(x.dtype)
        u = F.silu(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)  # (B, H, W, E)
        grid = u.shape[1:3]
        projected = linear(u, self.scans.x_proj.flatten(0, 1)).unflatten(-1, self.scans.x_proj.shape[:2])
        forth, down, back, up = projected.unbind(3)  # 4 x (B, H, W, R + 2N)
        valid = None if mask is None else _read((mask, mask), (mask, mask))
        y = self.scans(_read((u, u), (u, u)), _read((forth, back), (down, up)), valid)
        forth, down, back, up = y.unbind(2)  # 4 x (B, L, E)
        y = (forth + back.flip(1)).unflatten(1, grid)
        y = y + (down + up.flip(1)).unflatten(1, (grid[1], grid[0])).transpose(1, 2)
        return self.norm(y)


@register_mixer("selective_token", ranks=(1, 2), extra_inputs=("mask",), paper="arXiv:2403.19888")
class SelectiveToken(nn.Module):
    """Gated selective scan of a sequence or an image.

    Args:
        dim: channels C.
        rank: 1, the block of Mamba, or 2, the first block of VMamba (SS2D v0).
        expand: inner width E over C.
        states: states N of a channel.
        dt_rank: width R that step sizes are projected through; None for C / 16, rounded up.
        kernel_size: of the convolution; None for 4 in sequences and 3 in images.
        bidirectional: scan sequences from the end too, with further parameters; otherwise a token sees those up to
            itself. Images are always read in four directions.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``, any grid; ``mask`` (B, *grid) is true at valid positions, and states
    pass the others unchanged.

    Raises:
        ValueError: an impossible size, or ``bidirectional`` for images.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        expand: float = 2.0,
        states: int = 16,
        dt_rank: int | None = None,
        kernel_size: int | None = None,
        bidirectional: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        inner = int(expand * dim)
        if inner < 1:
            raise ValueError(f"expand must leave a channel, got expand={expand} for {dim} channels")
        if rank == 2 and bidirectional:
            raise ValueError("bidirectional=True is for sequences; images are always read in four directions")
        dd = {"device": device, "dtype": dtype}
        sizes = {"states": states, "dt_rank": -(-dim // 16) if dt_rank is None else dt_rank}
        if rank == 1:
            kernel = 4 if kernel_size is None else kernel_size
            self.mix = SequenceScans(1 + bidirectional, inner, kernel_size=kernel, **sizes, **dd)
        else:
            self.mix = CrossScans(inner, kernel_size=3 if kernel_size is None else kernel_size, **sizes, **dd)
        self.in_proj = Linear(dim, 2 * inner, bias=False, **dd)
        self.out_proj = Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        return self.out_proj(self.mix(u, mask) * F.silu(z))
