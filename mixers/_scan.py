"""The selective scan (S6): a linear recurrence whose decay, input and readout depend on the input.

Papers: arXiv:2312.00752 (Mamba), arXiv:2403.19888 (MambaMixer). Checked against state-spaces/mamba at e9594ce.

    dt = softplus(delta + delta_bias)
    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  h_0 = 0         h: (D, N) for every sample
    y_t = (C_t h_t + D u_t) silu(z_t)

Time is cut into segments, a segment into K blocks of T steps. The same step of all blocks is one operation, so Python
takes T steps and not K T: blocks run from zero, their states are carried on by P_k = exp(A sum dt), and blocks run
again from the states they enter with. Only exponentials of numbers below zero occur, so that any decay and any length
are safe. The backward pass keeps the states that enter segments and makes the others anew; nothing of size (L, D, N)
lives between the passes. Arithmetic is in float32, or float64 where the inputs are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._counting import Values, count, numel, shape
from ._tables import island, widen

# states advanced by one operation: enough to keep it busy, few enough to stay in a processor's cache
_WIDTH = 2**17
_BLOCKS, _STEPS, _LONGEST = 8, 32, 256


def _plan(length: int, width: int) -> tuple[int, int]:
    """Blocks K of a segment and their steps T, for ``width`` states at a time."""
    if width >= _WIDTH:
        return 1, min(length, _LONGEST)
    blocks = max(1, min(_BLOCKS, _WIDTH // max(1, width)))
    steps = _STEPS if length > blocks * _STEPS else -(-length // blocks)
    return blocks, max(1, steps)


class _Segments:
    """Views of sequences by segments, ``(T, B, K, G, H, .)``, padded at the end by identity steps of dt = 0.

    Args:
        u, dt: (B, D, L). A: (D, N). B, C: (B, G, N, L); channel d belongs to group d // (D / G).
    """

    def __init__(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor):
        self.inputs = u, dt, B, C
        self.batch, self.channels, self.length = u.shape
        self.groups, self.states = B.shape[1], A.shape[1]
        self.each = self.channels // self.groups
        self.A = A.reshape(self.groups, self.each, self.states)
        self.blocks, self.steps = _plan(self.length, self.batch * self.channels * self.states)
        self.span = self.blocks * self.steps
        self.count = -(-self.length // self.span) if self.length else 0

    def state(self) -> Tensor:
        return self.A.new_zeros(self.batch, *self.A.shape)

    def cut(self, x: Tensor, i: int) -> Tensor:
        """Segment i of ``(B, ..., L)``, time first: ``(T, B, K, ...)``."""
        part = x[..., i * self.span : (i + 1) * self.span]
        part = F.pad(part, (0, self.span - part.shape[-1])).unflatten(-1, (self.blocks, self.steps))
        return part.movedim((-1, -2), (0, 2)).contiguous()

    def channels_of(self, x: Tensor, i: int) -> Tensor:
        """Segment i of ``(B, D, L)``: ``(T, B, K, G, H)``."""
        return self.cut(x.unflatten(1, (self.groups, self.each)), i)

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Segments ``(T, B, K, ...)`` as ``(B, ..., L)``."""
        whole = torch.stack(parts).movedim((0, 3, 1), (-3, -2, -1)).flatten(-3)  # from (S, T, B, K, ...)
        return whole[..., : self.length]

    def decays(self, dt: Tensor) -> Tensor:
        """P of every block: ``(B, K, G, H, N)``."""
        return torch.exp(dt.sum(0).unsqueeze(-1) * self.A)


