"""Parts of convolutional mixers and blocks on channels-last maps ``(B, *grid, C)``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._depthwise import depthwise_conv, make_depthwise
from ._layers import Linear, activated, is_symbolic

_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def batch_norm(rank: int, dim: int, *, device=None, dtype=None) -> nn.Module:
    """Batch norm over ``(B, C, *grid)``."""
    return _NORMS[rank](dim, device=device, dtype=dtype)


def normed(x: Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module) -> Tensor:
    """``act(norm(conv(x)))``, where the norm may have been folded into the convolution: ``(B, C, H, W)``."""
    return activated(x, conv, act) if isinstance(norm, nn.Identity) else act(norm(conv(x)))


class LinearNorm(nn.Module):
    """Linear layer without bias and batch norm, a 1x1 convolution: ``(B, H, W, C) -> (B, H, W, C')``."""

    folds = (("fc", "norm"),)

    def __init__(self, in_chans: int, out_chans: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc = Linear(in_chans, out_chans, bias=False, **dd)
        self.norm = nn.BatchNorm2d(out_chans, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ResidualDepthwise(nn.Module):
    """x + depthwise convolution of x, as one convolution: the skip is a one in the middle of the kernel.

    Args:
        dim: channels C.
        kernel: odd sides of the kernel, one for each axis of the grid.
        bias: whether the convolution has one.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``.
    """

    def __init__(self, dim: int, *, kernel: Sequence[int] = (3, 3), bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.conv = make_depthwise(dim, kernel, bias=bias, device=device, dtype=dtype)
        self._edges = [k // 2 for k in reversed(kernel) for _ in range(2)]

    def kernel(self) -> Tensor:
        """The kernel with the skip in it."""
        weight = self.conv.weight
        return weight + F.pad(weight.new_ones((1,) * weight.ndim), self._edges)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x.movedim(-1, 1), self.kernel(), self.conv.bias, self.conv.padding).movedim(1, -1)


def response(x: Tensor, gamma: Tensor, eps: float, scratch: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of `ResponseNorm` on ``(B, H, W, C)``: mean_c g + eps ``(B, 1, 1, 1)``, n and gamma n + 1 ``(B, 1, 1, C)``.

    Squares go to ``scratch``, a map of the shape of x that is not needed any more, if there is one.
    """
    g = torch.mul(x, x, out=scratch).sum((1, 2), keepdim=True).sqrt_()
    mean = g.mean(-1, keepdim=True).add_(eps)
    n = g.div_(mean)
    return mean, n, (gamma * n).add_(1)


def response_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, n: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gamma and beta, from what `response` gives."""
    of_scale = (grad * x).sum((1, 2), keepdim=True)
    of_n = of_scale * gamma
    of_g = (of_n - (of_n * n).mean(-1, keepdim=True)) / mean
    # a channel without response has no slope
    slope = torch.where(n > 0, of_g / (n * mean), 0)
    return torch.addcmul(grad * scale, x, slope), (of_scale * n).sum((0, 1, 2)), grad.sum((0, 1, 2))


class _ResponseNorm(torch.autograd.Function):
    """`ResponseNorm` that keeps x alone, with sums over positions in the order of memory."""

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        return torch.addcmul(beta, x, response(x, gamma, eps)[-1])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, gamma, _ = ctx.saved_tensors
        return *response_backward(grad, x, gamma, *response(x, gamma, ctx.eps)), None


class ResponseNorm(nn.Module):
    """Global response norm (arXiv:2301.00808) without a skip of its own, on ``(B, H, W, C)``.

        y = (gamma n + 1) x + beta,    n = g / (mean_c g + eps),    g: L2 norm of each channel over the grid

    The norms are taken in float32.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if not is_symbolic(x) and x.is_cpu and x.dtype == self.gamma.dtype and x.dtype.itemsize >= 4:
            return _ResponseNorm.apply(x, self.gamma, self.beta, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        g = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)  # (B, 1, 1, C)
        n = g / (g.mean(-1, keepdim=True) + self.eps)
        scale = (self.gamma * n + 1).to(x.dtype)
        return torch.addcmul(self.beta.to(x.dtype), x, scale)


class SqueezeExcitation(nn.Module):
    """Channels gated by their means (arXiv:1709.01507): ``(B, H, W, C) -> (B, H, W, C)``.

    y = x sigmoid(W2 GELU(W1 mean(x))), hidden width max(16, C // 8)
    """

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = max(16, dim // 8)
        self.fc1 = Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2), keepdim=True)  # (B, 1, 1, C)
        return x * torch.sigmoid(self.fc2(self.act(self.fc1(mean))))
