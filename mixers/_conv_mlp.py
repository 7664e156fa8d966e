"""The channel MLP with a depthwise convolution inside, which sees the neighbours of a position.

Paper: arXiv:2106.13797 (PVT v2). Checked against badripatro/svt at fcbc9b3.

    y = act(dwconv_k(x W1 + b1)) W2 + b2        x, y: (B, *grid, C), hidden width int(ratio C)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from ._depthwise import make_depthwise
from ._layers import Linear, make_activation
from ._registry import register_channel_mixer


@register_channel_mixer("conv_mlp", ranks=(1, 2, 3), paper="arXiv:2106.13797")
class ConvMlp(nn.Module):
    """Linear, depthwise convolution with zero padding, activation, linear; all with biases.

    Args:
        dim: channels C.
        rank: 1, 2 or 3.
        ratio: hidden width over C.
        kernel_size: odd side k of the depthwise kernel.
        act: activation, see `make_activation`.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        ratio: float = 4.0,
        kernel_size: int = 3,
        act: str = "gelu",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, so that the map keeps its size; got {kernel_size}")
        dd = {"device": device, "dtype": dtype}
        hidden = int(ratio * dim)
        self.fc1 = Linear(dim, hidden, **dd)
        self.dwconv = make_depthwise(hidden, (kernel_size,) * rank, **dd)
        self.act = make_activation(act, **dd)
        self.fc2 = Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)  # (B, *grid, M)
        y = self.dwconv(y.movedim(-1, 1)).movedim(1, -1)
        return self.fc2(self.act(y))
