"""MLPs along one axis of a grid, or over the channels, with a softmax gate: the mixers of TSMixer.

Paper: arXiv:2306.09364 (TSMixer). Checked against huggingface/transformers 5.23.0, models/patchtsmixer.

    mlp(u)  = W2 act(W1 u + b1) + b2          W1: (r n, n), W2: (n, r n), n positions of the axis or n channels
    gate(u) = u * softmax(Wg u + bg)          over the same axis, Wg: (n, n)

    gate "after":  y = gate(mlp(u))           "before":  y = mlp(gate(u))           None:  y = mlp(u)

The gate's weights sum to one, so it shrinks what it passes by about n. With attention (`attn_heads`) a multi-head
self-attention over the axis runs beside the MLP, and y <- norm(y + attention(u)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._layers import Dropout, check_grid, make_activation, make_norm, resample
from ._registry import register_channel_mixer, register_mixer
from .mlp import TokenLinear

_GATES = ("after", "before", None)


class Gate(nn.Module):
    """x * softmax(W x + b) over one axis of ``(B, n, K)``, the second of them or, for channels, the last."""

    def __init__(self, size: int, *, channels: bool = False, device=None, dtype=None):
        super().__init__()
        self.fc = (nn.Linear if channels else TokenLinear)(size, size, device=device, dtype=dtype)
        self.axis = -1 if channels else -2

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x).softmax(self.axis)


def _check_gate(gate: str | None) -> None:
    if gate not in _GATES:
        raise ValueError(f"gate must be 'after', 'before' or None, not {gate!r}")


class _Attention(nn.Module):
    """Multi-head self-attention with separate, biased projections: ``(B, n, C) -> (B, n, C)``."""

    def __init__(self, dim: int, heads: int, drop: float, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads, self.drop = heads, drop
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, **dd) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )  # (B, G, n, D)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(-2))


@register_mixer("gated_mlp", ranks=(1, 2, 3), needs_grid=True, paper="arXiv:2306.09364")
class GatedMlp(nn.Module):
    """Gated MLP along one axis of the grid; all other positions and channels share it.

    Args:
        dim: channels C.
        grid_size: sides of the grid.
        axis: which side is mixed; the last one by default, the patches of a grid (series, patches).
        ratio: hidden width over the n positions of the axis. hidden: that width itself, in place of ``ratio``.
        act: activation, see `make_activation`.
        gate: "after" the MLP, "before" it, or None for none.
        drop: dropout after the MLP, of the attention weights, and unless ``drop_hidden`` is False after the activation.
        attn_heads: heads of a self-attention beside the MLP; 0 for none.
        attn_norm: norm over the sum of the two, see `make_norm`.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``; any other grid is refused.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int],
        axis: int = -1,
        ratio: float = 2.0,
        hidden: int | None = None,
        act: str = "gelu",
        gate: str | None = "after",
        drop: float = 0.0,
        drop_hidden: bool = True,
        attn_heads: int = 0,
        attn_norm: str = "layer",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not -rank <= axis < rank:
            raise ValueError(f"axis must be one of the {rank} of the grid, not {axis}")
        if attn_heads and dim % attn_heads:
            raise ValueError(f"attn_heads must divide the {dim} channels, got {attn_heads}")
        _check_gate(gate)
        dd = {"device": device, "dtype": dtype}
        self.grid_size, self.axis, self.ratio, self.hidden = tuple(grid_size), axis % rank, ratio, hidden
        n = self.grid_size[self.axis]
        width = self._width(n)
        self.gate_first = gate == "before"
        self.fc1 = TokenLinear(n, width, **dd)
        self.act = make_activation(act, **dd)
        self.drop1 = Dropout(drop if drop_hidden else 0.0)
        self.fc2 = TokenLinear(width, n, **dd)
        self.drop2 = Dropout(drop)
        self.gate = Gate(n, **dd) if gate else nn.Identity()
        self.attn = _Attention(dim, attn_heads, drop, **dd) if attn_heads else None
        self.attn_norm = make_norm(attn_norm, dim, eps=1e-5, **dd) if attn_heads else None

    def _width(self, n: int) -> int:
        """Hidden width for n positions."""
        width = int(self.ratio * n) if self.hidden is None else self.hidden
        if width < 1:
            raise ValueError(f"the MLP has no hidden unit: ratio={self.ratio} of {n} positions, hidden={self.hidden}")
        return width

    def grid_of_state(self, state: dict[str, Tensor]) -> tuple[int, ...]:
        """The grid that a state dict of this mixer is for; of the sides that are not mixed it knows nothing."""
        return (*self.grid_size[: self.axis], state["fc1.weight"].shape[1], *self.grid_size[self.axis + 1 :])

    def resize_grid_state(self, state: dict[str, Tensor], old: Sequence[int], new: Sequence[int]) -> dict[str, Tensor]:
        """The mixer's state dict for another grid. The authors give no procedure: positions and hidden units are
        resampled linearly, what is read scaled so that a constant map keeps its values; an approximation."""
        n_old, n = tuple(old)[self.axis], tuple(new)[self.axis]
        width = self._width(n)
        sides = {"fc1": (width, n), "fc2": (n, width), "gate.fc": (n, n)}
        resized = dict(state)
        for name, (rows, columns) in sides.items():
            if f"{name}.weight" in state and n != n_old:
                weight = state[f"{name}.weight"]
                scale = weight.shape[1] / columns
                resized[f"{name}.weight"] = resample(weight[None, None], (rows, columns), "linear")[0, 0] * scale
                resized[f"{name}.bias"] = resample(state[f"{name}.bias"][None, None], (rows,), "linear")[0, 0]
        return resized

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize the matrices to another grid, see `resize_grid_state`; before optimizer, DDP or compile."""
        state = {key: p.data for key, p in self.named_parameters()}
        for key, tensor in self.resize_grid_state(state, self.grid_size, grid_size).items():
            if tensor is not state[key]:
                layer, _, kind = key.rpartition(".")
                module = self.get_submodule(layer)
                setattr(module, kind, nn.Parameter(tensor, requires_grad=getattr(module, kind).requires_grad))
                if kind == "weight":
                    module.out_features, module.in_features = tensor.shape
        self.grid_size = tuple(grid_size)

    def forward(self, x: Tensor) -> Tensor:
        check_grid(x, self.grid_size, "gated_mlp")
        lead, tail = math.prod(self.grid_size[: self.axis]), math.prod(self.grid_size[self.axis + 1 :])
        n, C = self.grid_size[self.axis], x.shape[-1]
        u = x.reshape(-1, n, tail * C)  # (B lead, n, tail C), a view of contiguous maps
        y = self.gate(u) if self.gate_first else u
        y = self.drop2(self.fc2(self.drop1(self.act(self.fc1(y)))))
        y = y if self.gate_first else self.gate(y)
        if self.attn is not None:
            rows = u.reshape(-1, n, tail, C).transpose(1, 2).reshape(-1, n, C)  # (B lead tail, n, C)
            a = self.attn(rows).reshape(-1, tail, n, C).transpose(1, 2).reshape(u.shape)
            y = self.attn_norm((y + a).reshape(-1, lead, n, tail, C))
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, axis={self.axis}"


@register_channel_mixer("gated_mlp", ranks=(1, 2, 3), paper="arXiv:2306.09364")
class GatedChannelMlp(nn.Module):
    """Gated MLP over the channels of every position.

    Args:
        dim: channels C.
        ratio: hidden width over C. hidden: that width itself, in place of ``ratio``.
        act: activation, see `make_activation`.
        gate: "after" the MLP, "before" it, or None for none.
        drop: dropout after the MLP and, unless ``drop_hidden`` is False, after the activation.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        ratio: float = 2.0,
        hidden: int | None = None,
        act: str = "gelu",
        gate: str | None = "after",
        drop: float = 0.0,
        drop_hidden: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_gate(gate)
        dd = {"device": device, "dtype": dtype}
        width = int(ratio * dim) if hidden is None else hidden
        self.gate_first = gate == "before"
        self.fc1 = nn.Linear(dim, width, **dd)
        self.act = make_activation(act, **dd)
        self.drop1 = Dropout(drop if drop_hidden else 0.0)
        self.fc2 = nn.Linear(width, dim, **dd)
        self.drop2 = Dropout(drop)
        self.gate = Gate(dim, channels=True, **dd) if gate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(x) if self.gate_first else x
        y = self.drop2(self.fc2(self.drop1(self.act(self.fc1(y)))))  # (B, *grid, C)
        return y if self.gate_first else self.gate(y)
