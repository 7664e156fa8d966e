"""The residual branch and the MetaFormer block.

Paper: arXiv:2111.11418. Maps are channels-last, ``(B, *grid, C)``.

    branch, pre-norm:   x <- r x + DropPath(l op(norm(x)))
    branch, post-norm:  x <- norm(r x + DropPath(l op(x)))
    block:              a token branch, then a channel branch

l (layer scale, arXiv:2103.17239) and r (residual scale, arXiv:2110.09456) are optional vectors over the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.layers import DropPath
from torch import Tensor

from ..mixers import CHANNEL_MIXERS, TOKEN_MIXERS
from ..mixers._layers import make_norm
from ..mixers._registry import Registry, split_spec
from ._averaging import Chain


class ResidualBranch(nn.Module):
    """Norm, operation, scales and drop path around one residual addition.

    Args:
        norm: applied to the input of ``op``, or to the sum if ``post_norm``.
        op: a token mixer, a channel mixer, or any module that keeps the shape.
        dim: channels C of the scales; needed only with a scale.
        layer_scale: initial value of l, or None for none (0 is a value).
        res_scale: initial value of r, or None for none.
        res_bias: add a learned vector to the scaled skip too, which begins at zero.
        drop_path: probability of dropping the branch for a sample in training (arXiv:1603.09382).
        post_norm: put the norm after the addition.
        drop: dropout of the result of ``op``.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``. ``extras`` are keyword arguments for ``op``.
    """

    def __init__(
        self,
        norm: nn.Module,
        op: nn.Module,
        *,
        dim: int | None = None,
        layer_scale: float | None = None,
        res_scale: float | None = None,
        res_bias: bool = False,
        drop_path: float = 0.0,
        post_norm: bool = False,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if dim is None and (layer_scale is not None or res_scale is not None or res_bias):
            raise ValueError("a residual branch with layer_scale, res_scale or res_bias needs dim, their channels")

        def scale(value: float | None) -> nn.Parameter | None:
            return None if value is None else nn.Parameter(torch.full((dim,), value, device=device, dtype=dtype))

        self.norm = norm
        self.op = op
        self.layer_scale = scale(layer_scale)
        self.res_scale = scale(res_scale)
        self.res_bias = scale(0.0 if res_bias else None)
        self.drop = nn.Dropout(drop) if drop > 0 else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.post_norm = post_norm

    def forward(self, x: Tensor, extras: dict[str, Tensor] | None = None) -> Tensor:
        y = x if self.post_norm else self.norm(x)
        if torch.jit.is_scripting():  # noqa: SIM108 - TorchScript would compile the **
            y = self.op(y)
        else:
            y = self.op(y) if extras is None else self.op(y, **extras)
        y = self.drop_path(self.drop(y))
        if self.res_bias is not None:
            y = y + self.res_bias
        # one fused multiply-add where there is one scale
        if self.res_scale is not None:
            y = torch.addcmul(y if self.layer_scale is None else y * self.layer_scale, x, self.res_scale)
        elif self.layer_scale is not None:
            y = torch.addcmul(x, y, self.layer_scale)
        else:
            y = x + y
        return self.norm(y) if self.post_norm else y


class BareBranch(nn.Module):
    """An operation that brings its own norms and skips, where a block has a `ResidualBranch` for others."""

    def __init__(self, op: nn.Module):
        super().__init__()
        self.op = op

    def forward(self, x: Tensor, extras: dict[str, Tensor] | None = None) -> Tensor:
        if torch.jit.is_scripting():  # noqa: SIM108 - TorchScript would compile the **
            y = self.op(x)
        else:
            y = self.op(x) if extras is None else self.op(x, **extras)
        return y


def make_branch(
    registry: Registry,
    spec: Any,
    dim: int,
    *,
    rank: int = 2,
    grid_size: Sequence[int] | None = None,
    norm: str | None,
    norm_eps: float,
    layer_scale: float | None = None,
    res_scale: float | None = None,
    drop_path: float = 0.0,
    post_norm: bool = False,
    drop: float = 0.0,
    device=None,
    dtype=None,
) -> ResidualBranch | BareBranch:
    """The branch of a mixer that is given by name; see `MetaFormerBlock` for the arguments."""
    dd = {"device": device, "dtype": dtype}
    grid = {"rank": rank, "grid_size": grid_size}
    if registry[split_spec(spec)[0]].self_contained:
        return BareBranch(registry.create(spec, dim, **grid, drop_path=drop_path, **dd))
    op, norm_layer = registry.create(spec, dim, **grid, **dd), make_norm(norm, dim, eps=norm_eps, **dd)
    scales = {"layer_scale": layer_scale, "res_scale": res_scale}
    return ResidualBranch(norm_layer, op, dim=dim, **scales, drop_path=drop_path, post_norm=post_norm, drop=drop, **dd)


class MetaFormerBlock(nn.Module):
    """Token branch, then channel branch, both mixers given by name.

    Args:
        dim: channels C.
        token_mixer, channel_mixer: a name or ``(name, {options})``.
        rank: rank of the grid.
        grid_size: the grid, for mixers whose parameters depend on it.
        norm: "layer", "layer_nobias", "group" or "group_nobias", see `make_norm`; "group" sees the whole map.
        norm_eps: added to the variance.
        layer_scale, res_scale, drop_path, post_norm: see `ResidualBranch`; the same for both branches. A mixer that
            brings its own norms and skips takes the drop path alone.
        drop: dropout of the results of the token mixer and of the channel mixer, one for both or a pair.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``. Of ``extras`` each mixer gets the inputs it was registered with. In a
    ``chain``, which has no extras, the branches take what that gives them.
    """

    def __init__(
        self,
        dim: int,
        *,
        token_mixer: Any,
        channel_mixer: Any = "mlp",
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        norm: str = "layer",
        norm_eps: float = 1e-6,
        layer_scale: float | None = None,
        res_scale: float | None = None,
        drop_path: float = 0.0,
        post_norm: bool = False,
        drop: float | Sequence[float] = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        common = {"rank": rank, "grid_size": grid_size, "norm": norm, "norm_eps": norm_eps, "drop_path": drop_path}
        common |= {"layer_scale": layer_scale, "res_scale": res_scale, "post_norm": post_norm}
        common |= {"device": device, "dtype": dtype}
        drops = tuple(drop) if isinstance(drop, Sequence) else (drop, drop)
        self.token = make_branch(TOKEN_MIXERS, token_mixer, dim, **common, drop=drops[0])
        self.channel = make_branch(CHANNEL_MIXERS, channel_mixer, dim, **common, drop=drops[1])
        self._grid_ops = tuple(
            name
            for name, registry, spec in (
                ("token", TOKEN_MIXERS, token_mixer),
                ("channel", CHANNEL_MIXERS, channel_mixer),
            )
            if registry.needs_grid(spec)
        )
        self.extra_inputs = TOKEN_MIXERS.extra_inputs(token_mixer), CHANNEL_MIXERS.extra_inputs(channel_mixer)

    @property
    def branches(self) -> tuple[tuple[str, nn.Module], ...]:
        """The kind of every branch, "token" or "channel", and the branch, in order."""
        return ("token", self.token), ("channel", self.channel)

    def forward(self, x: Tensor, extras: dict[str, Tensor] | None = None, chain: Chain | None = None) -> Tensor:
        if chain is not None:
            return chain.run(self.branches)
        if torch.jit.is_scripting() or extras is None:
            return self.channel(self.token(x))
        for_token, for_channel = ({k: v for k, v in extras.items() if k in names} for names in self.extra_inputs)
        return self.channel(self.token(x, for_token), for_channel)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize the mixers whose parameters depend on the grid."""
        for name in self._grid_ops:
            getattr(self, name).op.set_grid_size(grid_size)
