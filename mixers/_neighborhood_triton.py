"""Neighbourhood application on CUDA, in Triton; `_neighborhood` says what is computed and is the reference."""

from __future__ import annotations

from torch import Tensor


def runs(x: Tensor) -> bool:
    """Whether the kernels can be launched on this tensor."""
    return False


def apply(weights: Tensor, values: Tensor, height: int, width: int) -> Tensor:
    raise NotImplementedError


def backward(grad: Tensor, weights: Tensor, values: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
