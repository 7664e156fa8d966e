"""Random mixing: a frozen random matrix over tokens.

Paper: arXiv:2210.13452 (RandFormer). Checked against sail-sg/metaformer at 64c534a.

    y[b, m, :] = sum_n R[m, n] x[b, n, :]        x, y: (B, *grid, C), tokens row-major over the grid

R is N x N, row-softmax of U[0, 1), drawn once a mixer and never trained. It cannot be drawn again, so it is saved
with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ._layers import check_grid, resample, resample_token_matrix
from ._registry import register_mixer


@register_mixer("random", ranks=(1, 2, 3), needs_grid=True, paper="arXiv:2210.13452")
class RandomMixing(nn.Module):
    """y = R x over the tokens of a fixed grid, R a buffer: saved and counted, never trained.

    Args:
        dim: channels; all share R.
        grid_size: sides of the grid, N is their product.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``; any other grid is refused.
    """

    # buffers that `complexity` counts as frozen parameters
    frozen_weights = ("random_matrix",)

    def __init__(self, dim: int, *, rank: int = 2, grid_size: Sequence[int], device=None, dtype=None):
        super().__init__()
        self.grid_size = tuple(grid_size)
        n = math.prod(self.grid_size)
        # not a parameter, which whoever unfreezes a model would train, and in which no gradient ever arrives
        self.register_buffer("random_matrix", torch.empty(n, n, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new matrix from torch's global generator."""
        with torch.no_grad():
            self.random_matrix.copy_(torch.rand_like(self.random_matrix).softmax(dim=-1))

    @staticmethod
    def resize_grid_state(state: dict[str, Tensor], old: Sequence[int], new: Sequence[int]) -> dict[str, Tensor]:
        """The mixer's state dict for another grid. The authors give no procedure: entries are taken from the nearest
        positions, and rows are scaled to keep their sums, so the result is an approximation."""
        matrix = state["random_matrix"]
        resized = resample_token_matrix(matrix, old, new, "nearest")
        sums = resample(matrix.sum(1).reshape(1, 1, *old), new, "nearest").reshape(-1, 1)
        return {**state, "random_matrix": resized * (sums / resized.sum(1, keepdim=True))}

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize R to another grid, see `resize_grid_state`; before optimizer, DDP or compile."""
        if tuple(grid_size) == self.grid_size:
            return
        state = self.resize_grid_state({"random_matrix": self.random_matrix}, self.grid_size, grid_size)
        self.random_matrix = state["random_matrix"]
        self.grid_size = tuple(grid_size)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            check_grid(x, self.grid_size, "random mixing")
        tokens = x.flatten(1, -2)  # (B, N, C)
        return torch.matmul(self.random_matrix.to(x.dtype), tokens).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}"
