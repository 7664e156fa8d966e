"""Raft token mixing: MLPs over the columns, then over the rows of a map, each with a group of channels joined to it.

Paper: arXiv:2108.04384 (RaftMLP). Checked against okojoalg/raft-mlp at 6060d5d.

C = r Co channels, channel k Co + o belongs to place k of raft o. With G rows (columns) and expansion e,

    x <- x + V(LN(x));  x <- x + H(LN(x))
    V: for every column w and raft o, v[k G + h] = x[h, w, k Co + o];  v <- W2 gelu(W1 v + b1) + b2
    H: the same over rows, v[k G + w] = x[h, w, k Co + o]        W1: (e r G, r G), W2: (r G, e r G)

On a map of another grid than the weights' the authors resize the features, not the weights: bicubically to the grid of
the weights before V and back after H, with the skips inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, register_notrace_module
from torch import Tensor

from ._layers import check_grid
from ._registry import register_mixer
from ._tables import left_product, table
from .mlp import TokenLinear


def _bicubic(old: int, new: int, dtype: torch.dtype, *, device) -> Tensor:
    """Weights ``(new, old)`` of bicubic interpolation along one axis, corners not aligned, no antialiasing.

    Positions are computed in ``dtype``, whose rounding is part of the authors' results: 1e-5 of a pixel in float32.
    """
    eye = torch.eye(old, device=device, dtype=dtype).reshape(1, old, old, 1)
    return F.interpolate(eye, size=[new, 1], mode="bicubic", align_corners=False).reshape(old, new).t()


@register_notrace_module
class BicubicResize(nn.Module):
    """``(B, H, W, C)`` to the grid of its arguments as `F.interpolate` has it, corners not aligned, no antialiasing.

    Two small matrix products: deterministic also in its gradient, and defined for every precision.
    """

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        b, h, w, c = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        if h != height:
            x = left_product(table(_bicubic, x, h, height, dtype), x.reshape(b, h, w * c)).reshape(b, height, w, c)
        if w != width:
            x = left_product(table(_bicubic, x, w, width, dtype), x)
        return x  # (B, height, width, C)


class RaftAxis(nn.Module):
    """Norm and MLP over one axis of ``(B, H, W, C)``, with the rafts joined to it.

    Args:
        dim: channels C.
        length: positions G along the axis.
        vertical: mix along the columns rather than along the rows.
        raft_size: channels r of a raft, a divisor of C.
        expansion: hidden width over r G.
        norm_eps: of the layer norm over the channels.

    Shapes: ``(B, H, W, C) -> (B, H, W, r, Co)``, a view of the MLP's output, to be added without a copy.

    The norm's parameters are in the order of the authors' tokens, raft after raft: o r + k for channel k Co + o.
    """

    def __init__(
        self,
        dim: int,
        length: int,
        *,
        vertical: bool,
        raft_size: int,
        expansion: float,
        norm_eps: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.raft_size = raft_size
        self.vertical = vertical
        width = raft_size * length
        self.norm = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.fc1 = TokenLinear(width, int(expansion * width), **dd)
        self.act = nn.GELU()
        self.fc2 = TokenLinear(int(expansion * width), width, **dd)

    def _normed(self, x: Tensor) -> Tensor:
        weight, bias, r = self.norm.weight, self.norm.bias, self.raft_size
        if r > 1:
            weight, bias = weight.reshape(-1, r).t().reshape(-1), bias.reshape(-1, r).t().reshape(-1)
        return F.layer_norm(x, [x.shape[-1]], weight, bias, self.norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        r = self.raft_size
        rafts = self._normed(x).reshape(b, h, w, r, c // r)
        if self.vertical:
            tokens = rafts.permute(0, 3, 1, 2, 4).reshape(b, r * h, w * (c // r))  # (B, r H, W Co)
            y = self.fc2(self.act(self.fc1(tokens)))
            return y.reshape(b, r, h, w, c // r).permute(0, 2, 3, 1, 4)
        tokens = rafts.permute(0, 1, 3, 2, 4).reshape(b * h, r * w, c // r)  # (B H, r W, Co)
        y = self.fc2(self.act(self.fc1(tokens)))
        return y.reshape(b, h, r, w, c // r).permute(0, 1, 3, 2, 4)


@register_mixer("raft", ranks=(2,), needs_grid=True, self_contained=True, paper="arXiv:2108.04384")
class Raft(nn.Module):
    """Vertical, then horizontal raft mixing, each with its norm and skip.

    Args:
        dim: channels C.
        grid_size: (H, W) of the maps.
        raft_size: channels r that are mixed together with an axis, a divisor of C.
        expansion: hidden width e over the r G inputs.
        norm_eps: of both norms.
        drop_path: probability of dropping either half for a sample in training.
        weight_grid: (H, W) the weights are laid out for, ``grid_size`` if None. On another grid features are resized.

    Shapes: ``(B, H, W, C) -> (B, H, W, C)``; any other grid than ``grid_size`` is refused.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int],
        raft_size: int = 2,
        expansion: float = 2.0,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        weight_grid: Sequence[int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if raft_size < 1 or dim % raft_size:
            raise ValueError(f"raft_size must divide the {dim} channels, got {raft_size}")
        self.grid_size = tuple(grid_size)
        self.weight_grid = self.grid_size if weight_grid is None else tuple(weight_grid)
        self.rafts = (raft_size, dim // raft_size)
        own = {"raft_size": raft_size, "expansion": expansion, "norm_eps": norm_eps, "device": device, "dtype": dtype}
        self.vertical = RaftAxis(dim, self.weight_grid[0], vertical=True, **own)
        self.horizontal = RaftAxis(dim, self.weight_grid[1], vertical=False, **own)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.resize = BicubicResize()

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Take maps of another grid, by the authors' procedure: the weights stay, features are resized to theirs."""
        self.grid_size = tuple(grid_size)

    def forward(self, x: Tensor) -> Tensor:
        check_grid(x, self.grid_size, "raft")
        if self.weight_grid != self.grid_size:
            x = self.resize(x, self.weight_grid[0], self.weight_grid[1])
        x = (x.unflatten(-1, self.rafts) + self.drop_path1(self.vertical(x))).flatten(3)
        x = (x.unflatten(-1, self.rafts) + self.drop_path2(self.horizontal(x))).flatten(3)
        if self.weight_grid != self.grid_size:
            x = self.resize(x, self.grid_size[0], self.grid_size[1])
        return x

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, weight_grid={self.weight_grid}"
