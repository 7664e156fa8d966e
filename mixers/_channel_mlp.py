"""The channel MLP, the usual second half of a MetaFormer block.

y = act(x W1 + b1) W2 + b2        x, y: (B, *grid, C), hidden width int(ratio C)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from ._layers import Dropout, Linear, activated, make_activation
from ._registry import register_channel_mixer


@register_channel_mixer("mlp", ranks=(1, 2, 3), paper="arXiv:1706.03762")
class ChannelMlp(nn.Module):
    """Two linear layers over the channels of every position.

    Args:
        dim: channels C.
        ratio: hidden width over C.
        act: activation between the layers, see `make_activation`.
        bias: biases of both layers.
        drop: dropout after the activation and after the second layer.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        ratio: float = 4.0,
        act: str = "gelu",
        bias: bool = True,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = int(ratio * dim)
        self.fc1 = Linear(dim, hidden, bias=bias, **dd)
        self.act = make_activation(act, **dd)
        self.drop1 = Dropout(drop)
        self.fc2 = Linear(hidden, dim, bias=bias, **dd)
        self.drop2 = Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(activated(x, self.fc1, self.act))  # (B, *grid, ratio C)
        return self.drop2(self.fc2(x))
