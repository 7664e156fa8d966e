"""The MLP of OverLoCK: two linear layers with a depthwise convolution and a response norm between them.

Paper: arXiv:2502.20087. Checked against LMMMEng/OverLoCK at 2c8ab3b.

    h = W1 x + b1;  a = GELU(h);  l = a + dw3x3(a);  y = W2 norm(l) + b2        x, y: (B, H, W, C), h: (B, H, W, M)

Samples do not see each other. On a CPU all of it runs on slices of the batch, so that maps of width M stay in the
cache, and h is the only one that is kept for the backward pass, which makes the others again.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._conv_parts import ResidualDepthwise, ResponseNorm, response, response_backward
from ._depthwise import convolution_backward
from ._layers import Linear, activated, by_samples, is_plain, is_symbolic, linear, samples_at_once


def _local(a: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """l; the skip is part of the kernel."""
    y = F.conv2d(a.permute(0, 3, 1, 2), kernel, bias, padding=1, groups=kernel.shape[0])
    return y.permute(0, 2, 3, 1)


def _result(
    a: Tensor, kernel: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, out_bias: Tensor, eps: float
) -> Tensor:
    """y of a, which is overwritten, without a graph."""
    y = _local(a, kernel, bias)
    scale = response(y, gamma, eps, scratch=a)[-1]
    return linear(torch.addcmul(beta, y, scale, out=y), weight, out_bias)


class _Result(torch.autograd.Function):
    """y of h, with a graph that holds h alone."""

    @staticmethod
    def forward(h, kernel, bias, gamma, beta, weight, out_bias, eps):
        parameters = kernel, bias, gamma, beta, weight, out_bias, eps
        return by_samples(lambda part: _result(F.gelu(part), *parameters), h, h[0].numel())

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        h, kernel, bias, gamma, beta, weight, _ = ctx.saved_tensors
        size = samples_at_once(h, h[0].numel())
        slopes, sums = torch.empty_like(h), None
        for part, d, slope in zip(h.split(size), grad.split(size), slopes.split(size), strict=True):
            a = F.gelu(part)
            y = _local(a, kernel, bias)
            *statistics, scale = response(y, gamma, ctx.eps)
            d, *of_linear = _backward(d, torch.addcmul(beta, y, scale), weight[:, :, None, None])
            d, *of_norm = response_backward(d, y, gamma, *statistics, scale)
            d, *of_conv = _backward(d, a, kernel, groups=kernel.shape[0])
            torch.ops.aten.gelu_backward.grad_input(d, part, grad_input=slope)
            found = *of_conv, *of_norm, *of_linear
            sums = found if sums is None else [total.add_(more) for total, more in zip(sums, found, strict=True)]
        *others, of_weight, of_bias = sums
        return slopes, *others, of_weight.flatten(1), of_bias, None


def _backward(grad: Tensor, x: Tensor, weight: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, kernel and bias of a convolution that keeps the grid, on ``(B, H, W, C)``."""
    maps = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    padding = [k // 2 for k in weight.shape[2:]]
    dx, dw, db = convolution_backward(*maps, weight, padding, groups, [True, True, True])
    return dx.permute(0, 2, 3, 1), dw, db


class LocalMlp(nn.Module):
    """Linear, GELU, residual depthwise convolution, response norm, linear: ``(B, H, W, C) -> (B, H, W, C)``."""

    def __init__(self, dim: int, hidden: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.local = ResidualDepthwise(hidden, **dd)
        self.norm = ResponseNorm(hidden, **dd)
        self.fc2 = Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not self._runs_sliced(x):
            return self.fc2(self.norm(self.local(self.act(self.fc1(x)))))
        norm, fc2 = self.norm, self.fc2
        rest = self.local.kernel(), self.local.conv.bias, norm.gamma, norm.beta, fc2.weight, fc2.bias, norm.eps
        if torch.is_grad_enabled():
            return _Result.apply(self.fc1(x), *rest)
        widest = x[0, ..., 0].numel() * fc2.in_features
        return by_samples(lambda part: _result(activated(part, self.fc1, self.act), *rest), x, widest)

    def _runs_sliced(self, x: Tensor) -> bool:
        if is_symbolic(x) or not x.is_cpu or torch.is_autocast_enabled("cpu") or x.numel() == 0:
            return False
        whole = {x.dtype, self.fc1.weight.dtype} in ({torch.float32}, {torch.float64})
        return whole and is_plain(self.children(), (Linear, nn.GELU, ResidualDepthwise, ResponseNorm))