def _carried(local: Tensor, decay: Tensor, first: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """What enters each block, and what leaves the last one, of block results ``(B, K, ...)`` that began at zero."""
    entering, state = torch.empty_like(local), first
    blocks = range(local.shape[1])
    for k in reversed(blocks) if reverse else blocks:
        entering[:, k] = state
        state = torch.addcmul(local[:, k], decay[:, k], state)
    return entering, state


def _forward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Readout ``(B, D, L)``, last state, and the states that enter segments ``(S, B, G, H, N)``."""
    parts = _Segments(u, dt, A, B, C)
    state, entered, ys = parts.state(), [], []
    for i in range(parts.count):
        entered.append(state)
        dts, us = (parts.channels_of(t, i).unsqueeze(-1) for t in (dt, u))  # (T, B, K, G, H, 1)
        Bs = parts.cut(B, i).unsqueeze(-2)  # (T, B, K, G, 1, N)
        Cs = parts.cut(C, i).unsqueeze(-1)  # (T, B, K, G, N, 1)
        xs = dts * us
        h = xs.new_zeros(parts.batch, parts.blocks, *parts.A.shape)
        a = torch.empty_like(h)
        if parts.blocks > 1:
            for t in range(parts.steps):
                torch.mul(dts[t], parts.A, out=a)
                h.mul_(a.exp_()).addcmul_(xs[t], Bs[t])
            h, state = _carried(h, parts.decays(dts.squeeze(-1)), state)
        else:
            h.copy_(state.unsqueeze(1))
        y = xs.new_empty(parts.steps, parts.batch, parts.blocks, *parts.A.shape[:2])
        for t in range(parts.steps):
            torch.mul(dts[t], parts.A, out=a)
            h.mul_(a.exp_()).addcmul_(xs[t], Bs[t])
            y[t] = torch.matmul(h, Cs[t]).squeeze(-1)
        if parts.blocks == 1:
            state = h[:, 0].clone()
        ys.append(y)
    y = parts.joined(ys).flatten(1, 2) if ys else torch.empty_like(u)
    entered = torch.stack(entered) if entered else state.new_empty(0, *state.shape)
    return y, state.flatten(1, 2), entered


def _segment_states(
    parts: _Segments, dts: Tensor, xs: Tensor, Bs: Tensor, state: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """Decays of all steps of a segment, and its states with those before the first: ``(T (+ 1), B, K, G, H, N)``."""
    a = torch.exp_(dts * parts.A)
    h = a.new_zeros(parts.steps + 1, *a.shape[1:])
    if parts.blocks > 1:
        local = h[0].clone()
        for t in range(parts.steps):
            local.mul_(a[t]).addcmul_(xs[t], Bs[t])
        h[0] = _carried(local, decay, state)[0]
    else:
        h[0, :, 0] = state
    for t in range(parts.steps):
        torch.mul(h[t], a[t], out=h[t + 1])
        h[t + 1].addcmul_(xs[t], Bs[t])
    return a, h


def _adjoints(
    parts: _Segments, a: Tensor, dys: Tensor, Cs: Tensor, last: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of all states of a segment, and of the state that enters it, from that of the one that leaves it."""
    g = torch.empty_like(a)
    if parts.blocks > 1:
        r = torch.zeros_like(a[0])
        for t in reversed(range(parts.steps)):
            r.addcmul_(dys[t], Cs[t]).mul_(a[t])
        r, first = _carried(r, decay, last, reverse=True)
    else:
        r = last.unsqueeze(1).clone()
    for t in reversed(range(parts.steps)):
        torch.addcmul(r, dys[t], Cs[t], out=g[t])
        torch.mul(g[t], a[t], out=r)
    return g, first if parts.blocks > 1 else r[:, 0]


def _backward(
    dy: Tensor, dlast: Tensor, entered: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C."""
    parts = _Segments(u, dt, A, B, C)
    last = dlast.unflatten(1, (parts.groups, parts.each)).clone()
    dA = torch.zeros_like(parts.A)
    found: list[list[Tensor]] = [[], [], [], []]
    for i in reversed(range(parts.count)):
        dts, us, dys = (parts.channels_of(t, i).unsqueeze(-1) for t in (dt, u, dy))
        Bs, Cs = (parts.cut(t, i).unsqueeze(-2) for t in (B, C))  # (T, B, K, G, 1, N)
        xs, decay = dts * us, parts.decays(dts.squeeze(-1))
        a, h = _segment_states(parts, dts, xs, Bs, entered[i], decay)
        g, last = _adjoints(parts, a, dys, Cs, last, decay)
        dx = torch.matmul(g, Bs.mT)  # (T, B, K, G, H, 1)
        dB = torch.matmul(xs.mT, g).squeeze(-2)  # (T, B, K, G, N)
        dC = torch.matmul(dys.mT, h[1:]).squeeze(-2)
        e = a.mul_(g).mul_(h[:-1])
        dA += (e * dts).sum((0, 1, 2))
        ddt = e.mul_(parts.A).sum(-1, keepdim=True).addcmul_(us, dx)
        for results, part in zip(found, ((dts * dx).squeeze(-1), ddt.squeeze(-1), dB, dC), strict=True):
            results.append(part)
    if not parts.count:
        return tuple(torch.zeros_like(t) for t in (u, dt, A, B, C))
    du, ddt, dB, dC = (parts.joined(results[::-1]) for results in found)
    return du.flatten(1, 2), ddt.flatten(1, 2), dA.reshape(A.shape), dB, dC


@torch.library.custom_op("mixzoo::selective_scan", mutates_args=())
def _operator(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.contiguous() for t in _forward(u, dt, A, B, C))


@_operator.register_fake
def _(u, dt, A, B, C):
    batch, channels, length = u.shape
    groups = B.shape[1]
    blocks, steps = _plan(length, batch * channels * A.shape[1]) if isinstance(batch, int) else (1, 1)
    segments = -(-length // (blocks * steps))
    state = u.new_empty(segments, batch, groups, channels // groups, A.shape[1])
    return u.new_empty(batch, channels, length), u.new_empty(batch, channels, A.shape[1]), state


@torch.library.custom_op("mixzoo::selective_scan_backward", mutates_args=())
def _operator_backward(
    dy: Tensor, dlast: Tensor, entered: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.contiguous() for t in _backward(dy, dlast, entered, u, dt, A, B, C))


@_operator_backward.register_fake
def _(dy, dlast, entered, u, dt, A, B, C):
    return tuple(t.new_empty(t.shape) for t in (u, dt, A, B, C))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[2])


def _differentiate(ctx, dy: Tensor, dlast: Tensor, _entered: Tensor):
    *inputs, entered = ctx.saved_tensors
    return _operator_backward(dy, dlast, entered, *inputs)


_operator.register_autograd(_differentiate, setup_context=_keep)


@count("mixzoo::selective_scan", column="matmul")
def _count(inputs: Values, outputs: Values) -> dict[str, int]:
    """Two multiply-adds for every state, its update and its readout; three other operations for its decay and input.

    VMamba's tables count nine for all of that.
    """
    elements = numel(inputs[0]) * shape(inputs[2])[1]
    return {"matmul": 2 * elements, "other": 3 * elements, "activations": numel(outputs[0])}


def _per_channel(x: Tensor, u: Tensor, groups: int) -> Tensor:
    """B or C as ``(B, groups, N, L)``: given by group, by all channels, or for all steps ``(D, N)``."""
    batch, channels, length = u.shape
    if x.ndim == 2:
        x = x.reshape(1, channels, -1, 1).expand(batch, -1, -1, length)
    elif x.ndim == 3:
        x = x.unsqueeze(1)
    if x.shape[1] == groups:
        return x
    return x.repeat_interleave(groups // x.shape[1], 1)


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    if u.ndim != 3 or delta.shape != u.shape:
        raise ValueError(f"u and delta must be (B, D, L) alike, got {tuple(u.shape)} and {tuple(delta.shape)}")
    batch, channels, length = u.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be (D, N) with D = {channels}, got {tuple(A.shape)}")
    states = A.shape[1]
    for name, x in (("B", B), ("C", C)):
        constant = x.ndim == 2 and x.shape == (channels, states)
        grouped = x.ndim == 4 and x.shape[1] > 0 and channels % x.shape[1] == 0
        varying = (x.ndim == 3 or grouped) and x.shape[0] == batch and x.shape[-2:] == (states, length)
        if not constant and not varying:
            raise ValueError(
                f"{name} must be (B, N, L), (B, G, N, L) with G dividing D, or (D, N), for (B, D, L, N) = "
                f"{(batch, channels, length, states)}; got {tuple(x.shape)}"
            )


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan, exact, for any length and decay; see the module's docstring.

    Args:
        u, delta: input and step size, ``(B, D, L)``.
        A: ``(D, N)``, not positive.
        B, C: ``(B, N, L)``; ``(B, G, N, L)``, of which channel d uses group d // (D / G); or ``(D, N)`` for all steps,
            which takes memory for every channel and step.
        D: ``(D,)``, weight of the input in the output.
        z: ``(B, D, L)``, whose SiLU multiplies the output.
        delta_bias: ``(D,)``, added to delta.
        delta_softplus: whether the step is the softplus of delta; otherwise delta must not be negative.
        return_last_state: return ``(y, h_L)``, the second ``(B, D, N)``.

    Returns:
        y ``(B, D, L)`` in the dtype of u. It can be differentiated once.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(u, delta, A, B, C)
    with island(u):
        x, dt, decay = widen(u), widen(delta), widen(A)
        if delta_bias is not None:
            dt = dt + delta_bias.to(dt.dtype).unsqueeze(-1)
        if delta_softplus:
            dt = F.softplus(dt)
        groups = max(x.shape[1] if t.ndim == 2 else 1 if t.ndim == 3 else t.shape[1] for t in (B, C))
        if any(groups % (t.shape[1] if t.ndim == 4 else 1) for t in (B, C)):
            raise ValueError(f"the groups of B and C must divide each other, got {tuple(B.shape)} and {tuple(C.shape)}")
        reads = [_per_channel(widen(t), x, groups).to(x.dtype) for t in (B, C)]
        y, last, _ = _operator(x, dt.to(x.dtype), decay.to(x.dtype), *reads)
        if D is not None:
            y = torch.addcmul(y, x, D.to(y.dtype).unsqueeze(-1))
        if z is not None:
            y = y * F.silu(widen(z))
    y = y.to(u.dtype)
    return (y, last) if return_last_state else y
