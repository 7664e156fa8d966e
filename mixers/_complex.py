"""Complex arithmetic on real tensors: real and imaginary parts stand apart, so no complex tensor is kept or trained."""

from __future__ import annotations

import torch
from torch import Tensor

from ._layers import is_symbolic


def real_blocks(weight: Tensor) -> Tensor:
    """Complex matrices ``(2, G, I, O)`` as real ones ``(G, 2 I, 2 O)`` that act on [re | im] from the right."""
    real, imag = weight
    return torch.cat([torch.cat([real, imag], -1), torch.cat([-imag, real], -1)], -2)


def times_i(z: Tensor) -> Tensor:
    """i z of complex numbers ``(2, ...)``."""
    real, imag = z
    return torch.stack([-imag, real])


def real_bias(bias: Tensor) -> Tensor:
    """Complex vectors ``(2, G, O)`` as ``(G, 1, 2 O)``."""
    return torch.cat([bias[0], bias[1]], -1).unsqueeze(1)


def _product(a: Tensor, b: Tensor, sign: int) -> Tensor:
    """``a b``, or ``a conj(b)`` for sign -1."""
    real, imag = b
    y = a * real
    y[0].addcmul_(a[1], imag, value=-sign)
    y[1].addcmul_(a[0], imag, value=sign)
    return y


class _ComplexProduct(torch.autograd.Function):
    """The gradients of a complex product are products too: g conj(b) and g conj(a)."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _product(a, b, 1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, b = ctx.saved_tensors
        grad_a = _product(grad, b, -1) if ctx.needs_input_grad[0] else None
        grad_b = _product(grad, a, -1) if ctx.needs_input_grad[1] else None
        if grad_b is not None and b.ndim < a.ndim:
            grad_b = grad_b.sum(1)
        return grad_a, grad_b


def complex_product(a: Tensor, b: Tensor) -> Tensor:
    """Product of ``a (2, B, *bins, C)`` and ``b``, which may lack the axis B; real parts first."""
    if torch.jit.is_tracing():
        # as one complex operation, which is what is counted
        a, b = (torch.view_as_complex(z.movedim(0, -1).contiguous()) for z in (a, b))
        return torch.view_as_real(a * b).movedim(-1, 0)
    if not is_symbolic(a):
        return _ComplexProduct.apply(a, b)
    (p, q), (r, s) = a.unbind(0), b.unbind(0)
    return torch.stack([p * r - q * s, p * s + q * r])
