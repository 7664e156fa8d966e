"""Gating by a network inside the network: a whole Mixer block makes the gate of a linear layer.

Paper: arXiv:2403.02411 (NiNformer). Checked against Abdullah-88/NiNformer at 0ec85d4.

    z1 = x + FFt(LNt(x)^T)^T;  gate = z1 + FFc(LNc(z1))        FFt: N -> M -> N over tokens, FFc: C -> M -> C
    y  = (x P + p) * gate                                      x, y: (B, *grid, C)

FF is Linear, GELU, dropout, Linear, dropout. The gate has its own norms and skips and no activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from ._channel_mlp import ChannelMlp
from ._layers import Linear, check_grid
from ._registry import register_mixer
from .mlp import APPROXIMATE, TokenMlp


@register_mixer("nin_gating", ranks=(1, 2, 3), needs_grid=True, paper="arXiv:2403.02411")
class NinGating(nn.Module):
    """Linear layer times the Mixer block of the same input.

    Args:
        dim: channels C.
        grid_size: sides of the grid, N is their product.
        hidden: hidden width M of both MLPs; 2 C if None.
        norm_eps: of the norms inside the gate.
        drop: dropout after the activation and after the second layer of both MLPs.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``; any other grid is refused.
    """

    resize_note = APPROXIMATE

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int],
        hidden: int | None = None,
        norm_eps: float = 1e-5,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = 2 * dim if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"hidden must be a positive integer or None, not {hidden!r}")
        self.grid_size = tuple(grid_size)
        self.token_norm = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.token = TokenMlp(dim, rank=rank, grid_size=grid_size, hidden=hidden, drop=drop, **dd)
        self.channel_norm = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.channel = ChannelMlp(dim, rank=rank, ratio=hidden / dim, drop=drop, **dd)
        self.proj = Linear(dim, dim, **dd)

    @staticmethod
    def resize_grid_state(state: dict[str, Tensor], old: Sequence[int], new: Sequence[int]) -> dict[str, Tensor]:
        """The mixer's state dict for another grid: its token MLP resampled, an approximation to be fine-tuned. The
        authors train anew for every number of tokens."""
        inner = {key.removeprefix("token."): t for key, t in state.items() if key.startswith("token.")}
        resized = TokenMlp.resize_grid_state(inner, old, new)
        return {**state, **{f"token.{key}": tensor for key, tensor in resized.items()}}

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize the token MLP to another grid, see `resize_grid_state`; before optimizer, DDP or compile."""
        self.token.set_grid_size(grid_size)
        self.grid_size = tuple(grid_size)

    def forward(self, x: Tensor) -> Tensor:
        check_grid(x, self.grid_size, "nin_gating")
        gate = x + self.token(self.token_norm(x))
        gate = gate + self.channel(self.channel_norm(gate))
        return self.proj(x) * gate

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}"
