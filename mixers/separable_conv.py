"""Inverted separable convolution as a token mixer.

Papers: arXiv:1801.04381 (MobileNetV2), arXiv:2210.13452 (ConvFormer). Checked against sail-sg/metaformer at 64c534a.

    y = dwconv_k(StarReLU(x W1)) W2        x, y: (B, *grid, C); W1: C -> M, W2: M -> C

The depthwise kernel has k^rank taps and zero padding; positions that a mask tells to be padding are zero to it too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from ._depthwise import make_depthwise
from ._layers import Linear, make_activation
from ._registry import register_mixer


@register_mixer("separable_conv", ranks=(1, 2, 3), extra_inputs=("mask",), paper="arXiv:2210.13452")
class SeparableConv(nn.Module):
    """Linear, activation, depthwise convolution, linear.

    Args:
        dim: channels C.
        rank: 1, 2 or 3.
        kernel_size: odd side k of the depthwise kernel.
        expansion: hidden width M = int(expansion C).
        act: activation after the first linear layer, see `make_activation`.
        bias: biases of all three layers.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``, any grid; ``mask`` (B, *grid) is true at valid positions.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        kernel_size: int = 7,
        expansion: float = 2.0,
        act: str = "star_relu",
        bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, so that the map keeps its size; got {kernel_size}")
        dd = {"device": device, "dtype": dtype}
        hidden = int(expansion * dim)
        self.pwconv1 = Linear(dim, hidden, bias=bias, **dd)
        self.act = make_activation(act, **dd)
        self.dwconv = make_depthwise(hidden, (kernel_size,) * rank, bias=bias, **dd)
        self.pwconv2 = Linear(hidden, dim, bias=bias, **dd)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.act(self.pwconv1(x))  # (B, *grid, M)
        if mask is not None:
            y = y * mask.unsqueeze(-1).to(y.dtype)
        y = self.dwconv(y.movedim(-1, 1)).movedim(1, -1)  # a view and back: channels-last memory stays as it is
        return self.pwconv2(y)
