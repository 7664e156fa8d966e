"""Depthwise convolutions of channels-last maps, with the CPU kernels that oneDNN has but does not choose by itself.

    y_c = k_c * x_c + b_c,  one kernel for every channel; zero padding

For the gradient of the kernel oneDNN has a depthwise routine up to three columns; wider kernels go through the dense
one, which pads every channel to a block of 16 x 16 (50 MB of scratch for 1024 kernels of 7 x 7). Three columns at a
time the wide ones take the fast routine too, 3 to 20 times faster. Sequences are maps of one row: as such their memory
is seen to be channels-last, which that of `torch.nn.functional.conv1d` is not (1.0 against 31 ms for 2 x 4096 tokens of
768 channels and three taps).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._layers import is_symbolic

_CONVS = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}
# columns of a kernel whose gradient oneDNN has a depthwise routine for
_COLUMNS = 3


def _backward(grad: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int], wanted: Sequence[bool]):
    """Gradients of input, kernel and bias of a 2-D convolution, those that are wanted."""
    ones, channels = [1, 1], weight.shape[0]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [channels], ones, padding, ones, False, [0, 0], channels, wanted
    )


def _kernel_gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    """Gradient of a kernel ``(C, 1, k, l)``, by groups of columns, each that of a narrow kernel over a shifted map."""
    rows, columns = padding
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, columns, columns))  # (B, H, W + 2p, C)
    parts = []
    for j, part in enumerate(weight.split(_COLUMNS, -1)):
        seen = padded.narrow(2, j * _COLUMNS, grad.shape[-1] + part.shape[-1] - 1)
        shifted = seen.contiguous().permute(0, 3, 1, 2)
        parts.append(_backward(grad, shifted, part, [rows, 0], [False, True, False])[1])
    return torch.cat(parts, -1)


class _DepthwiseConv(torch.autograd.Function):
    """A 2-D depthwise convolution whose kernel has its gradient by columns."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
        return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = _backward(grad, x, weight, list(ctx.padding), [True, False, False])[0] if needs_x else None
        dw = _kernel_gradient(grad, x, weight, ctx.padding) if needs_weight else None
        return dx, dw, grad.sum((0, 2, 3)) if needs_bias else None, None


def _by_columns(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel's gradient is faster by columns."""
    fits = x.is_cpu and x.dtype == weight.dtype == torch.float32 and weight.shape[-1] > _COLUMNS
    return fits and weight.requires_grad and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    """Depthwise convolution of stride and dilation one.

    Args:
        x: ``(B, C, *grid)``; fast where a view of channels-last memory.
        weight: ``(C, 1, *kernel)``.
        bias: (C,) or None.
        padding: zeros before and behind each axis of the grid.

    Returns:
        ``(B, C, *grid')``, where the side n is n + 2 padding - kernel + 1.
    """
    rank = len(padding)
    if is_symbolic(x) or rank == 3 or x.numel() == 0:
        return _CONVS[rank][1](x, weight, bias, padding=padding, groups=weight.shape[0])
    if rank == 1:
        return depthwise_conv(x.unsqueeze(2), weight.unsqueeze(2), bias, (0, *padding)).squeeze(2)
    if _by_columns(x, weight):
        return _DepthwiseConv.apply(x, weight, bias, tuple(padding))
    return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])


class _DepthwiseConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias, self.padding)


class _DepthwiseConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias, self.padding)


_CLASSES = {1: _DepthwiseConv1d, 2: _DepthwiseConv2d, 3: nn.Conv3d}


def make_depthwise(
    dim: int, kernel: Sequence[int], *, padding: Sequence[int] | None = None, bias: bool = True, device=None, dtype=None
) -> nn.Module:
    """A depthwise convolution layer ``(B, C, *grid) -> (B, C, *grid')``, torch's own by its class and state.

    Args:
        dim: channels C.
        kernel: its sides, one for each axis of the grid.
        padding: zeros before and behind each axis; default the half kernel, which keeps the grid where sides are odd.
        bias: whether it has one.
    """
    padding = tuple(k // 2 for k in kernel) if padding is None else tuple(padding)
    options = {"padding": padding, "groups": dim, "bias": bias, "device": device, "dtype": dtype}
    return _CLASSES[len(kernel)](dim, dim, tuple(kernel), **options)
