"""Complex arithmetic on real tensors: parts stand on an axis of their own, so no complex tensor is kept or trained."""

from __future__ import annotations

import torch
from torch import Tensor

from ._layers import is_symbolic


def real_blocks(weight: Tensor) -> Tensor:
    """Complex matrices ``(2, G, I, O)`` as real ones ``(G, 2 I, 2 O)`` that act on [re | im] from the right."""
    real, imag = weight
    return torch.cat([torch.cat([real, imag], -1), torch.cat([-imag, real], -1)], -2)


def real_bias(bias: Tensor) -> Tensor:
    """Complex vectors ``(2, G, O)`` as ``(G, 1, 2 O)``."""
    return torch.cat([bias[0], bias[1]], -1).unsqueeze(1)


def _product(a: Tensor, b: Tensor, sign: int) -> Tensor:
    """``a b``, or ``a conj(b)`` for sign -1, in the memory layout of ``a``."""
    real, imag = b.unbind(-2)
    y = a * real.unsqueeze(-2)
    y.select(-2, 0).addcmul_(a.select(-2, 1), imag, value=-sign)
    y.select(-2, 1).addcmul_(a.select(-2, 0), imag, value=sign)
    return y


class _ComplexProduct(torch.autograd.Function):
    """The gradients of a complex product are products too: g conj(b) and g conj(a)."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _product(a, b, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, b = ctx.saved_tensors
        grad_a = _product(grad, b, -1) if ctx.needs_input_grad[0] else None
        grad_b = _product(grad, a, -1).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


def complex_product(a: Tensor, b: Tensor) -> Tensor:
    """Product of ``a (..., 2, C)`` and ``b``, which may lack leading axes; parts on the second-last axis."""
    if torch.jit.is_tracing():
        # as one complex operation, which is what is counted
        a, b = (torch.view_as_complex(z.transpose(-1, -2).contiguous()) for z in (a, b))
        return torch.view_as_real(a * b).transpose(-1, -2)
    if not is_symbolic(a):
        return _ComplexProduct.apply(a, b)
    (p, q), (r, s) = a.unbind(-2), b.unbind(-2)
    return torch.stack([p * r - q * s, p * s + q * r], -2)
