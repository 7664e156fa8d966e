"""The inception mixer: high frequencies by max-pooling and convolution, low ones by attention, side by side.

Paper: arXiv:2205.12956 (iFormer, Inception Transformer). Checked against sail-sg/iFormer at 725d8e7.

    x = [x1, x2, x3]                               c, c and L channels; L = low_heads head_dim, c = (C - L) / 2
    y1 = GELU(dw3x3(x1 W1))                        W1: c -> 2c
    y2 = GELU(maxpool3x3(x2) W2 + b2)              W2: c -> 2c
    y3 = up(attention(avgpool_p(x3)))              heads of width head_dim; up: nearest neighbour, by p
    Y = [y1, y2, y3];  y = (Y + dw3x3(Y)) Wo + bo

The share of low frequencies, L / C, grows with depth; ``low_heads`` sets it for a block. In a sequence windows have one
axis. A side that p does not divide is averaged over what is left and cut after the upsampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._conv_parts import ResidualDepthwise
from ._layers import Linear, activated
from ._registry import register_mixer


class LowFrequencyAttention(nn.Module):
    """Attention on a pooled map, without a projection behind it: ``(B, H, W, L) -> (B, H, W, L)``.

    Args:
        heads, head_dim: their product is L.
        pool: sides of the averaged windows, (1, 1) for none.
        attn_drop: dropout of the attention weights.
    """

    def __init__(self, heads: int, head_dim: int, pool: tuple[int, int], attn_drop: float, *, device=None, dtype=None):
        super().__init__()
        width = heads * head_dim
        self.heads, self.head_dim, self.pool, self.attn_drop = heads, head_dim, pool, attn_drop
        self.qkv = Linear(width, 3 * width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape
        if max(self.pool) > 1:
            pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.pool, self.pool, 0, True, False)  # ceil, no padding
            x = pooled.permute(0, 2, 3, 1)
        b, h, w = x.shape[0], x.shape[1], x.shape[2]
        qkv = self.qkv(x).reshape(b, h * w, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, G, N, D)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        y = y.transpose(1, 2).reshape(b, h, w, self.heads * self.head_dim)
        if max(self.pool) > 1:
            scale = tuple(float(p) for p in self.pool)
            y = F.interpolate(y.permute(0, 3, 1, 2), scale_factor=scale, mode="nearest").permute(0, 2, 3, 1)
            y = y[:, : size[1], : size[2]]
        return y


@register_mixer("inception", ranks=(1, 2), paper="arXiv:2205.12956")
class Inception(nn.Module):
    """Convolution, max-pooling and attention on slices of the channels.

    Args:
        dim: channels C.
        rank: 1 or 2.
        low_heads: heads of the attention path, the share of low frequencies; 0 < low_heads head_dim < C.
        head_dim: their width.
        pool_size: p, averaged and restored around the attention; 1 for none.
        qkv_bias is always on, as the authors have it.
        attn_drop, proj_drop: dropout of the attention weights and of the output.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``, any grid.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        low_heads: int = 1,
        head_dim: int | None = None,
        pool_size: int = 1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        head_dim = min(32, dim // 2) if head_dim is None else head_dim
        low = low_heads * head_dim
        if low_heads < 1 or head_dim < 1 or low >= dim or (dim - low) % 2:
            raise ValueError(
                f"low_heads * head_dim must be positive, below the {dim} channels, and leave an even number; "
                f"got {low_heads} * {head_dim}"
            )
        if pool_size < 1:
            raise ValueError(f"pool_size must be positive, not {pool_size}")
        dd = {"device": device, "dtype": dtype}
        half = (dim - low) // 2
        self.rank = rank
        self.widths = [half, half, low]
        self.conv_fc = Linear(half, 2 * half, bias=False, **dd)
        kernel, self.pad = ((1, 3), (0, 1)) if rank == 1 else ((3, 3), (1, 1))
        self.conv = nn.Conv2d(2 * half, 2 * half, kernel, padding=self.pad, groups=2 * half, bias=False, **dd)
        self.pool_fc = Linear(half, 2 * half, **dd)
        self.act = nn.GELU()
        self.kernel = kernel
        pool = (1, pool_size) if rank == 1 else (pool_size, pool_size)
        self.attention = LowFrequencyAttention(low_heads, head_dim, pool, attn_drop, **dd)
        self.fuse = ResidualDepthwise(4 * half + low, kernel=kernel, bias=False, **dd)
        self.proj = Linear(4 * half + low, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        if self.rank == 1:
            x = x.unsqueeze(1)  # an image of height one
        first, second, low = x.split(self.widths, -1)
        local = activated(self.conv_fc(first).permute(0, 3, 1, 2), self.conv, self.act)
        highest = F.max_pool2d(second.permute(0, 3, 1, 2), self.kernel, 1, self.pad).permute(0, 2, 3, 1)
        highest = activated(highest, self.pool_fc, self.act)
        y = torch.cat([local.permute(0, 2, 3, 1), highest, self.attention(low)], -1)
        y = self.proj_drop(self.proj(self.fuse(y)))
        return y.squeeze(1) if self.rank == 1 else y
