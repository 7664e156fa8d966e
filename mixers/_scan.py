"""The selective scan (S6): a linear recurrence whose decay, input and readout depend on the input.

Papers: arXiv:2312.00752 (Mamba), arXiv:2403.19888 (MambaMixer). Checked against state-spaces/mamba at e9594ce.

    dt = softplus(delta + delta_bias)
    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  h_0 = 0         h: (D, N) for every sample
    y_t = (C_t h_t + D u_t) silu(z_t)

Time is cut into blocks of T steps, and the same step of K blocks is one operation: blocks run from zero, their states
are carried on by P_k = exp(A sum dt), and blocks run again from the states they enter with. A batch runs in slices.
Only exponentials of numbers below zero occur, so that any decay and any length are safe. The backward pass keeps the
states that enter blocks and makes the others anew; nothing of size (L, D, N) lives between the passes. Arithmetic is in
float32, or float64 where the inputs are, also under autocast. On CUDA a kernel in Triton does the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._counting import Values, count, numel, shape
from ._tables import island, widen
from ._triton import has_kernels_for

BACKENDS = ("torch", "triton")

# most steps of a block, whose entering states are all that is kept
_STEPS = 32
# states advanced by one operation: enough to keep it busy; on a CPU all steps of a block should fit the cache
_WIDTH, _WIDTH_ELSEWHERE = 2**15, 2**20


def _width(device: torch.device) -> int:
    return _WIDTH if device.type == "cpu" else _WIDTH_ELSEWHERE


def blocks_of(length: int) -> int:
    """Blocks that a sequence is cut into."""
    return max(1, -(-length // _STEPS))


class _Plan:
    """Cuts of sequences ``(B, L, ...)`` into blocks, time first: ``(T, B, K, ...)``; steps of dt = 0 fill the last one.

    A segment is a run of blocks that advance together.
    """

    def __init__(self, u: Tensor, A: Tensor, B: Tensor):
        self.batch, self.length, channels = u.shape
        self.groups, self.states = B.shape[-2:]
        self.A = A.reshape(self.groups, channels // self.groups, self.states)  # (G, H, N)
        self.blocks = blocks_of(self.length)
        self.steps = -(-self.length // self.blocks)
        together = max(1, min(self.blocks, _width(u.device) // max(1, self.batch * A.numel())))
        self.segments = [range(k, min(k + together, self.blocks)) for k in range(0, self.blocks, together)]

    def cut(self, x: Tensor, segment: range) -> Tensor:
        """Blocks of ``(B, L, ...)``: ``(T, B, K, ...)``."""
        part = x[:, segment.start * self.steps : segment.stop * self.steps]
        missing = len(segment) * self.steps - part.shape[1]
        if missing:
            part = torch.cat([part, part.new_zeros(part.shape[0], missing, *part.shape[2:])], 1)
        return part.unflatten(1, (len(segment), self.steps)).movedim(2, 0).contiguous()

    def channels(self, x: Tensor, segment: range) -> Tensor:
        """Blocks of ``(B, L, D)``: ``(T, B, K, G, H, 1)``."""
        return self.cut(x, segment).unflatten(-1, (self.groups, -1)).unsqueeze(-1)

    def join(self, part: Tensor, whole: Tensor, segment: range) -> None:
        """Write blocks ``(T, B, K, ...)`` into ``(B, L, ...)``."""
        start = segment.start * self.steps
        stop = min(segment.stop * self.steps, self.length)
        flat = part.movedim(0, 2).flatten(1, 2)[:, : stop - start]  # (B, L', ...)
        whole[:, start:stop] = flat.reshape(flat.shape[:2] + whole.shape[2:])


def _carried(local: Tensor, decay: Tensor, state: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """What enters each block, and what leaves the last one, of block results ``(B, K, ...)`` that began at zero."""
    entering = torch.empty_like(local)
    blocks = range(local.shape[1])
    for k in reversed(blocks) if reverse else blocks:
        entering[:, k] = state
        state = torch.addcmul(local[:, k], decay[:, k], state)
    return entering, state


def _run(a: Tensor, h: Tensor, first: Tensor) -> None:
    """h_t <- a_t h_{t-1} + h_t in place over the first axis, from ``first``."""
    for t in range(len(h)):
        first = h[t].addcmul_(a[t], first)


def _forward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `scan`."""
    plan = _Plan(u, A, B)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    state = A.new_zeros(plan.batch, *plan.A.shape)
    entered = A.new_empty(plan.batch, plan.blocks, *plan.A.shape)
    for segment in plan.segments if plan.length else ():
        dts = plan.channels(dt, segment)
        a = torch.mul(dts, plan.A).exp_()  # (T, B, K, G, H, N)
        h = (dts * plan.channels(u, segment)) * plan.cut(B, segment).unsqueeze(-2)
        within = entered[:, segment.start : segment.stop]
        if len(segment) > 1:
            local = h[0]
            for t in range(1, plan.steps):
                local = torch.addcmul(h[t], a[t], local)
            within[:], state = _carried(local, torch.exp(dts.sum(0) * plan.A), state)
            _run(a, h, within)
        else:
            within[:, 0] = state
            _run(a, h, within)
            state = h[-1, :, 0]
        plan.join(torch.matmul(h, plan.cut(C, segment).unsqueeze(-1)), y, segment)
    return y, state.flatten(1, 2).clone(), entered.flatten(2, 3)


