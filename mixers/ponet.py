"""PoNet: global, segment and local pooling of the tokens, fused elementwise.

Paper: arXiv:2110.02442. Checked against lxchtan/PoNet at 8139037 (tag v1.0), and at cc9a29a for Long Range Arena.

    q, k, o, s, l = x Wq + bq, ..., x Wl + bl                   x: (B, N, C), G heads of width D in q and k
    g = mean of q over the valid tokens                         (B, C)
    a = softmax_n(g k_n / sqrt(D)) over them, for every head    (B, N, G)
    v = sum_n a_n k_n                                           (B, C)
    z_n = max of s over the segment of n                        (B, N, C), 0 at special tokens
    m_n = max(l_{n-1}, l_n, l_{n+1})                            (B, N, C), 0 at special tokens
    y_n = ((v + z_n) o_n + m_n) Wp + bp                         before Wp 0 at padding

All maxima are taken over valid tokens, and local ones over those that are not special; special tokens are separators
such as [CLS] and [SEP], which see nothing but the global vector. Cost is linear in N.

Neither q nor k is formed. The mean of q is the projection of the mean; g k_n is x_n times a matrix of C x G that g
gives, up to a constant that the softmax drops; and v projects the mean of x that a weighs. Of five projections three
are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._counting import Values, count, numel
from ._layers import Linear, is_symbolic
from ._registry import register_mixer
from ._tables import widen


@count("aten::scatter_reduce", column="other")
def _scatter_reduce(inputs: Values, outputs: Values) -> int:
    """One operation for every value that is reduced."""
    return numel(inputs[3])


def local_max(x: Tensor) -> Tensor:
    """Maximum of every token of ``(B, N, C)`` and its two neighbours."""
    padded = F.pad(x, (0, 0, 1, 1), value=-math.inf)  # (B, N + 2, C)
    return torch.maximum(torch.maximum(padded[:, :-2], padded[:, 2:]), x)


def block_max(x: Tensor, length: int) -> Tensor:
    """Maximum of every token of ``(B, N, C)`` over its block of ``length`` tokens; the last one may be shorter."""
    B, N, C = x.shape
    blocks = -(-N // length)
    padded = F.pad(x, (0, 0, 0, blocks * length - N), value=-math.inf)
    peaks = padded.reshape(B, blocks, length, C).amax(2, keepdim=True)  # (B, blocks, 1, C)
    return peaks.expand(-1, -1, length, -1).reshape(B, blocks * length, C)[:, :N]


def segment_max(x: Tensor, segments: Tensor, count: int) -> Tensor:
    """Maximum of every token of ``(B, N, C)`` over the tokens with its number.

    Args:
        segments: (B, N), from 0 to ``count`` - 1, in any order.
    """
    B, N, C = x.shape
    # one table for the batch: an index over rows alone takes the vectorised kernels
    rows = (segments + count * torch.arange(B, device=x.device).unsqueeze(1)).reshape(-1, 1)  # (B N, 1)
    table = x.new_full((B * count, C), -math.inf)
    table = table.scatter_reduce(0, rows.expand(-1, C), x.reshape(B * N, C), "amax")
    return table.index_select(0, rows.squeeze(1)).reshape(B, N, C)


@register_mixer("ponet", ranks=(1, 2), extra_inputs=("mask", "segments", "special"), paper="arXiv:2110.02442")
class PoNet(nn.Module):
    """((global + segment maximum) * o + local maximum), projected.

    Args:
        dim: channels C.
        rank: 1 or 2; tokens of an image are taken row by row.
        head_dim: width D of a head of the global attention; there are max(1, C // D) heads.
        num_segments: without given segments these are blocks of N // num_segments + 1 tokens, so rarely of that number.
        special_pooling: keep special tokens out of the local maxima, and leave them the global vector alone.
        proj: the output projection Wp.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``, any grid. ``mask`` (B, *grid) is true at valid tokens and false at
    padding, ``segments`` holds numbers from 0 in any order, ``special`` is true at special tokens.

    Raises:
        ValueError: heads of unequal width, or no segment.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        head_dim: int = 64,
        num_segments: int = 1,
        special_pooling: bool = True,
        proj: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if head_dim < 1 or dim % max(1, dim // head_dim):
            raise ValueError(f"head_dim must be positive and divide dim={dim}, not {head_dim}")
        if num_segments < 1:
            raise ValueError(f"num_segments must be at least 1, not {num_segments}")
        self.num_heads = max(1, dim // head_dim)
        self.num_segments = num_segments
        self.special_pooling = special_pooling
        self.q = Linear(dim, dim, **dd)
        self.k = Linear(dim, dim, **dd)
        self.o = Linear(dim, dim, **dd)
        self.segment = Linear(dim, dim, **dd)
        self.local = Linear(dim, dim, **dd)
        self.proj = Linear(dim, dim, **dd) if proj else nn.Identity()

    def attention(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weights a of the global vector, ``(B, N, G)``, for tokens ``(B, N, C)``."""
        G, C = self.num_heads, x.shape[-1]
        if mask is None:
            mean = x.mean(1)
        else:
            # a sample without a valid token has any finite mean; half precision may not hold the sum of a long one
            valid = mask.to(torch.promote_types(x.dtype, torch.float32))
            shares = (valid / valid.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)
            mean = torch.einsum("bn,bnc->bc", shares, x)
        g = self.q(mean).unflatten(1, (G, -1))  # (B, G, D)
        reads = torch.einsum("bgd,gdc->bcg", g, self.k.weight.unflatten(0, (G, -1)))
        scores = widen(torch.bmm(x, reads) * math.sqrt(G / C))  # (B, N, G)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(-1), torch.finfo(scores.dtype).min)
        return scores.softmax(1)

    def _global(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The vector v, ``(B, C)``."""
        weights = self.attention(x, mask).to(x.dtype)
        mixed = torch.bmm(weights.transpose(1, 2), x)  # (B, G, C)
        v = torch.einsum("bgc,gdc->bgd", mixed, self.k.weight.unflatten(0, (self.num_heads, -1)))
        return v.flatten(1) + self.k.bias

    def _segment_max(self, x: Tensor, mask: Tensor | None, segments: Tensor | None) -> Tensor:
        s = self.segment(x)
        N = x.shape[1]
        if segments is None:
            if mask is not None:
                s = s.masked_fill(~mask.unsqueeze(-1), torch.finfo(s.dtype).min)
            return block_max(s, N // self.num_segments + 1)
        # reading the largest number would stop the queue of an accelerator, and no graph can hold it
        count = N if is_symbolic(x) or not segments.is_cpu or N == 0 else int(segments.max()) + 1
        if mask is not None:
            # padding has a segment to itself, whatever its number
            segments, count = segments.masked_fill(~mask, count), count + 1
        return segment_max(s, segments, count)

    def _local_max(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        y = self.local(x)
        if hidden is not None:
            y = y.masked_fill(hidden.unsqueeze(-1), torch.finfo(y.dtype).min)
        return local_max(y)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, segments: Tensor | None = None, special: Tensor | None = None
    ) -> Tensor:
        tokens = x.flatten(1, -2)  # (B, N, C)
        mask, segments, special = (None if t is None else t.flatten(1) for t in (mask, segments, special))
        mask = None if mask is None else mask.bool()
        special = special.bool() if special is not None and self.special_pooling else None
        hidden = special if mask is None else ~mask if special is None else special | ~mask
        z = self._segment_max(tokens, mask, segments)
        m = self._local_max(tokens, hidden)
        if special is not None:
            z, m = (t.masked_fill(special.unsqueeze(-1), 0) for t in (z, m))
        v = self._global(tokens, mask).unsqueeze(1)
        y = torch.addcmul(m, v + z, self.o(tokens))  # (B, N, C)
        if mask is not None:
            y = y.masked_fill(~mask.unsqueeze(-1), 0)
        return self.proj(y).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, num_segments={self.num_segments}, special_pooling={self.special_pooling}"
