"""The selective scan in Triton; `_scan` says what is computed and is the reference.

A program takes some channels of one sample through time, a tile of steps after the other. Within a tile the steps
h -> a h + b are composed by an associative scan, from tile to tile the state is carried on, so that any decay is safe.
The backward pass goes from the last tile to the first: it composes a tile's steps anew from the state that entered it,
and those of the adjoint on the tile turned round. Sums over programs are made afterwards, so that results do not depend
on the order in which these end. Arithmetic is in float32.

A program has a thread for every channel and state, and a thread has all steps of a tile: the scan is then the plain
recurrence, in registers, and turning a tile round costs nothing. Triton's own reversed scan moves data between threads,
and has given wrong results there (triton-lang/triton#4362).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# threads of a warp, and of a program where it has the channels for them
_WARP, _THREADS = 32, 128


@triton.jit
def _compose(a, b, later_a, later_b):
    """The step h -> a h + b and a later one."""
    return a * later_a, later_a * b + later_b


@triton.jit
def _place(length, groups, channels, states, blocks, wide: tl.constexpr, deep: tl.constexpr):
    """Sample, first row of its steps, block of channels; columns of channels and of states, and which are there."""
    program = tl.program_id(0)
    block, group = program % blocks, program // blocks % groups
    sample = (program // blocks // groups).to(tl.int64)
    d, n = block * wide + tl.arange(0, wide), tl.arange(0, deep)
    return sample, sample * length, block, group * channels + d, d < channels, group * states + n, n < states


@triton.jit
def _load(x, first, t, length, width, column, there):
    """Steps ``t`` of a sample, ``(T, columns)``; where there is none zeros, which as dt change nothing."""
    at = (first + t)[:, None] * width + column[None, :]
    return tl.load(x + at, mask=((t >= 0) & (t < length))[:, None] & there[None, :], other=0.0)


@triton.jit
def _forward_kernel(
    u,
    dt,
    A,
    B,
    C,
    y,
    last,
    entered,
    length,
    groups,
    channels,
    states,
    tiles,
    blocks,
    steps: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
):
    sample, first, _, d, d_there, n, n_there = _place(length, groups, channels, states, blocks, wide, deep)
    D, N = groups * channels, groups * states
    row = tl.arange(0, steps)
    of_state = d[:, None] * states + tl.arange(0, deep)[None, :]
    there = d_there[:, None] & n_there[None, :]
    decay = tl.load(A + of_state, mask=there, other=0.0)  # (D, N)
    state = tl.zeros((wide, deep), dtype=tl.float32)
    for k in range(tiles):
        tl.store(entered + (sample * tiles + k) * D * states + of_state, state, mask=there)
        t = k * steps + row
        step = _load(dt, first, t, length, D, d, d_there)  # (T, D)
        x = step * _load(u, first, t, length, D, d, d_there)
        b = _load(B, first, t, length, N, n, n_there)  # (T, N)
        c = _load(C, first, t, length, N, n, n_there)
        a = tl.exp(step[:, :, None] * decay[None, :, :])  # (T, D, N)
        a, h = tl.associative_scan((a, x[:, :, None] * b[:, None, :]), 0, _compose)
        h += a * state[None, :, :]
        out = y + (first + t)[:, None] * D + d[None, :]
        tl.store(out, tl.sum(h * c[:, None, :], 2), mask=(t < length)[:, None] & d_there[None, :])
        state = tl.sum(tl.where(row[:, None, None] == steps - 1, h, 0.0), 0)
    tl.store(last + sample * D * states + of_state, state, mask=there)


@triton.jit
def _backward_kernel(
    dy,
    dlast,
    entered,
    u,
    dt,
    A,
    B,
    C,
    du,
    ddt,
    dA,
    dB,
    dC,
    length,
    groups,
    channels,
    states,
    tiles,
    blocks,
    steps: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
):
    sample, first, block, d, d_there, n, n_there = _place(length, groups, channels, states, blocks, wide, deep)
    D, N = groups * channels, groups * states
    row = tl.arange(0, steps)
    of_state = d[:, None] * states + tl.arange(0, deep)[None, :]
    there = d_there[:, None] & n_there[None, :]
    decay = tl.load(A + of_state, mask=there, other=0.0)  # (D, N)
    of_decay = tl.zeros((wide, deep), dtype=tl.float32)
    back = tl.load(dlast + sample * D * states + of_state, mask=there, other=0.0)  # a_t g_t of the step after the tile
    for k in range(tiles - 1, -1, -1):
        state = tl.load(entered + (sample * tiles + k) * D * states + of_state, mask=there, other=0.0)
        t = k * steps + row
        before, after = tl.where(row == 0, -1, t - 1), tl.where(row == steps - 1, -1, t + 1)
        # a_t h_{t-1} by the steps before each; h_t less its input would lose what is small beside that
        x = _load(dt, first, before, length, D, d, d_there)  # (T, D)
        b = _load(B, first, before, length, N, n, n_there)  # (T, N)
        a = tl.exp(x[:, :, None] * decay[None, :, :])  # (T, D, N)
        x *= _load(u, first, before, length, D, d, d_there)
        a, faded = tl.associative_scan((a, x[:, :, None] * b[:, None, :]), 0, _compose)
        step = _load(dt, first, t, length, D, d, d_there)
        fade = tl.exp(step[:, :, None] * decay[None, :, :])
        faded = (faded + a * state[None, :, :]) * fade
        # g_t = C_t dy_t + a_{t+1} g_{t+1}
        grad = _load(dy, first, t, length, D, d, d_there)
        c = _load(C, first, t, length, N, n, n_there)
        a = tl.exp(_load(dt, first, after, length, D, d, d_there)[:, :, None] * decay[None, :, :])
        g = tl.flip(grad[:, :, None] * c[:, None, :], 0)
        a, g = tl.associative_scan((tl.flip(a, 0), g), 0, _compose)
        g = tl.flip(g + a * back[None, :, :], 0)
        b = _load(B, first, t, length, N, n, n_there)
        source = _load(u, first, t, length, D, d, d_there)
        x = step * source
        of_x = tl.sum(g * b[:, None, :], 2)  # (T, D)
        of_exponent = g * faded
        out = (first + t)[:, None] * D + d[None, :]
        mask = (t < length)[:, None] & d_there[None, :]
        tl.store(du + out, step * of_x, mask=mask)
        tl.store(ddt + out, tl.sum(of_exponent * decay[None, :, :], 2) + source * of_x, mask=mask)
        of_decay += tl.sum(of_exponent * step[:, :, None], 0)
        out = ((sample * blocks + block) * length + t)[:, None] * N + n[None, :]
        mask = (t < length)[:, None] & n_there[None, :]
        tl.store(dB + out, tl.sum(g * x[:, :, None], 1), mask=mask)
        tl.store(dC + out, tl.sum((faded + x[:, :, None] * b[:, None, :]) * grad[:, :, None], 1), mask=mask)
        back = tl.sum(tl.where(row[:, None, None] == 0, fade * g, 0.0), 0)
    tl.store(dA + sample * D * states + of_state, of_decay, mask=there)


def _launch(u: Tensor, B: Tensor, steps: int) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """Number of programs, sizes (the last two: tiles, and blocks of channels in a group), and block sizes."""
    (batch, length, D), (groups, states) = u.shape, B.shape[-2:]
    steps, channels, deep = min(steps, triton.next_power_of_2(length)), D // groups, triton.next_power_of_2(states)
    # a warp's threads must not be left over for the steps
    wide = max(1, _WARP // deep, min(_THREADS // deep, triton.next_power_of_2(channels)))
    blocks = triton.cdiv(channels, wide)
    sizes = (length, groups, channels, states, triton.cdiv(length, steps), blocks)
    options = {"steps": steps, "wide": wide, "deep": deep, "num_warps": max(1, wide * deep // _WARP)}
    return (batch * groups * blocks,), sizes, options


def forward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_scan.scan` of contiguous tensors that are not empty; a tile has ``steps`` steps at most, a power of two."""
    programs, sizes, options = _launch(u, B, steps)
    y, last = torch.empty_like(u), u.new_empty(u.shape[0], *A.shape)
    entered = u.new_empty(u.shape[0], sizes[-2], *A.shape)
    with torch.cuda.device_of(u):
        _forward_kernel[programs](u, dt, A, B, C, y, last, entered, *sizes, **options)
    return y, last, entered


def backward(
    dy: Tensor,
    dlast: Tensor,
    entered: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_scan.scan_backward`, the same."""
    programs, sizes, options = _launch(u, B, steps)
    du, ddt, dA = torch.empty_like(u), torch.empty_like(u), torch.empty_like(dlast)
    dB, dC = (B.new_empty(B.shape[0], sizes[-1], *B.shape[1:]) for _ in range(2))
    inputs = (dy, dlast, entered, u, dt, A, B, C)
    with torch.cuda.device_of(u):
        _backward_kernel[programs](*inputs, du, ddt, dA, dB, dC, *sizes, **options)
    return du, ddt, dA.sum(0), dB.sum(1), dC.sum(1)
