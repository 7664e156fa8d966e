"""Neighbourhood application in Triton; `_neighborhood` says what is computed and is the reference.

A program computes a row segment of positions. The forward pass and the gradient of the weights go through the window of
each position; the gradient of the values goes through the positions whose window holds a value, which are a range on
each axis, so that no two programs write to one place. Sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# positions of a program, and channels at once at most
_POSITIONS, _CHANNELS = 16, 128


@triton.jit
def _start(i, window: tl.constexpr, length):
    """First position of the window of position i."""
    return tl.minimum(tl.maximum(i - window // 2, 0), length - window)


@triton.jit
def _first(y, window: tl.constexpr):
    """First position whose window holds position y."""
    return tl.where(y < window, 0, y - window + 1 + window // 2)


@triton.jit
def _last(y, window: tl.constexpr, length):
    """Last position whose window holds position y."""
    return tl.where(y >= length - window, length - 1, y + window // 2)


@triton.jit
def _place(H, W, positions: tl.constexpr):
    """Map, row and columns of this program."""
    segments = tl.cdiv(W, positions)
    program = tl.program_id(0)
    columns = (program % segments) * positions + tl.arange(0, positions)
    row = (program // segments) % H
    return (program // segments // H).to(tl.int64), row, columns


@triton.jit
def _apply_kernel(
    weights, values, out, H, W, D, kh: tl.constexpr, kw: tl.constexpr, positions: tl.constexpr, channels: tl.constexpr
):
    image, i, j = _place(H, W, positions)
    inside = j < W
    query = (image * H + i) * W + j
    top, left = _start(i, kh, H), _start(j, kw, W)
    for c in range(0, D, channels):
        d = c + tl.arange(0, channels)
        mask = inside[:, None] & (d < D)[None, :]
        total = tl.zeros((positions, channels), dtype=tl.float32)
        for a in range(kh):
            for b in range(kw):
                key = (image * H + top + a) * W + left + b
                w = tl.load(weights + query * (kh * kw) + a * kw + b, mask=inside, other=0.0).to(tl.float32)
                v = tl.load(values + key[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
                total += w[:, None] * v
        tl.store(out + query[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _weights_kernel(
    grad, values, out, H, W, D, kh: tl.constexpr, kw: tl.constexpr, positions: tl.constexpr, channels: tl.constexpr
):
    image, i, j = _place(H, W, positions)
    inside = j < W
    query = (image * H + i) * W + j
    top, left = _start(i, kh, H), _start(j, kw, W)
    for a in range(kh):
        for b in range(kw):
            key = (image * H + top + a) * W + left + b
            total = tl.zeros((positions,), dtype=tl.float32)
            for c in range(0, D, channels):
                d = c + tl.arange(0, channels)
                mask = inside[:, None] & (d < D)[None, :]
                g = tl.load(grad + query[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
                v = tl.load(values + key[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
                total += tl.sum(g * v, 1)
            tl.store(out + query * (kh * kw) + a * kw + b, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _values_kernel(
    grad,
    weights,
    out,
    H,
    W,
    D,
    kh: tl.constexpr,
    kw: tl.constexpr,
    most,
    positions: tl.constexpr,
    channels: tl.constexpr,
):
    image, y, x = _place(H, W, positions)
    inside = x < W
    first, last = _first(x, kw), _last(x, kw, W)
    for c in range(0, D, channels):
        d = c + tl.arange(0, channels)
        total = tl.zeros((positions, channels), dtype=tl.float32)
        for i in range(_first(y, kh), _last(y, kh, H) + 1):
            a = y - _start(i, kh, H)
            for step in range(most):
                j = first + step
                seen = inside & (j <= last)
                b = x - _start(j, kw, W)
                query = (image * H + i) * W + j
                mask = seen[:, None] & (d < D)[None, :]
                w = tl.load(weights + query * (kh * kw) + a * kw + b, mask=seen, other=0.0).to(tl.float32)
                g = tl.load(grad + query[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
                total += w[:, None] * g
        place = (image * H + y) * W + x
        mask = inside[:, None] & (d < D)[None, :]
        tl.store(out + place[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=mask)


def _launch(values: Tensor, height: int, width: int) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """Number of programs, sizes and block sizes for values ``(B, G, H, W, D)``."""
    B, G, H, W, D = values.shape
    blocks = {"positions": _POSITIONS, "channels": min(_CHANNELS, triton.next_power_of_2(D))}
    return (B * G * H * triton.cdiv(W, _POSITIONS),), (H, W, D, height, width), blocks


def apply(weights: Tensor, values: Tensor, height: int, width: int) -> Tensor:
    """``(B, G, H, W, k^2), (B, G, H, W, D) -> (B, G, H, W, D)``, all contiguous."""
    out = torch.empty_like(values)
    programs, sizes, blocks = _launch(values, height, width)
    if out.numel():
        with torch.cuda.device_of(values):
            _apply_kernel[programs](weights, values, out, *sizes, **blocks)
    return out


def backward(grad: Tensor, weights: Tensor, values: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Gradients of weights and values."""
    of_weights, of_values = torch.empty_like(weights), torch.empty_like(values)
    programs, sizes, blocks = _launch(values, height, width)
    if values.numel():
        # a window at a border is seen by the positions beyond it too
        most = min(values.shape[3], width + width // 2)
        with torch.cuda.device_of(values):
            _weights_kernel[programs](grad, values, of_weights, *sizes, **blocks)
            _values_kernel[programs](grad, weights, of_values, *sizes, most=most, **blocks)
    return of_weights, of_values