def _adjoints(a: Tensor, g: Tensor, decay: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """g_t <- g_t + a_{t+1} g_{t+1} over blocks ``(T, B, K, ...)``, and a_0 g_0 of the first of them.

    Args:
        decay: P of every block, ``(B, K, ...)``. back: that product of what comes after them, ``(B, ...)``.
    """
    several = g.shape[2] > 1
    if several:
        local = g[-1]
        for t in reversed(range(1, len(g))):
            local = torch.addcmul(g[t - 1], a[t], local)
        backs, back = _carried(a[0] * local, decay, back, reverse=True)
        g[-1] += backs
    else:
        g[-1, :, 0] += back
    for t in reversed(range(1, len(g))):
        g[t - 1].addcmul_(a[t], g[t])
    return g, back if several else a[0, :, 0] * g[0, :, 0]


def _backward(
    dy: Tensor, dlast: Tensor, entered: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `scan_backward`."""
    plan = _Plan(u, A, B)
    entered = entered.unflatten(2, plan.A.shape[:2])
    back = dlast.unflatten(1, plan.A.shape[:2])  # of the state that leaves the segment
    dA = torch.zeros_like(plan.A)
    du, ddt, dB, dC = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (u, dt, B, C))
    for segment in reversed(plan.segments) if plan.length else ():
        dts, us, dys = (plan.channels(t, segment) for t in (dt, u, dy))
        Bs, Cs = (plan.cut(t, segment).unsqueeze(-2) for t in (B, C))  # (T, B, K, G, 1, N)
        xs = dts * us
        a = torch.mul(dts, plan.A).exp_()  # (T, B, K, G, H, N)
        h, first = xs * Bs, entered[:, segment.start : segment.stop]
        _run(a, h, first)
        g, back = _adjoints(a, dys * Cs, torch.exp(dts.sum(0) * plan.A), back)
        plan.join(torch.matmul(xs.mT, g), dB, segment)
        plan.join(torch.matmul(dys.mT, h), dC, segment)
        dx = torch.matmul(g, Bs.mT)  # (T, B, K, G, H, 1)
        a.mul_(g)
        a[1:].mul_(h[:-1])
        a[0].mul_(first)
        dA += (a * dts).sum((0, 1, 2))
        plan.join(dts * dx, du, segment)
        plan.join(a.mul_(plan.A).sum(-1, keepdim=True).addcmul_(us, dx), ddt, segment)
    return du, ddt, dA.reshape(A.shape), dB, dC


def _slices(u: Tensor, A: Tensor) -> list[slice]:
    """Parts of the batch that run one after another, so that memory does not grow with it."""
    size = max(1, _width(u.device) // max(1, A.numel()))
    return [slice(i, i + size) for i in range(0, u.shape[0], size)] or [slice(None)]


@torch.library.custom_op("mixzoo::selective_scan", mutates_args=())
def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence on channels-last sequences of one floating-point dtype.

    Args:
        u, dt: (B, L, D). A: (D, N). B, C: (B, L, G, N).
        triton: whether by the kernel in Triton, see `has_kernels_for`.

    Returns:
        y (B, L, D), the last state (B, D, N), and the states that enter blocks, (B, blocks_of(L), D, N).
    """
    if triton and u.numel():
        from . import _scan_triton as kernels

        return kernels.forward(*(t.contiguous() for t in (u, dt, A, B, C)), _STEPS)
    parts = _slices(u, A)
    if len(parts) == 1:
        return _forward(u, dt, A, B, C)
    return tuple(map(torch.cat, zip(*(_forward(u[i], dt[i], A, B[i], C[i]) for i in parts), strict=True)))


@torch.library.custom_op("mixzoo::selective_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor, dlast: Tensor, entered: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C from those of y and of the last state."""
    if triton and u.numel():
        from . import _scan_triton as kernels

        return kernels.backward(*(t.contiguous() for t in (dy, dlast, entered, u, dt, A, B, C)), _STEPS)
    parts = _slices(u, A)
    if len(parts) == 1:
        return _backward(dy, dlast, entered, u, dt, A, B, C)
    found = [_backward(dy[i], dlast[i], entered[i], u[i], dt[i], A, B[i], C[i]) for i in parts]
    du, ddt, dA, dB, dC = zip(*found, strict=True)
    return torch.cat(du), torch.cat(ddt), torch.stack(dA).sum(0), torch.cat(dB), torch.cat(dC)


@scan.register_fake
def _(u, dt, A, B, C, triton):
    batch, length, _ = u.shape
    states = A.shape
    return u.new_empty(u.shape), u.new_empty(batch, *states), u.new_empty(batch, blocks_of(length), *states)


@scan_backward.register_fake
def _(dy, dlast, entered, u, dt, A, B, C, triton):
    return tuple(t.new_empty(t.shape) for t in (u, dt, A, B, C))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1], output[2])
    ctx.triton = inputs[-1]


def _differentiate(ctx, dy: Tensor, dlast: Tensor, _entered: Tensor):
    *inputs, entered = ctx.saved_tensors
    return *scan_backward(dy, dlast, entered, *inputs, ctx.triton), None


scan.register_autograd(_differentiate, setup_context=_keep)


@count("mixzoo::selective_scan", column="transform")
def _count(inputs: Values, _outputs: Values) -> dict[str, int]:
    """Two multiply-adds for every state, its update and its readout; three other operations for its decay and input.

    VMamba's tables count nine for all of that.
    """
    elements = numel(inputs[0]) * shape(inputs[2])[1]
    return {"transform": 2 * elements, "other": 3 * elements}


def _composed(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Of torch's own operators alone, for programs that leave this process: steps are composed by twos, fours, ..."""
    groups = B.shape[2]
    dts = dt.unflatten(2, (groups, -1)).unsqueeze(-1)  # (B, L, G, H, 1)
    a = torch.exp(dts * A.unflatten(0, (groups, -1)))  # (B, L, G, H, N)
    h = dts * u.unflatten(2, (groups, -1)).unsqueeze(-1) * B.unsqueeze(3)
    steps = 1
    while steps < u.shape[1]:
        h = torch.cat([h[:, :steps], h[:, steps:] + a[:, steps:] * h[:, :-steps]], 1)
        a = torch.cat([a[:, :steps], a[:, steps:] * a[:, :-steps]], 1)
        steps *= 2
    return torch.matmul(h, C.unsqueeze(-1)).flatten(2), h[:, -1].flatten(1, 2)


def recurrence(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """y and the last state of `scan`, by a backend of `selective_scan`.

    Raises:
        ValueError, RuntimeError: a backend that does not exist, or cannot run here.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, not {backend!r}")
    if torch.compiler.is_exporting():
        return _composed(u, dt, A, B, C)
    triton = backend != "torch" and has_kernels_for(u)
    if backend == "triton" and not triton:
        raise RuntimeError(
            "backend 'triton' needs the package triton, and inputs of at most 32 bits on a CUDA device; these are "
            f"{u.dtype} on {u.device}"
        )
    return scan(u, dt, A, B, C, triton)[:2]


def _by_step(x: Tensor, u: Tensor, groups: int) -> Tensor:
    """B or C as ``(B, L, groups, N)``: given by group, by all channels, or for all steps ``(D, N)``."""
    if x.ndim == 2:
        return x.expand(u.shape[0], u.shape[2], -1, -1)
    x = x.unsqueeze(1) if x.ndim == 3 else x
    x = x.permute(0, 3, 1, 2)  # (B, L, G, N)
    return x if x.shape[2] == groups else x.repeat_interleave(groups // x.shape[2], 2)


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
    *,
    backend: str | None = None,
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
        backend: "torch"; "triton", which needs a CUDA device; None for Triton where it can run, and torch elsewhere.
            Both agree.

    Returns:
        y ``(B, D, L)`` in the dtype of u. It can be differentiated once.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend. RuntimeError: a backend that cannot run here.
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
        reads = [_by_step(widen(t), x, groups).to(x.dtype) for t in (B, C)]
        y, last = recurrence(x.mT, dt.mT.to(x.dtype), decay.to(x.dtype), *reads, backend)
        y = y.mT
        if D is not None:
            y = torch.addcmul(y, x, D.to(y.dtype).unsqueeze(-1))
        if z is not None:
            y = y * F.silu(widen(z))
    y = y.to(u.dtype)
    return (y, last) if return_last_state else y
