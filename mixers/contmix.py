"""ContMix: dynamic convolution whose kernels are mixed from the affinities of every position to the whole context.

Paper: arXiv:2502.20087 (OverLoCK). Checked against LMMMEng/OverLoCK at 2c8ab3b.

    q = BN(x Wq) s,  k = BN(pool_7(ctx) Wk)              C/2 channels in G heads; pool_7: averages of 7 x 7 regions
    P_S, P_K = softmax(q k^T Wp^T + bp + rpb)            kernels of S^2 and K^2 taps for every position and head
    u = BN(x Wv);  o = [P_S * u_1, P_K * u_2]            halves of the channels; * over windows, see `_neighborhood`
    y = BN(g o') Wo + bo,  o' = SE(BN(o Wf) + BN(D(x))),  g = SiLU(BN(x Wg))        D: `large_kernel_conv` with kernel K

The affinities to the regions are never written down: with M = k^T Wp^T the logits are q M, and M has C/(2G) rows. s is
(C/G)^-1/2, though a head has half as many channels; the authors' weights expect it. The softmax is taken in float32.

Without a context of its own, ctx is x: the mixer's kernels are then made of the feature they are applied to, pooled, as
in the authors' stand-alone block. In a sequence windows, regions and kernels have one axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor

from ._conv_parts import LinearNorm, SqueezeExcitation
from ._layers import Linear
from ._neighborhood import window_starts
from ._neighborhood_mixing import neighborhood_mix
from ._registry import register_mixer
from .large_kernel_conv import DilatedConv

# regions of the context on each axis
_REGIONS = 7


def enlarged(grid: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
    """Grid that features are resized to so that it holds a window; the same if it does.

    In floating point, as the authors compute it: the result may differ by one from integer arithmetic.
    """
    h, w = grid
    if h >= kernel[0] and w >= kernel[1]:
        return h, w
    if kernel[0] == 1:
        return 1, kernel[1]
    k = kernel[0]
    return (k, int(k / h * w)) if h < w else (int(k / w * h), k)


class RelativeBias(nn.Module):
    """A bias for every displacement between a position and a key of its window.

    The table has ``(G, 2 k_h - 1, 2 k_w - 1)`` entries and does not depend on the grid.
    """

    def __init__(self, heads: int, kernel: tuple[int, int], *, device=None, dtype=None):
        super().__init__()
        self.kernel = kernel
        self.table = nn.Parameter(torch.empty(heads, *(2 * k - 1 for k in kernel), device=device, dtype=dtype))
        if not self.table.is_meta:
            trunc_normal_(self.table, std=0.02)

    def forward(self, h: int, w: int) -> Tensor:
        """Biases of a grid: ``(G, H W, k_h k_w)``."""
        table = self.table
        windows = table.unfold(1, self.kernel[0], 1).unfold(2, self.kernel[1], 1)  # (G, k, k, k, k)
        for axis, (length, k) in enumerate(zip((h, w), self.kernel, strict=True), start=1):
            # displacement of a window's first key, counted from the smallest one
            first = window_starts(length, k, table.device) - torch.arange(length, device=table.device) + k - 1
            windows = windows.index_select(axis, first)
        return windows.flatten(3).flatten(1, 2)


@register_notrace_module
class DynamicKernels(nn.Module):
    """Kernels made of a query and a context map, applied to a value map.

    Args:
        dim: channels C of the values.
        query_dim, context_dim: channels of the other two maps.
        kernels: sides of the small and of the large kernel.
        heads: G, for each of the two; 2 G divides C.

    Shapes: ``(B, H, W, Cq), (B, H', W', Cc), (B, H, W, C) -> (B, H, W, C)``. Queries, contexts and values are resized
    bilinearly where the grid does not hold the large kernel, and results are averaged back.
    """

    def __init__(
        self,
        dim: int,
        query_dim: int,
        context_dim: int,
        *,
        kernels: tuple[tuple[int, int], tuple[int, int]],
        heads: int,
        value: nn.Module,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads, self.kernels = heads, kernels
        self.scale = (dim // heads) ** -0.5
        self.taps = [h * w for h, w in kernels]
        self.regions = tuple(_REGIONS if k > 1 else 1 for k in kernels[1])
        self.query = LinearNorm(query_dim, dim // 2, **dd)
        self.key = LinearNorm(context_dim, dim // 2, **dd)
        self.value = value
        self.kernel_proj = Linear(self.regions[0] * self.regions[1], sum(self.taps), **dd)
        self.bias = nn.ModuleList(RelativeBias(heads, kernel, **dd) for kernel in kernels)

    def forward(self, query: Tensor, context: Tensor, value: Tensor) -> Tensor:
        grid = query.shape[1:3]
        size = enlarged(tuple(grid), self.kernels[1])
        resize = size != tuple(grid)
        if resize:
            query, context, value = (_resized(x, size) for x in (query, context, value))
        mixed = self._mix(query, context, self.value(value))
        if resize:
            mixed = F.adaptive_avg_pool2d(mixed.permute(0, 3, 1, 2), tuple(grid)).permute(0, 2, 3, 1)
        return mixed

    def _mix(self, query: Tensor, context: Tensor, value: Tensor) -> Tensor:
        (B, h, w, C), G = value.shape, self.heads
        q = (self.query(query) * self.scale).reshape(B, h * w, G, C // (2 * G))  # (B, N, G, D)
        pooled = F.adaptive_avg_pool2d(context.permute(0, 3, 1, 2), self.regions).permute(0, 2, 3, 1)
        k = self.key(pooled).flatten(1, 2).unflatten(-1, (G, C // (2 * G))).permute(0, 2, 3, 1)  # (B, G, D, 49)
        v = value.reshape(B, h, w, 2, G, C // (2 * G))
        weights, biases = (p.split(self.taps) for p in (self.kernel_proj.weight, self.kernel_proj.bias))
        mixed = [
            neighborhood_mix(q, F.linear(k, weights[i]), self.bias[i](h, w) + biases[i], v[:, :, :, i], kernel)
            for i, kernel in enumerate(self.kernels)
        ]  # 2 x (B, H, W, G, D)
        return torch.stack(mixed, 3).flatten(3)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="bilinear").permute(0, 2, 3, 1)


class GatedContextMixing(nn.Module):
    """`DynamicKernels` beside a large convolution, gated, with the projections around them.

    Args:
        dim: channels C of the values, the local map and the gate.
        out_dim: channels of the result.
        query_dim, context_dim: channels of these maps.
        rank: 2, or 1 for maps of height one.
        kernel_size, small_kernel_size: K and S.
        num_heads: half of G, as the authors count: 4 num_heads divides C.
        project_value: values are made from the value map by a linear layer and batch norm, or are that map.
        deploy: see `large_kernel_conv`.

    Shapes: ``(B, H, W, Cq), (B, H', W', Cc), (B, H, W, C) -> (B, H, W, out_dim)``
    """

    folds = (("lepe.conv", "lepe_norm"),)
    folds_ahead = (("norm", "proj"),)

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        query_dim: int,
        context_dim: int,
        rank: int = 2,
        kernel_size: int = 7,
        small_kernel_size: int = 5,
        num_heads: int = 2,
        project_value: bool = False,
        deploy: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_heads < 1 or dim % (4 * num_heads):
            raise ValueError(f"4 num_heads must divide the {dim} channels, got num_heads={num_heads}")
        if not 1 <= small_kernel_size <= kernel_size:
            raise ValueError(f"small_kernel_size must be 1 to kernel_size={kernel_size}, got {small_kernel_size}")
        dd = {"device": device, "dtype": dtype}
        small, large = ((1, k) if rank == 1 else (k, k) for k in (small_kernel_size, kernel_size))
        self.lepe = DilatedConv(dim, large, deploy=deploy, **dd)
        self.lepe_norm = nn.BatchNorm2d(dim, **dd)
        self.gate = LinearNorm(dim, dim, **dd)
        value = LinearNorm(dim, dim, **dd) if project_value else nn.Identity()
        own = {"kernels": (small, large), "heads": 2 * num_heads, "value": value}
        self.kernels = DynamicKernels(dim, query_dim, context_dim, **own, **dd)
        self.fuse = LinearNorm(dim, dim, **dd)
        self.se = SqueezeExcitation(dim, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.proj = Linear(dim, out_dim, **dd)

    def forward(self, query: Tensor, context: Tensor, value: Tensor) -> Tensor:
        local = self.lepe_norm(self.lepe(value.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        mixed = self.se(self.fuse(self.kernels(query, context, value)) + local)
        gated = F.silu(self.gate(value)) * mixed
        return self.proj(self.norm(gated.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@register_mixer("contmix", ranks=(1, 2), extra_inputs=("context",), paper="arXiv:2502.20087")
class ContMix(nn.Module):
    """Context-mixing dynamic convolution.

    Args:
        dim: channels C.
        rank: 1 or 2.
        kernel_size, small_kernel_size: sides K and S of the dynamic kernels; K is one of `large_kernel_conv`.
        num_heads: half of the number G of heads, as the authors count: 4 num_heads divides C.
        context_dim: channels of the context, C if None.
        deploy: have the large convolution folded, see `large_kernel_conv`.

    Shapes: ``x`` ``(B, *grid, C) -> (B, *grid, C)``, any grid; ``context`` ``(B, *grid', context_dim)``, without it
    ``x`` is its own context.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        kernel_size: int = 7,
        small_kernel_size: int = 5,
        num_heads: int = 2,
        context_dim: int | None = None,
        deploy: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.rank = rank
        self.mix = GatedContextMixing(
            dim,
            dim,
            query_dim=dim,
            context_dim=dim if context_dim is None else context_dim,
            rank=rank,
            kernel_size=kernel_size,
            small_kernel_size=small_kernel_size,
            num_heads=num_heads,
            project_value=True,
            deploy=deploy,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        if self.rank == 1:
            x, context = x.unsqueeze(1), context.unsqueeze(1)
        y = self.mix(x, context, x)
        return y.squeeze(1) if self.rank == 1 else y
