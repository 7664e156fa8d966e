"""Identity mixer: no exchange between tokens, the lower bound of the MetaFormer studies.

Papers: arXiv:2111.11418 (metaformer_id), arXiv:2210.13452 (IdentityFormer).

    y = x        x, y: (B, *grid, C)

In a block the branch is still x + norm(x), not a no-op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from ._registry import register_mixer


@register_mixer("identity", ranks=(1, 2, 3), extra_inputs=("mask",), paper="arXiv:2210.13452")
class Identity(nn.Module):
    """y = x on maps of any rank, so that no position sees padding. Shapes: ``(B, *grid, C) -> (B, *grid, C)``."""

    def __init__(self, dim: int, *, rank: int = 2, grid_size: Sequence[int] | None = None, device=None, dtype=None):
        super().__init__()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x
