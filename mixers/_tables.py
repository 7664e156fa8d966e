"""Constant matrices of fixed transforms, and the float32 islands that use them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

Build = Callable[..., Tensor]


def island(x: Tensor) -> AbstractContextManager:
    """Context in which autocast leaves the arithmetic on ``x`` alone."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def widen(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exporting() -> bool:
    """Whether a graph is captured for a runtime that may have no FFT and no complex numbers."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def table(build: Build, like: Tensor, *args: Any) -> Tensor:
    """``build(*args, device=)``, as a rule computed in float64, in the dtype and on the device of ``like``.

    It is built once and kept, except in graphs that torch.compile or torch.export capture, which build their own.
    """
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        # on the device of the graph, so that no copy from the host remains in it
        return build(*args, device=like.device).to(like.dtype)
    return _kept(build, args, like.dtype, like.device)


def left_product(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix (R, N)`` over the second-last axis of ``x (..., N, K)``."""
    # bmm and not matmul, which in training transposes and copies x to fold the batch into one product
    flat = x.flatten(0, -3)
    y = torch.bmm(matrix.expand(flat.shape[0], -1, -1), flat)
    return y.reshape(*x.shape[:-2], matrix.shape[0], x.shape[-1])


@lru_cache(maxsize=512)
def _kept(build: Build, args: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Build in a thread of its own, where no tracer, inference mode or dispatch mode of the caller is on."""
    built = []
    thread = threading.Thread(target=lambda: built.append(build(*args, device="cpu").to(device, dtype)))
    thread.start()
    thread.join()
    return built[0]
