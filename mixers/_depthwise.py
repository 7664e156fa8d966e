"""Depthwise convolutions of channels-last maps, with the CPU kernels that oneDNN has but does not choose by itself.

    y_c = k_c * x_c + b_c,  one kernel for every channel; zero padding

For the gradient of the kernel oneDNN has a depthwise routine up to three columns; wider kernels go through the dense
one, which pads every channel to a block of 16 x 16 (50 MB of scratch for 1024 kernels of 7 x 7). Three columns at a
time the wide ones take the fast routine too, 3 to 20 times faster. Sequences are maps of one row: as such their memory
is seen to be channels-last, which that of `torch.nn.functional.conv1d` is not (1.0 against 31 ms for 2 x 4096 tokens of
768 channels and three taps).

Dilated kernels have no depthwise routine for their gradients, nor, with more than six columns of zeros beside the map,
for the convolution itself. Taps r apart see every r-th row and column only: taken as maps of their own these need no
dilation (4 x 56 x 56 positions of 56 channels, 9 x 9 taps 2 apart: forward 12 against 1.5 ms, backward 24 against 10).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._layers import is_symbolic, recorded_on_cpu

_CONVS = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}
# columns of a kernel whose gradient oneDNN has a depthwise routine for, and columns of zeros beside dilated kernels
_COLUMNS, _ZEROS = 3, 6


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int], groups: int, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, kernel and bias of a 2-D convolution without stride and dilation, those that are wanted."""
    ones = [1, 1]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], ones, padding, ones, False, [0, 0], groups, wanted
    )


def _kernel_gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    """Gradient of a kernel ``(C, 1, k, l)``, by groups of columns, each that of a narrow kernel over a shifted map."""
    rows, columns = padding
    if weight.shape[-1] <= _COLUMNS:
        return convolution_backward(grad, x, weight, padding, len(weight), [False, True, False])[1]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, columns, columns))  # (B, H, W + 2p, C)
    parts = []
    for j, part in enumerate(weight.split(_COLUMNS, -1)):
        seen = padded.narrow(2, j * _COLUMNS, grad.shape[-1] + part.shape[-1] - 1)
        shifted = seen.contiguous().permute(0, 3, 1, 2)
        parts.append(convolution_backward(grad, shifted, part, [rows, 0], len(weight), [False, True, False])[1])
    return torch.cat(parts, -1)


def _apart(x: Tensor, steps: Sequence[int]) -> Tensor:
    """Maps of every r-th row and s-th column, ``(B, C, H, W) -> (r s B, C, H / r, W / s)``, rounded up with zeros."""
    (h, w), (r, s) = x.shape[2:], steps
    x = x.permute(0, 2, 3, 1)
    if h % r or w % s:
        x = F.pad(x, (0, 0, 0, -w % s, 0, -h % r))
    x = x.unflatten(2, (-1, s)).unflatten(1, (-1, r)).permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
    return x.permute(0, 3, 1, 2)


def _together(x: Tensor, steps: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The inverse of `_apart` for a grid ``(H, W)``."""
    (r, s), (_, c, h, w) = steps, x.shape
    x = x.permute(0, 2, 3, 1).reshape(r, s, -1, h, w, c).permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)
    return x[:, : grid[0], : grid[1]].permute(0, 3, 1, 2)


def _keeps_grid(weight: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether rows and columns apart are the same of input and output."""
    return all(2 * p == r * (k - 1) for p, r, k in zip(padding, dilation, weight.shape[2:], strict=True))


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    apart = x.is_cpu and dilation[-1] > 1 and padding[-1] > _ZEROS and _keeps_grid(weight, padding, dilation)
    if not apart:
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])
    halves = [k // 2 for k in weight.shape[2:]]
    y = F.conv2d(_apart(x, dilation), weight, bias, padding=halves, groups=weight.shape[0])
    return _together(y, dilation, x.shape[2:])


class _DepthwiseConv(torch.autograd.Function):
    """A 2-D depthwise convolution, with the gradients of rows and columns ``dilation`` apart, the kernel's by groups of
    columns. A dilated one keeps the grid.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], dilation: Sequence[int]
    ) -> Tensor:
        return _convolve(x, weight, bias, padding, dilation)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _, ctx.padding, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        db = grad.sum((0, 2, 3)) if needs_bias else None
        grid, dilated = x.shape[2:], max(ctx.dilation) > 1
        if dilated:
            grad, x = _apart(grad, ctx.dilation), _apart(x, ctx.dilation)
        padding = [p // r for p, r in zip(ctx.padding, ctx.dilation, strict=True)]
        dx = None
        if needs_x:
            dx = convolution_backward(grad, x, weight, padding, len(weight), [True, False, False])[0]
            dx = _together(dx, ctx.dilation, grid) if dilated else dx
        dw = _kernel_gradient(grad, x, weight, padding) if needs_weight else None
        return dx, dw, db, None, None


def _has_slow_gradients(x: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether `_DepthwiseConv` has the gradients of this convolution sooner."""
    if not recorded_on_cpu(x) or not weight.requires_grad or not x.dtype == weight.dtype == torch.float32:
        return False
    return weight.shape[-1] > _COLUMNS if max(dilation) == 1 else _keeps_grid(weight, padding, dilation)


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], dilation: Sequence[int] | None = None
) -> Tensor:
    """Depthwise convolution of stride one.

    Args:
        x: ``(B, C, *grid)``; fast where a view of channels-last memory.
        weight: ``(C, 1, *kernel)``.
        bias: (C,) or None.
        padding: zeros before and behind each axis of the grid.
        dilation: distance of the taps on each axis, one by default.

    Returns:
        ``(B, C, *grid')``, where the side n is n + 2 padding - dilation (kernel - 1).
    """
    rank = len(padding)
    dilation = (1,) * rank if dilation is None else tuple(dilation)
    if is_symbolic(x) or rank == 3 or x.numel() == 0:
        return _CONVS[rank][1](x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])
    if rank == 1:
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        return depthwise_conv(x, weight, bias, (0, *padding), (1, *dilation)).squeeze(2)
    if _has_slow_gradients(x, weight, padding, dilation):
        return _DepthwiseConv.apply(x, weight, bias, tuple(padding), dilation)
    return _convolve(x, weight, bias, padding, dilation)


class _DepthwiseConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias, self.padding, self.dilation)


class _DepthwiseConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias, self.padding, self.dilation)


_CLASSES = {1: _DepthwiseConv1d, 2: _DepthwiseConv2d, 3: nn.Conv3d}


def make_depthwise(
    dim: int,
    kernel: Sequence[int],
    *,
    padding: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    bias: bool = True,
    device=None,
    dtype=None,
) -> nn.Module:
    """A depthwise convolution layer ``(B, C, *grid) -> (B, C, *grid')``, torch's own by its class and state.

    Args:
        dim: channels C.
        kernel: its sides, one for each axis of the grid.
        padding: zeros before and behind each axis; by default those that keep the grid where sides are odd.
        dilation: distance of the taps on each axis, one by default.
        bias: whether it has one.
    """
    dilation = (1,) * len(kernel) if dilation is None else tuple(dilation)
    padding = tuple(r * (k // 2) for k, r in zip(kernel, dilation, strict=True)) if padding is None else tuple(padding)
    options = {"padding": padding, "dilation": dilation, "groups": dim, "bias": bias, "device": device, "dtype": dtype}
    return _CLASSES[len(kernel)](dim, dim, tuple(kernel), **options)
