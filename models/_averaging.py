"""Learned combinations of everything that a chain of residual branches has computed so far.

Paper: arXiv:2403.19888 (MambaMixer, eqs 19 and 20); the idea is that of arXiv:2402.02622 (DenseFormer).

    input of a branch = sum_i a_i T_i + sum_j b_j C_j       T, C: results of token and of channel branches so far

Both lists begin with the input of the chain. Weights are scalars of any sign. They begin at 1 for the latest result and
0 for the others, which is the plain chain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..mixers._counting import Values, count, numel


def _accumulated(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    if weights.device.type == "cpu":
        # numbers keep the loops vectorised, which tensors of one element do not; elsewhere reading them would wait
        total = maps[0] * weights[0].item()
        for x, weight in zip(maps[1:], weights[1:].tolist(), strict=True):
            total.add_(x, alpha=weight)
        return total
    total = maps[0] * weights[0]
    for x, weight in zip(maps[1:], weights[1:], strict=True):
        total.addcmul_(x, weight)
    return total


@torch.library.custom_op("mixzoo::weighted_sum", mutates_args=())
def weighted_sum(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``sum_i weights[i] maps[i]`` of maps of one shape and dtype, without a copy of any; weights ``(n,)``."""
    return _accumulated(maps, weights.to(maps[0].dtype)).contiguous()


@torch.library.custom_op("mixzoo::weighted_sum_backward", mutates_args=())
def _backward(grad: Tensor, maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Gradients of the weights."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    flat = grad.reshape(-1).to(wide)
    return torch.stack([torch.dot(x.reshape(-1).to(wide), flat) for x in maps]).to(weights.dtype)


@weighted_sum.register_fake
def _(maps, weights):
    return maps[0].new_empty(maps[0].shape)


@_backward.register_fake
def _(grad, maps, weights):
    return torch.empty_like(weights)


def _keep(ctx, inputs, output) -> None:
    maps, weights = inputs
    ctx.save_for_backward(*maps, weights)


def _differentiate(ctx, grad: Tensor):
    *maps, weights = ctx.saved_tensors
    shares = [grad * weight for weight in weights.to(grad.dtype).unbind()]
    return shares, _backward(grad, maps, weights)


weighted_sum.register_autograd(_differentiate, setup_context=_keep)


@count("mixzoo::weighted_sum", column="other")
def _count(inputs: Values, outputs: Values) -> int:
    """A multiplication for every map, an addition for all but the first."""
    return (2 * numel(inputs[1]) - 1) * numel(outputs[0])


def _average(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    """`weighted_sum`, or the same of torch's own operators alone, for programs that leave this process."""
    if not torch.compiler.is_exporting():
        return weighted_sum(maps, weights)
    return sum(x * weight for x, weight in zip(maps, weights.to(maps[0].dtype).unbind(), strict=True))


class Chain:
    """A run of residual branches, each on a weighted sum of the chain's input and all results so far.

    Args:
        x: input of the chain.
        weights: for every branch a vector, those of token branches' results first.
        recompute: keep no activations of branches for the backward pass, but make them anew.
    """

    def __init__(self, x: Tensor, weights: Sequence[Tensor], recompute: bool = False):
        self.earlier: dict[str, list[Tensor]] = {"token": [x], "channel": [x]}
        self.weights, self.recompute, self.done = weights, recompute, 0

    def run(self, branches: Sequence[tuple[str, nn.Module]]) -> Tensor:
        """Result of the last of ``branches``, the next ones of the chain, each with its kind."""
        y = None
        for kind, branch in branches:
            x = _average([*self.earlier["token"], *self.earlier["channel"]], self.weights[self.done])
            y = checkpoint(branch, x, use_reentrant=False) if self.recompute else branch(x)
            self.earlier[kind].append(y)
            self.done += 1
        return y


class WeightedAverages(nn.Module):
    """Runs blocks whose branches are one chain.

    Args:
        kinds: "token" or "channel" for every branch, in order.

    The weights of all branches are one vector, branch by branch.
    """

    def __init__(self, kinds: Sequence[str], *, device=None, dtype=None):
        super().__init__()
        known, latest, parts = {"token": 1, "channel": 1}, 0, []
        for kind in kinds:
            part = torch.zeros(sum(known.values()), device=device, dtype=dtype)
            part[latest] = 1
            parts.append(part)
            known[kind] += 1
            latest = known["token"] - 1 if kind == "token" else sum(known.values()) - 1
        self.sizes = [len(part) for part in parts]
        self.weight = nn.Parameter(torch.cat(parts))

    def forward(self, x: Tensor, blocks: Sequence[nn.Module], recompute: bool = False) -> Tensor:
        """``blocks`` have the branches that the module was built for; see `Chain`."""
        chain = Chain(x, self.weight.split(self.sizes), recompute)
        for block in blocks:
            x = block(x, chain=chain)
        return x

    def extra_repr(self) -> str:
        return f"{len(self.sizes)} branches, {sum(self.sizes)} weights"
