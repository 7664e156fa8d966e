"""Learning rates over a run, as functions of the updates done: nothing to save, a resumed run asks again.

A schedule is ``(done, updates, warm) -> (share of the peak rate, first beta of Adam or None for the optimiser's own)``
with the updates done, all updates of the run, and those of the warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer

Schedule = Callable[[int, float, float], tuple[float, float | None]]

# one cycle: first and last share of the peak rate, and the betas between which Adam's first one moves against the rate
_FIRST, _LAST = 1 / 25, 1 / 25e4
_BETAS = 0.95, 0.85


def cosine(done: int, updates: float, warm: float) -> tuple[float, float | None]:
    """Linear from 0.1 % over the warm-up, then the rest of a cosine from the start of the run to 1 %."""
    if done < warm:
        return 1e-3 + done / warm * (1 - 1e-3), None
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done / updates))), None


def linear(done: int, updates: float, warm: float) -> tuple[float, float | None]:
    """Linear from 0 over the warm-up, then to 0."""
    if done < warm:
        return done / warm, None
    return max(0.0, (updates - done) / (updates - warm)), None


def constant(done: int, updates: float, warm: float) -> tuple[float, float | None]:
    """Linear from 0 over the warm-up, then the peak."""
    return min(1.0, done / warm) if warm else 1.0, None


def _cycle(done: int, updates: float, warm: float, ease: Callable[[float], float]) -> tuple[float, float | None]:
    """Up over the warm-up and down over the rest, Adam's first beta down and up, as torch's `OneCycleLR` has it."""
    top = max(warm - 1, 1e-9)
    if done <= top:
        way = ease(done / top)
        return _FIRST + (1 - _FIRST) * way, _BETAS[0] + (_BETAS[1] - _BETAS[0]) * way
    way = ease(min(1.0, (done - top) / max(updates - 1 - top, 1e-9)))
    return 1 + (_LAST - 1) * way, _BETAS[1] + (_BETAS[0] - _BETAS[1]) * way


def one_cycle(done: int, updates: float, warm: float) -> tuple[float, float | None]:
    """One cycle along cosines (arXiv:1708.07120)."""
    return _cycle(done, updates, warm, lambda way: 0.5 * (1 - math.cos(math.pi * way)))


def one_cycle_linear(done: int, updates: float, warm: float) -> tuple[float, float | None]:
    """One cycle along straight lines."""
    return _cycle(done, updates, warm, lambda way: way)


SCHEDULES: dict[str, Schedule] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "one-cycle": one_cycle,
    "one-cycle-linear": one_cycle_linear,
}


def set_rates(optimizer: Optimizer, peak: float, share: float, beta: float | None) -> None:
    """Give every group ``share`` of the peak rate, times its own ``lr_scale``, and Adam its first beta."""
    for group in optimizer.param_groups:
        group["lr"] = peak * share * group.get("lr_scale", 1.0)
        if beta is not None and "betas" in group:
            group["betas"] = (beta, *group["betas"][1:])
