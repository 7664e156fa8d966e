"""Weights applied to neighbourhoods: every position has its own kernel over the k positions around it, on each axis.

    y[i, j] = sum_{a, b} w[i, j, a k + b] v[s(i) + a, s(j) + b],    s(i) = clamp(i - k // 2, 0, L - k)

Windows are shifted inward at the borders (arXiv:2204.07143), so every position has k^2 real neighbours and no padding
is seen. The sum is a product with a banded matrix. The grid is cut into tiles; the windows of a tile's positions lie in
a box of keys, one size for all tiles, and the tile's weights are written into a dense block over that box, of zeros
elsewhere: the sum becomes one matrix product a tile. Small grids are one tile. Blocks are made for some heads at a time
and are not kept for the backward pass, which makes them again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._counting import Values, count, numel, shape
from ._layers import is_symbolic
from ._triton import has_kernels_for

BACKENDS = ("torch", "triton", "natten")

# an axis is cut into tiles when its dense block would be this many times larger than the window, and this long
_WASTE, _LONGEST = 2.5, 20
# side of a tile on an axis that is cut
_TILE = 8
# bytes of dense blocks at once: what stays in a cache of the processor, or keeps a GPU busy
_CHUNK_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}


def window_starts(length: int, window: int, device: torch.device | None = None) -> Tensor:
    """First position s(i) of every position's window along an axis."""
    return (torch.arange(length, device=device) - window // 2).clamp(0, length - window)


class Tiling(NamedTuple):
    """Where weights, keys and results of a grid are in its tiles.

    Attributes:
        tiles, queries, keys: number of tiles, positions of a tile, keys of a tile's box.
        place: place of every weight, ``(N k^2,)``, in a buffer (tiles, queries, keys); None if it has that order.
        key: value of every key of every tile, ``(tiles keys,)``; None if there is one tile.
        result: place of every position, ``(N,)``, among (tiles, queries); None if there is one tile.
    """

    tiles: int
    queries: int
    keys: int
    place: Tensor | None
    key: Tensor | None
    result: Tensor | None


def _axis(length: int, window: int, device: torch.device | None) -> tuple[int, int, int, list[Tensor]]:
    """Tiles, tile and box of an axis; the tile of each position, its place and its window's place in it; box starts."""
    cut = length > _LONGEST and length > _WASTE * window
    tile = _TILE if cut else length
    box = min(length, tile + window - 1)
    tiles = -(-length // tile)
    starts = (torch.arange(tiles, device=device) * tile - window // 2).clamp(0, length - box)
    position = torch.arange(length, device=device)
    of = position // tile
    shift = window_starts(length, window, device) - starts[of]
    return tiles, tile, box, [of, position % tile, shift, starts]


def make_tiling(grid: tuple[int, int], window: tuple[int, int], device: torch.device | None) -> Tiling:
    """The `Tiling` of a grid ``(H, W)``."""
    (rows, height, box_h, (row, i, di, top)), (cols, width, box_w, (col, j, dj, left)) = (
        _axis(length, k, device) for length, k in zip(grid, window, strict=True)
    )
    tiles, queries, keys = rows * cols, height * width, box_h * box_w
    if grid == window:
        return Tiling(1, queries, keys, None, None, None)
    result = (row[:, None] * cols + col) * queries + i[:, None] * width + j  # (H, W)
    a, b = (torch.arange(k, device=device) for k in window)
    inside = (di[:, None] + a)[:, None, :, None] * box_w + (dj[:, None] + b)[None, :, None, :]  # (H, W, k, k)
    place = (result[:, :, None, None] * keys + inside).flatten()
    if tiles == 1:
        return Tiling(1, queries, keys, place, None, None)
    y, x = (start[:, None] + torch.arange(box, device=device) for start, box in ((top, box_h), (left, box_w)))
    key = (y[:, None, :, None] * grid[1] + x[None, :, None, :]).flatten()  # (rows, cols, box_h, box_w)
    return Tiling(tiles, queries, keys, place, key, result.flatten())


cached_tiling = lru_cache(maxsize=64)(make_tiling)


def _dense(weights: Tensor, tiling: Tiling, buffer: Tensor | None = None) -> Tensor:
    """Weights ``(n, N k^2)`` in dense blocks ``(n tiles, queries, keys)``, in ``buffer`` if its zeros are in place."""
    t, q, s = tiling[:3]
    if tiling.place is not None:
        place = tiling.place.expand(weights.shape[0], -1)
        if buffer is None:
            weights = weights.new_zeros(weights.shape[0], t * q * s).scatter(1, place, weights)
        else:
            weights = buffer[: weights.shape[0]].scatter_(1, place, weights)
    return weights.reshape(-1, q, s)


def _boxes(values: Tensor, tiling: Tiling) -> Tensor:
    """Values ``(n, N, D)`` of the keys of every tile, ``(n tiles, keys, D)``."""
    if tiling.key is not None:
        values = values.index_select(1, tiling.key)
    return values.reshape(-1, tiling.keys, values.shape[-1])


def _at_queries(tiled: Tensor, tiling: Tiling) -> Tensor:
    """``(n tiles, queries, D)`` at their positions, ``(n, N, D)``."""
    tiled = tiled.reshape(-1, tiling.tiles * tiling.queries, tiled.shape[-1])
    return tiled if tiling.result is None else tiled.index_select(1, tiling.result)


def _to_queries(grad: Tensor, tiling: Tiling) -> Tensor:
    """The adjoint of `_at_queries`; places that no position has are zero."""
    if tiling.result is not None:
        full = grad.new_zeros(grad.shape[0], tiling.tiles * tiling.queries, grad.shape[-1])
        grad = full.index_copy_(1, tiling.result, grad)
    return grad.reshape(-1, tiling.queries, grad.shape[-1])


def heads_at_once(tiling: Tiling, like: Tensor) -> int:
    """Heads whose dense blocks are made at once."""
    block = tiling.tiles * tiling.queries * tiling.keys * like.element_size()
    return max(1, _CHUNK_BYTES.get(like.device.type, _CHUNK_BYTES["cuda"]) // block)


def _chunks(heads: int, tiling: Tiling, like: Tensor) -> tuple[list[slice], Tensor | None]:
    """Slices of heads whose dense blocks are made at once, and the buffer for them."""
    n = min(heads, heads_at_once(tiling, like))
    buffer = None if tiling.place is None else like.new_zeros(n, tiling.tiles * tiling.queries * tiling.keys)
    return [slice(i, min(i + n, heads)) for i in range(0, heads, n)], buffer


def apply_tiled(weights: Tensor, values: Tensor, tiling: Tiling) -> Tensor:
    """``(n, N k^2), (n, N, D) -> (n, N, D)``"""
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    parts, buffer = _chunks(weights.shape[0], tiling, weights)
    for part in parts:
        dense = _dense(weights[part], tiling, buffer)
        out[part] = _at_queries(torch.bmm(dense, _boxes(values[part], tiling)), tiling)
    return out


def backward_tiled(grad: Tensor, weights: Tensor, values: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Gradients of weights ``(n, N k^2)`` and values ``(n, N, D)``."""
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    grad_values = torch.empty_like(values, memory_format=torch.contiguous_format)
    parts, buffer = _chunks(weights.shape[0], tiling, weights)
    for part in parts:
        tiled = _to_queries(grad[part], tiling)
        of_keys = torch.bmm(_dense(weights[part], tiling, buffer).mT, tiled)  # (n tiles, keys, D)
        if tiling.key is None:
            grad_values[part] = of_keys
        else:
            of_keys = of_keys.reshape(-1, tiling.key.shape[0], of_keys.shape[-1])
            grad_values[part] = torch.zeros_like(values[part]).index_add_(1, tiling.key, of_keys)
        of_blocks = torch.bmm(tiled, _boxes(values[part], tiling).mT).reshape(tiled.shape[0] // tiling.tiles, -1)
        grad_weights[part] = of_blocks if tiling.place is None else of_blocks.index_select(1, tiling.place)
    return grad_weights, grad_values


def _flat(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, G, H, W, k^2), (B, G, H, W, D) -> (B G, N k^2), (B G, N, D)``"""
    return weights.flatten(0, 1).flatten(1), values.flatten(0, 1).flatten(1, 2)


@torch.library.custom_op("mixzoo::neighborhood_apply", mutates_args=())
def _operator(weights: Tensor, values: Tensor, height: int, width: int, triton: bool) -> Tensor:
    if triton:
        from . import _neighborhood_triton as _triton

        return _triton.apply(weights.contiguous(), values.contiguous(), height, width)
    tiling = cached_tiling(tuple(values.shape[2:4]), (height, width), values.device)
    return apply_tiled(*_flat(weights, values), tiling).reshape(values.shape)


@torch.library.custom_op("mixzoo::neighborhood_apply_backward", mutates_args=())
def _operator_backward(
    grad: Tensor, weights: Tensor, values: Tensor, height: int, width: int, triton: bool
) -> tuple[Tensor, Tensor]:
    if triton:
        from . import _neighborhood_triton as _triton

        return _triton.backward(grad.contiguous(), weights.contiguous(), values.contiguous(), height, width)
    tiling = cached_tiling(tuple(values.shape[2:4]), (height, width), values.device)
    flat = grad.flatten(0, 1).flatten(1, 2)
    grad_weights, grad_values = backward_tiled(flat, *_flat(weights, values), tiling)
    return grad_weights.reshape(weights.shape), grad_values.reshape(values.shape)


@_operator.register_fake
def _(weights, values, height, width, triton):
    return values.new_empty(values.shape)


@_operator_backward.register_fake
def _(grad, weights, values, height, width, triton):
    return weights.new_empty(weights.shape), values.new_empty(values.shape)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _differentiate(ctx, grad: Tensor):
    return *_operator_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


_operator.register_autograd(_differentiate, setup_context=_keep)


@count("mixzoo::neighborhood_apply", column="matmul")
def _count(inputs: Values, outputs: Values) -> int:
    """One multiply-add for every weight and channel, however it is computed."""
    return numel(inputs[0]) * shape(inputs[1])[-1]


@register_flop_formula(torch.ops.mixzoo.neighborhood_apply)
def _flops(weights: Sequence[int], values: Sequence[int], *args, **kwargs) -> int:
    """For torch's own counter, in which a multiply-add is two."""
    return 2 * math.prod(weights) * values[-1]


@register_flop_formula(torch.ops.mixzoo.neighborhood_apply_backward)
def _backward_flops(grad: Sequence[int], weights: Sequence[int], values: Sequence[int], *args, **kwargs) -> int:
    return 2 * _flops(weights, values)


def _apply_composed(weights: Tensor, values: Tensor, window: tuple[int, int]) -> Tensor:
    """Of torch's own operators alone, for programs that leave this process."""
    tiling = make_tiling(tuple(values.shape[2:4]), window, values.device)
    flat_weights, flat_values = _flat(weights, values)
    tiled = torch.bmm(_dense(flat_weights, tiling), _boxes(flat_values, tiling))
    return _at_queries(tiled, tiling).reshape(values.shape)


def _check(weights: Tensor, values: Tensor, window: tuple[int, ...], backend: str | None) -> None:
    rank = values.ndim - 3
    if rank not in (1, 2) or weights.ndim != values.ndim or weights.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            "weights and values must be (B, G, *grid, k^rank) and (B, G, *grid, D) with a grid of one or two axes, "
            f"got {tuple(weights.shape)} and {tuple(values.shape)}"
        )
    if len(window) != rank or min(window) < 1 or weights.shape[-1] != math.prod(window):
        raise ValueError(f"kernel_size {window} does not fit weights {tuple(weights.shape)} over {rank} axes")
    if any(length < k for length, k in zip(values.shape[2:-1], window, strict=True)):
        raise ValueError(f"kernel_size {window} is larger than the grid {tuple(values.shape[2:-1])}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, not {backend!r}")


def neighborhood_apply(
    weights: Tensor, values: Tensor, kernel_size: int | Sequence[int], *, backend: str | None = None
) -> Tensor:
    """Sum the values around every position, weighted by that position's own kernel; see the module's docstring.

    Args:
        weights: ``(B, G, *grid, k^rank)``, offsets in row-major order; used as they are, without a softmax.
        values: ``(B, G, *grid, D)``, of the same dtype.
        kernel_size: k, or one for each axis; no larger than the grid.
        backend: "torch"; "triton", which needs a CUDA device; "natten", which needs that package in a version that has
            ``na2d_av`` (0.15 to 0.17); None for Triton on CUDA where it is installed, and torch elsewhere. All agree.

    Returns:
        ``(B, G, *grid, D)``

    Raises:
        ValueError: shapes that do not fit, or an unknown backend. RuntimeError: a backend that cannot run here.
    """
    rank = values.ndim - 3
    window = (kernel_size,) * rank if isinstance(kernel_size, int) else tuple(kernel_size)
    if not is_symbolic(values):
        _check(weights, values, window, backend)
    weights = weights.to(values.dtype)
    if rank == 1:
        y = neighborhood_apply(weights.unsqueeze(2), values.unsqueeze(2), (1, *window), backend=backend)
        return y.squeeze(2)
    if backend == "natten":
        return _apply_natten(weights, values, window)
    if torch.compiler.is_exporting():
        return _apply_composed(weights, values, window)
    triton = backend in ("triton", None) and has_kernels_for(values)
    if backend == "triton" and not triton:
        raise RuntimeError(
            f"backend 'triton' needs the package triton, and values of at most 32 bits on a CUDA device; these are "
            f"{values.dtype} on {values.device}"
        )
    return _operator(weights, values, *window, triton)


def _apply_natten(weights: Tensor, values: Tensor, window: tuple[int, int]) -> Tensor:
    try:
        from natten.functional import na2d_av
    except ImportError as error:
        raise RuntimeError("backend 'natten' needs the package natten, 0.15 to 0.17, which has na2d_av") from error
    return na2d_av(weights.contiguous(), values.contiguous(), window, 1)
