"""Selective channel mixing: a gated selective scan over the channels of every token, in both directions.

Paper: arXiv:2403.19888 (MambaMixer), which published no code; what it leaves open is decided here.

    [u, z] = x W_in                                    x: (B, *grid, C), u, z: (B, *grid, E), no biases
    v = u as a sequence of E / P elements of P neighbouring channels
    y = LayerNorm(scans(silu(conv(v))))                causal depthwise convolution and scan from either end, added up
    out = (y silu(z)) W_out

No weight sees the grid, so that any resolution goes; tokens do not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._layers import Linear
from ._registry import register_channel_mixer
from ._selection import SequenceScans


@register_channel_mixer("selective_channel", ranks=(1, 2, 3), paper="arXiv:2403.19888")
class SelectiveChannel(nn.Module):
    """Gated selective scan over groups of channels.

    Args:
        dim: channels C.
        expand: inner width E over C.
        group: channels P of an element of the sequence; 1 scans every channel by itself.
        states: states N of a channel.
        dt_rank: width R that step sizes are projected through.
        kernel_size: of the convolution.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``, any grid.

    Raises:
        ValueError: an impossible size, or groups that do not divide E.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        expand: float = 2.0,
        group: int = 16,
        states: int = 16,
        dt_rank: int = 1,
        kernel_size: int = 4,
        device=None,
        dtype=None,
    ):
        super().__init__()
        inner = int(expand * dim)
        if group < 1 or inner < 1 or inner % group:
            raise ValueError(f"group must divide the inner width {inner} = {expand} * {dim}, got group={group}")
        dd = {"device": device, "dtype": dtype}
        self.group = group
        self.in_proj = Linear(dim, 2 * inner, bias=False, **dd)
        self.mix = SequenceScans(2, group, states=states, dt_rank=dt_rank, kernel_size=kernel_size, **dd)
        self.norm = nn.LayerNorm(inner, eps=1e-5, **dd)
        self.out_proj = Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)  # (B, *grid, E)
        v = u.reshape(-1, u.shape[-1] // self.group, self.group)  # (tokens, E / P, P)
        y = self.norm(self.mix(v).reshape(u.shape))
        return self.out_proj(y * F.silu(z))
