"""Spatial fully connected layer: one learned matrix over tokens, shared by all channels.

Paper: arXiv:2111.11418 (the pppf and ppff ablations). Checked against sail-sg/poolformer at a075575.

    y[b, m, :] = sum_n W[m, n] x[b, n, :]        x, y: (B, *grid, C), tokens row-major over the grid
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ._layers import check_grid, resample_token_matrix
from ._registry import register_mixer


@register_mixer("spatial_fc", ranks=(1, 2, 3), needs_grid=True, paper="arXiv:2111.11418")
class SpatialFC(nn.Module):
    """y = W x over the tokens of a fixed grid, W learned, no bias.

    Args:
        dim: channels; all share W.
        grid_size: sides of the grid, N is their product.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``; any other grid is refused.
    """

    def __init__(self, dim: int, *, rank: int = 2, grid_size: Sequence[int], device=None, dtype=None):
        super().__init__()
        self.grid_size = tuple(grid_size)
        n = math.prod(self.grid_size)
        self.fc = nn.Linear(n, n, bias=False, device=device, dtype=dtype)

    @staticmethod
    def resize_grid_state(state: dict[str, Tensor], old: Sequence[int], new: Sequence[int]) -> dict[str, Tensor]:
        """The mixer's state dict for another grid. The authors give no procedure: W is resampled linearly on both
        sides with its row sums kept, so the result is an approximation."""
        return {**state, "fc.weight": resample_token_matrix(state["fc.weight"], old, new)}

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize W to another grid, see `resize_grid_state`; before optimizer, DDP or compile."""
        if tuple(grid_size) == self.grid_size:
            return
        state = self.resize_grid_state({"fc.weight": self.fc.weight.data}, self.grid_size, grid_size)
        self.fc.weight = nn.Parameter(state["fc.weight"], requires_grad=self.fc.weight.requires_grad)
        self.fc.in_features = self.fc.out_features = self.fc.weight.shape[0]
        self.grid_size = tuple(grid_size)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            check_grid(x, self.grid_size, "spatial_fc")
        tokens = x.flatten(1, -2)  # (B, N, C)
        # one product for every map: of a matrix and a batch torch makes one large product, on transposed copies
        weight = self.fc.weight.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.bmm(weight, tokens).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}"
