"""Token MLP of MLP-Mixer: two learned matrices over tokens, shared by all channels.

Paper: arXiv:2105.01601. Checked against google-research/vision_transformer at c6de1e5 and timm 1.0.31.

    y = W2 act(W1 x + b1) + b2        x, y: (B, N, C), W1: (M, N), W2: (N, M), tokens row-major over the grid

The matrices multiply from the left, so no map is transposed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._layers import (
    DILATION,
    Dropout,
    by_convolution,
    by_samples,
    check_grid,
    is_symbolic,
    make_activation,
    observed,
    resample,
)
from ._registry import register_mixer

# what a report says of weights over tokens that were resampled to another grid
APPROXIMATE = "an approximation to be fine-tuned"


# tokens from which a convolution is faster than MKL's product, see `linear`; it rearranges tokens in sixteens
_FEWEST = 32


class TokenLinear(nn.Linear):
    """A linear layer over the tokens of ``(B, N, C)``: ``(B, N', C)`` with y = W x + b, one W for all channels."""

    def forward(self, x: Tensor) -> Tensor:
        if by_convolution(x) and min(self.weight.shape) >= _FEWEST:
            # whose channels are the tokens
            return F.conv1d(x, self.weight.unsqueeze(-1), self.bias, dilation=DILATION)
        # bmm and not matmul, which would transpose and copy x to fold the batch into one product
        weight = self.weight.unsqueeze(0).expand(x.shape[0], -1, -1)
        return torch.baddbmm(self.bias.unsqueeze(-1), weight, x)


def resize_token_mlp(state: dict[str, Tensor], old: Sequence[int], new: Sequence[int]) -> dict[str, Tensor]:
    """Tensors of a token MLP (fc1, fc2) for another grid: its tokens are resampled linearly, hidden units stay.

    Columns of W1 are scaled by N / N', so that a constant map keeps its hidden values.
    """
    old, new = tuple(old), tuple(new)
    n_old, n_new = math.prod(old), math.prod(new)
    reads, writes = state["fc1.weight"], state["fc2.weight"]
    hidden = reads.shape[0]
    resized = {
        "fc1.weight": resample(reads.reshape(hidden, 1, *old), new, "linear").reshape(hidden, n_new) * (n_old / n_new),
        "fc2.weight": resample(writes.T.reshape(hidden, 1, *old), new, "linear").reshape(hidden, n_new).T.contiguous(),
        "fc2.bias": resample(state["fc2.bias"].reshape(1, 1, *old), new, "linear").reshape(n_new),
    }
    return {**state, **resized}


def set_token_mlp(module: nn.Module, old: Sequence[int], new: Sequence[int]) -> None:
    """Resize the layers fc1 and fc2 of ``module`` in place, see `resize_token_mlp`; warns that they are approximate."""
    grids = " to ".join("x".join(map(str, grid)) for grid in (old, new))
    warnings.warn(f"a token MLP was resampled from the grid {grids}, {APPROXIMATE}", stacklevel=3)
    tensors = {name: p.data for name, p in module.named_parameters() if name.startswith(("fc1.", "fc2."))}
    for name, tensor in resize_token_mlp(tensors, old, new).items():
        layer, kind = getattr(module, name[:3]), name[4:]
        setattr(layer, kind, nn.Parameter(tensor, requires_grad=getattr(layer, kind).requires_grad))
    module.fc1.in_features = module.fc2.out_features = math.prod(new)


@register_mixer("mlp", ranks=(1, 2, 3), needs_grid=True, paper="arXiv:2105.01601")
class TokenMlp(nn.Module):
    """y = W2 act(W1 x + b1) + b2 over the tokens of a fixed grid.

    Args:
        dim: channels C.
        grid_size: sides of the grid, N is their product.
        ratio: hidden width M over the channels C, as in the paper.
        hidden: hidden width M, in place of ``ratio``.
        act: activation, see `make_activation`: "gelu" (timm's weights) or "gelu_tanh" (Google's).
        drop: dropout after the activation and after the second layer.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``; any other grid is refused.

    b2 adds one number to all channels of a token. Where every reader of the sum is a norm over channels, as in
    MLP-Mixer, it changes nothing and has no gradient.
    """

    # the authors' code has no procedure; reports of loading say so
    resize_note = APPROXIMATE

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int],
        ratio: float = 0.5,
        hidden: int | None = None,
        act: str = "gelu",
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grid_size = tuple(grid_size)
        n = math.prod(self.grid_size)
        hidden = int(ratio * dim) if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"the token MLP has no hidden unit: ratio={ratio} of {dim} channels, hidden={hidden}")
        self.fc1 = TokenLinear(n, hidden, **dd)
        self.act = make_activation(act, **dd)
        self.drop1 = Dropout(drop)
        self.fc2 = TokenLinear(hidden, n, **dd)
        self.drop2 = Dropout(drop)

    @staticmethod
    def resize_grid_state(state: dict[str, Tensor], old: Sequence[int], new: Sequence[int]) -> dict[str, Tensor]:
        """The mixer's state dict for another grid. The authors' code has no procedure: see `resize_token_mlp`, which is
        an approximation to be fine-tuned."""
        return resize_token_mlp(state, old, new)

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize the matrices to another grid, see `resize_grid_state`; before optimizer, DDP or compile."""
        if tuple(grid_size) != self.grid_size:
            set_token_mlp(self, self.grid_size, grid_size)
            self.grid_size = tuple(grid_size)

    def forward(self, x: Tensor) -> Tensor:
        check_grid(x, self.grid_size, "mlp")
        tokens = x.flatten(1, -2)  # (B, N, C)
        if not is_symbolic(x) and observed(self):
            return self._mix(tokens).reshape(x.shape)
        return by_samples(self._mix, tokens, self.fc1.out_features * x.shape[-1]).reshape(x.shape)

    def _mix(self, tokens: Tensor) -> Tensor:
        hidden = self.drop1(self.act(self.fc1(tokens)))  # (B, M, C)
        return self.drop2(self.fc2(hidden))

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}"
