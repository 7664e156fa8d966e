"""Average pooling as a token mixer.

Papers: arXiv:2111.11418 (PoolFormer), arXiv:2210.13452 (PoolFormerV2). Checked against sail-sg/poolformer at a075575.

    y = P(x) - x        x, y: (B, *grid, C)

P averages the k^rank neighbourhood at stride 1. The divisor counts positions inside the map only, so P keeps
constants and y is zero on them: a bias just before this mixer has no effect. Padding, where a mask tells it, counts as
outside of the map, and y is zero there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._registry import register_mixer


@register_mixer("pooling", ranks=(1, 2, 3), extra_inputs=("mask",), paper="arXiv:2111.11418")
class Pooling(nn.Module):
    """P(x) - x with an average over ``pool_size`` positions along every axis of the grid.

    Args:
        dim: channels; the mixer has no parameters.
        rank: 1, 2 or 3.
        pool_size: odd number of positions.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``; ``mask`` (B, *grid) is true at valid positions.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        pool_size: int = 3,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if pool_size < 1 or pool_size % 2 == 0:
            raise ValueError(f"pool_size must be odd and positive, so that the map keeps its size; got {pool_size}")
        self.rank = rank
        self.pool_size = pool_size

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return self._mean(x) - x
        valid = mask.unsqueeze(-1).to(x.dtype)  # (B, *grid, 1)
        # the divisors of both means are the same and cancel; a valid position has itself in its window
        share = self._mean(valid).clamp(min=torch.finfo(x.dtype).tiny)
        return torch.where(valid.bool(), self._mean(x * valid) / share - x, 0)

    def _mean(self, x: Tensor) -> Tensor:
        """P(x), over all positions inside the map."""
        k, pad = self.pool_size, self.pool_size // 2
        if self.rank == 1:
            # as an image of width 1, since the channels-last kernel exists for images alone
            view = x.unsqueeze(2).permute(0, 3, 1, 2)  # (B, C, N, 1)
            pooled = F.avg_pool2d(view, (k, 1), 1, (pad, 0), count_include_pad=False)
            return pooled.permute(0, 2, 3, 1).squeeze(2)
        if self.rank == 2:
            pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), k, 1, pad, count_include_pad=False)
            return pooled.permute(0, 2, 3, 1)
        # means over valid positions factor over the axes, and the 3-D kernel lacks bfloat16 and maps smaller than k
        planes = x.flatten(0, 1).permute(0, 3, 1, 2)  # (B D, C, H, W)
        pooled = F.avg_pool2d(planes, k, 1, pad, count_include_pad=False).permute(0, 2, 3, 1)
        columns = pooled.reshape(x.shape).flatten(2, 3).permute(0, 3, 1, 2)  # (B, C, D, H W)
        pooled = F.avg_pool2d(columns, (k, 1), 1, (pad, 0), count_include_pad=False)
        return pooled.permute(0, 2, 3, 1).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"pool_size={self.pool_size}, rank={self.rank}"
