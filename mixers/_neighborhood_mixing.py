"""Kernels that are products of two factors, applied to neighbourhoods; see `_neighborhood` for the windows.

    P = softmax(q M + b),  y = P * v

q has D numbers for every position and head, M has D rows of k^2 taps for every head of an image, b one number for every
position, head and tap. P is the largest tensor of a context-mixing block. On a CPU it is made for some heads at a time,
in the cache, and made again in the backward pass, which keeps the factors alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._layers import is_symbolic
from ._neighborhood import apply_tiled, backward_tiled, cached_tiling, heads_at_once, neighborhood_apply


def _parts(q: Tensor, grid: Sequence[int], window: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Slices of images and heads whose kernels are made at once."""
    images, _, heads = q.shape[:3]
    n = heads_at_once(cached_tiling(tuple(grid), window, q.device), q)
    step, width = max(1, n // heads), min(n, heads)
    for i in range(0, images, step):
        for g in range(0, heads, width):
            yield slice(i, i + step), slice(g, g + width)


def _kernels(q: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """P ``(B, G, N, k^2)`` of ``(B, N, G, D), (B, G, D, k^2), (G, N, k^2)``."""
    return torch.softmax(torch.matmul(q.transpose(1, 2), factor).add_(bias), -1)


def _by_heads(x: Tensor) -> Tensor:
    """``(B, H, W, G, D) -> (B G, H W, D)``"""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _by_positions(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_by_heads`, for a map of the shape of ``like``."""
    b, h, w, g, d = like.shape
    return x.reshape(b, g, h, w, d).permute(0, 2, 3, 1, 4)


@torch.library.custom_op("mixzoo::neighborhood_mix", mutates_args=())
def _operator(q: Tensor, factor: Tensor, bias: Tensor, values: Tensor, height: int, width: int) -> Tensor:
    grid, window = values.shape[1:3], (height, width)
    tiling = cached_tiling(tuple(grid), window, values.device)
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    for i, g in _parts(q, grid, window):
        p, v = _kernels(q[i, :, g], factor[i, g], bias[g]), values[i, :, :, g]
        out[i, :, :, g] = _by_positions(apply_tiled(p.flatten(0, 1).flatten(1), _by_heads(v), tiling), v)
    return out


@torch.library.custom_op("mixzoo::neighborhood_mix_backward", mutates_args=())
def _operator_backward(
    grad: Tensor, q: Tensor, factor: Tensor, bias: Tensor, values: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grid, window = values.shape[1:3], (height, width)
    tiling = cached_tiling(tuple(grid), window, values.device)
    of_q, of_factor, of_values = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, factor, values)
    )
    of_bias = torch.zeros_like(bias, memory_format=torch.contiguous_format)
    for i, g in _parts(q, grid, window):
        p, v, m = _kernels(q[i, :, g], factor[i, g], bias[g]), values[i, :, :, g], factor[i, g]
        flat = p.flatten(0, 1).flatten(1)  # (B G, N k^2)
        of_p, of_v = backward_tiled(_by_heads(grad[i, :, :, g]), flat, _by_heads(v), tiling)
        of_logits = torch._softmax_backward_data(of_p.view_as(p), p, -1, p.dtype)
        of_bias[g] += of_logits.sum(0)
        of_q[i, :, g] = torch.matmul(of_logits, m.mT).transpose(1, 2)
        of_factor[i, g] = torch.matmul(q[i, :, g].permute(0, 2, 3, 1), of_logits)
        of_values[i, :, :, g] = _by_positions(of_v, v)
    return of_q, of_factor, of_bias, of_values


@_operator.register_fake
def _(q, factor, bias, values, height, width):
    return values.new_empty(values.shape)


@_operator_backward.register_fake
def _(grad, q, factor, bias, values, height, width):
    return tuple(t.new_empty(t.shape) for t in (q, factor, bias, values))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.window = inputs[4:]


def _differentiate(ctx, grad: Tensor):
    return *_operator_backward(grad, *ctx.saved_tensors, *ctx.window), None, None


_operator.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.mixzoo.neighborhood_mix)
def _flops(q: Sequence[int], factor: Sequence[int], bias: Sequence[int], values: Sequence[int], *args, **kwargs) -> int:
    """For torch's own counter, in which a multiply-add is two: the products with both factors and with the values."""
    return 2 * math.prod(q[:3]) * factor[-1] * (q[-1] + values[-1])


@register_flop_formula(torch.ops.mixzoo.neighborhood_mix_backward)
def _backward_flops(grad: Sequence[int], *shapes, **kwargs) -> int:
    return 2 * _flops(*shapes)


def neighborhood_mix(q: Tensor, factor: Tensor, bias: Tensor, values: Tensor, window: tuple[int, int]) -> Tensor:
    """See the module's docstring.

    Args:
        q: ``(B, N, G, D)``, N = H W.
        factor: M, ``(B, G, D, k^2)``.
        bias: b, ``(G, N, k^2)``.
        values: v, ``(B, H, W, G, E)``.
        window: sides of the windows, no larger than the grid.

    Returns:
        ``(B, H, W, G, E)``. The softmax is taken in float32 or wider.
    """
    dtypes = {t.dtype for t in (q, factor, bias, values)}
    if not is_symbolic(q) and values.is_cpu and dtypes in ({torch.float32}, {torch.float64}):
        return _operator(q, factor, bias, values, *window)
    logits = torch.matmul(q.transpose(1, 2), factor) + bias  # (B, G, N, k^2)
    p = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(values.dtype)
    y = neighborhood_apply(p.unflatten(2, values.shape[1:3]), values.permute(0, 3, 1, 2, 4), window)
    return y.permute(0, 2, 3, 1, 4)
