"""Multi-head self-attention over all positions of the grid.

Papers: arXiv:2111.11418 (v1 ablations), arXiv:2210.13452 (CAFormer). Checked against sail-sg/poolformer at a075575 and
sail-sg/metaformer at 64c534a.

    [q, k, v] = x Wqkv
    y = softmax(q k^T / sqrt(D)) v Wproj        x, y: (B, *grid, C), G heads of width D = head_dim, inner width G D

No position encoding and no norm of q or k. Padding, where a mask tells it, gets no weight. The softmax runs inside
`scaled_dot_product_attention`, which keeps its statistics in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._layers import Linear
from ._registry import register_mixer


@register_mixer("attention", ranks=(1, 2, 3), extra_inputs=("mask",), paper="arXiv:1706.03762")
class Attention(nn.Module):
    """Self-attention with heads of fixed width.

    Args:
        dim: channels C.
        head_dim: head width D; there are max(1, C // D) heads, so the inner width may differ from C.
        qkv_bias, proj_bias: biases of the two linear layers.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
        separate_q: one linear layer for q and one for k and v, as some authors have it, rather than one for all.
        separate_qkv: a linear layer for each of the three.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``, any grid; ``mask`` (B, *grid) is true at valid positions.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        head_dim: int = 32,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        separate_q: bool = False,
        separate_qkv: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if head_dim < 1:
            raise ValueError(f"head_dim must be positive, not {head_dim}")
        if separate_q and separate_qkv:
            raise ValueError("give separate_q or separate_qkv, not both")
        dd = {"device": device, "dtype": dtype}
        self.head_dim = head_dim
        self.num_heads = max(1, dim // head_dim)
        inner = self.num_heads * head_dim
        self.attn_drop = attn_drop

        def linear(parts: int, there: bool) -> Linear | None:
            return Linear(dim, parts * inner, bias=qkv_bias, **dd) if there else None

        self.qkv = linear(3, not (separate_q or separate_qkv))
        self.q = linear(1, separate_q or separate_qkv)
        self.kv = linear(2, separate_q)
        self.k = linear(1, separate_qkv)
        self.v = linear(1, separate_qkv)
        self.proj = Linear(inner, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def _projected(self, tokens: Tensor) -> Tensor:
        """q, k and v beside each other, ``(B, N, 3 G D)``."""
        if self.qkv is not None:
            return self.qkv(tokens)
        if self.kv is not None:
            return torch.cat([self.q(tokens), self.kv(tokens)], -1)
        return torch.cat([self.q(tokens), self.k(tokens), self.v(tokens)], -1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = x.flatten(1, -2)  # (B, N, C)
        B, N, _ = tokens.shape
        qkv = self._projected(tokens)
        qkv = qkv.reshape(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, G, N, D)
        drop = self.attn_drop if self.training else 0.0
        valid = None if mask is None else mask.flatten(1).bool()[:, None, None]  # (B, 1, 1, N)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=valid, dropout_p=drop)
        y = y.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim)
        return self.proj_drop(self.proj(y)).reshape(x.shape)
