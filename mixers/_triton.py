"""Whether Triton's kernels can be used. The package is imported when a kernel is, which takes a second."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# their sums are in float32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def has_kernels_for(x: Tensor) -> bool:
    """Whether kernels in Triton can be launched on this tensor: on CUDA, where it is installed, up to float32."""
    return x.is_cuda and x.dtype in DTYPES and _installed()
