"""Depthwise convolution with a large kernel that is trained as several smaller and dilated ones.

Papers: arXiv:2311.15599 (UniRepLKNet), arXiv:2502.20087 (OverLoCK). Checked against LMMMEng/OverLoCK at 2c8ab3b.

    y = BN(w * x) + sum_i BN_i(w_i *_{r_i} x)        x, y: (B, *grid, C); w: K^rank taps, w_i: k_i^rank taps r_i apart

Convolutions are linear and, with running statistics, so is the batch norm: the sum is one convolution with a bias. It
is computed as one in eval mode; `mixzoo.reparameterize` makes it one for good. In training the branches differ by their
batch statistics and run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor

from ._conv_parts import batch_norm
from ._depthwise import depthwise_conv, make_depthwise
from ._registry import register_mixer

# kernel size: (k_i, r_i) of the branches beside the large kernel
BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def fold_norm(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm with its running statistics, in float32 or wider."""
    wide = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.to(wide)
    shift = -norm.running_mean.to(wide) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.to(wide)


def _spread(weight: Tensor, steps: Sequence[int], sides: Sequence[int]) -> Tensor:
    """Taps of ``(C, 1, *k)`` put ``steps`` apart in the middle of kernels of the given sides."""
    for axis, (step, side) in enumerate(zip(steps, sides, strict=True), start=2):
        if step > 1:
            gaps = F.pad(weight.unsqueeze(axis + 1), [0, 0] * (weight.ndim - axis - 1) + [0, step - 1])
            weight = gaps.flatten(axis, axis + 1).narrow(axis, 0, (weight.shape[axis] - 1) * step + 1)
        edge = (side - weight.shape[axis]) // 2
        weight = F.pad(weight, [0, 0] * (weight.ndim - axis - 1) + [edge, edge])
    return weight


class DilatedBranch(nn.Module):
    """Depthwise convolution with dilation and batch norm: ``(B, C, *grid) -> (B, C, *grid)``."""

    def __init__(self, dim: int, kernel: Sequence[int], dilation: Sequence[int], *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = make_depthwise(dim, kernel, dilation=dilation, bias=False, **dd)
        self.norm = batch_norm(len(kernel), dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@register_notrace_module
class DilatedConv(nn.Module):
    """A large depthwise kernel and its dilated branches, see the module's docstring.

    Args:
        dim: channels C.
        kernel: sides of the large kernel, one for each axis: K or, on an axis of length one, 1.
        deploy: the one convolution that the branches fold to.

    Shapes: ``(B, C, *grid) -> (B, C, *grid)``.
    """

    def __init__(self, dim: int, kernel: Sequence[int], *, deploy: bool = False, device=None, dtype=None):
        super().__init__()
        size = max(kernel)
        if size not in BRANCHES or any(k not in (1, size) for k in kernel):
            raise ValueError(f"kernel_size must be one of {', '.join(map(str, BRANCHES))}, got {size}")
        dd = {"device": device, "dtype": dtype}
        rank = len(kernel)
        self.conv = make_depthwise(dim, kernel, bias=deploy, **dd)
        if deploy:
            self.norm, self.branches = nn.Identity(), nn.ModuleDict()
            return
        self.norm = batch_norm(rank, dim, **dd)
        sides = {
            f"k{k}_{r}": [(k, r) if side > 1 else (1, 1) for side in kernel] for k, r in BRANCHES[size]
        }  # (k, r) of every axis
        self.branches = nn.ModuleDict(
            {name: DilatedBranch(dim, *zip(*axes, strict=True), **dd) for name, axes in sides.items()}
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.branches:
            return self.conv(x)
        if self.training:
            y = self.norm(self.conv(x))
            for branch in self.branches.values():
                y += branch(x)  # no norm keeps its result
            return y
        weight, bias = self.folded()
        return depthwise_conv(x, weight, bias, self.conv.padding)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias of the one convolution that all branches make with running statistics."""
        dtype, sides = self.conv.weight.dtype, self.conv.kernel_size
        kernel = bias = 0
        for conv, norm in ((self.conv, self.norm), *((b.conv, b.norm) for b in self.branches.values())):
            scale, shift = fold_norm(norm)
            scaled = conv.weight * scale.reshape(-1, *[1] * (conv.weight.ndim - 1))
            kernel, bias = kernel + _spread(scaled, conv.dilation, sides), bias + shift
        return kernel.to(dtype), bias.to(dtype)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Become the one convolution, in place; nothing happens where there is one already."""
        if not self.branches:
            return
        weight, bias = self.folded()
        self.conv.weight = nn.Parameter(weight, requires_grad=self.conv.weight.requires_grad)
        self.conv.bias = nn.Parameter(bias, requires_grad=self.conv.weight.requires_grad)
        self.norm, self.branches = nn.Identity(), nn.ModuleDict()


@register_mixer("large_kernel_conv", ranks=(1, 2, 3), paper="arXiv:2502.20087")
class LargeKernelConv(nn.Module):
    """Depthwise convolution with a large kernel, trained as several.

    Args:
        dim: channels C.
        rank: 1, 2 or 3.
        kernel_size: side K of the kernel: 5, 7, 9, 11, 13, 15, 17 or 19.
        deploy: have the one convolution that the branches fold to, for weights that were folded.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``, any grid.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        kernel_size: int = 7,
        deploy: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.conv = DilatedConv(dim, (kernel_size,) * rank, deploy=deploy, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.movedim(-1, 1)).movedim(1, -1)
