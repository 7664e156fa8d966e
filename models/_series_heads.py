"""Heads of patched series, masks over their patches, and the distributions that probabilistic heads give.

Paper: arXiv:2306.09364. Checked against huggingface/transformers 5.23.0. Maps of hidden features are ``(B, C, P, D)``.

A probabilistic head has one linear layer for every parameter of a distribution of each value. With the series' location
and scale:

    student_t           df = 2 + plus(z0), loc = z1, scale = plus(z2)       value = loc_series + scale_series * variate
    normal              loc = z0, scale = plus(z1)                          the same
    negative_binomial   total_count = plus(z0), logits = z1                 logits + log(scale_series)

plus(z) = (z + sqrt(z^2 + 4)) / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributions import AffineTransform, Distribution, NegativeBinomial, Normal, StudentT
from torch.distributions import TransformedDistribution as Transformed

from ..mixers._layers import Dropout
from ..mixers.gated_mlp import Gate

Parameters = tuple[Tensor, ...]


def plus(z: Tensor) -> Tensor:
    """A smooth map to the positive numbers."""
    return (z + (z.square() + 4).sqrt()) / 2


def _scale(z: Tensor) -> Tensor:
    return plus(z).clamp(min=torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Family:
    """A family of distributions.

    Attributes:
        size: number of parameters of one value.
        domain: the parameters from the outputs of their layers.
        used: the layers that the mean needs.
        mean: of the value, from the outputs of these, the series' location and scale.
        build: the distribution of the value, from the parameters and the same two.
    """

    size: int
    domain: Callable[..., Parameters]
    used: tuple[int, ...]
    mean: Callable[..., Tensor]
    build: Callable[[Parameters, Tensor, Tensor], Distribution]


def _affine(base: type[Distribution]) -> Callable[[Parameters, Tensor, Tensor], Distribution]:
    return lambda p, loc, scale: Transformed(base(*p), AffineTransform(loc, scale))


FAMILIES = {
    "student_t": Family(
        3,
        lambda df, loc, scale: (2 + plus(df), loc, _scale(scale)),
        (1,),
        lambda z, loc, scale: z * scale + loc,
        _affine(StudentT),
    ),
    "normal": Family(
        2,
        lambda loc, scale: (loc, _scale(scale)),
        (0,),
        lambda z, loc, scale: z * scale + loc,
        _affine(Normal),
    ),
    "negative_binomial": Family(
        2,
        lambda total, logits: (plus(total), logits),
        (0, 1),
        lambda total, logits, loc, scale: plus(total) * logits.exp() * scale,
        lambda p, loc, scale: NegativeBinomial(p[0], logits=p[1] + scale.log()),
    ),
}


def family_of(distribution: str | None) -> Family | None:
    """The family of that name; None for point estimates."""
    if distribution is not None and distribution not in FAMILIES:
        raise ValueError(f"distribution must be one of {', '.join(FAMILIES)} or None, not {distribution!r}")
    return None if distribution is None else FAMILIES[distribution]


def _outputs(inputs: int, outputs: int, family: Family | None, **dd) -> nn.Module:
    """One linear layer, or one for every parameter."""
    if family is None:
        return nn.Linear(inputs, outputs, **dd)
    return nn.ModuleList(nn.Linear(inputs, outputs, **dd) for _ in range(family.size))


def _apply(layers: nn.Module, x: Tensor, which: Sequence[int] | None) -> Parameters:
    """Outputs of all layers, or of some of them."""
    if isinstance(layers, nn.Linear):
        return (layers(x),)
    return tuple(layers[i](x) for i in (range(len(layers)) if which is None else which))


class ForecastHead(nn.Module):
    """Forecast of every series from all its patches: ``(B, C, P, D)`` to ``(B, T, C)`` for each parameter.

    Args:
        patches, dim, horizon: P, D, T.
        channels: ascending indices of the series to forecast; None for all.
        family: of a probabilistic head. drop: dropout before the layer.
    """

    def __init__(
        self,
        patches: int,
        dim: int,
        horizon: int,
        *,
        channels: Sequence[int] | None = None,
        family: Family | None = None,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.family = family
        self.channels = None if channels is None else list(channels)
        self.drop = Dropout(drop)
        self.time = _outputs(patches * dim, horizon, family, device=device, dtype=dtype)

    def outputs(self, h: Tensor, which: Sequence[int] | None = None) -> Parameters:
        """What the layers give, all or some of them."""
        # all series share the layer, so those that are not asked for need not pass it
        h = h if self.channels is None else h[:, self.channels]
        z = self.drop(h.flatten(2))  # (B, C, P D)
        return tuple(y.transpose(1, 2) for y in _apply(self.time, z, which))

    def forward(self, h: Tensor) -> Parameters:
        return self.outputs(h) if self.family is None else self.family.domain(*self.outputs(h))


class PatchHead(nn.Module):
    """Values of every patch: ``(B, C, P, D) -> (B, C, P, p)``."""

    def __init__(self, dim: int, length: int, *, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.drop = Dropout(drop)
        self.patch = nn.Linear(dim, length, device=device, dtype=dtype)

    def forward(self, h: Tensor) -> Tensor:
        return self.patch(self.drop(h))


POOLS = ("max", "avg", "last", None)


class PooledHead(nn.Module):
    """Outputs of all series together: ``(B, C, P, D) -> (B, K)`` for each parameter.

    Args:
        shape: (C, P, D). outputs: K.
        pool: over the patches: "max", "avg", "last", or None to read all.
        family: of a probabilistic head. drop: dropout before the layer.
        limits: lower and upper bound of the outputs, by a sigmoid.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        outputs: int,
        *,
        pool: str | None = "max",
        family: Family | None = None,
        drop: float = 0.0,
        limits: Sequence[float] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be 'max', 'avg', 'last' or None, not {pool!r}")
        C, P, D = shape
        self.pool, self.family, self.limits = pool, family, limits
        self.drop = Dropout(drop)
        self.fc = _outputs(C * D * (1 if pool else P), outputs, family, device=device, dtype=dtype)

    def reset(self, outputs: int) -> None:
        """A new linear layer."""
        weight = self.fc.weight
        self.fc = nn.Linear(weight.shape[1], outputs, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def outputs(self, h: Tensor, which: Sequence[int] | None = None) -> Parameters:
        """What the layers give, all or some of them."""
        if self.pool == "max":
            z = h.amax(2)  # (B, C, D)
        elif self.pool == "avg":
            z = h.mean(2)
        else:
            # without pooling the patches come last
            z = h[:, :, -1] if self.pool else h.transpose(2, 3)
        return _apply(self.fc, self.drop(z.flatten(1)), which)

    def forward(self, h: Tensor) -> Parameters:
        outputs = self.outputs(h)
        if self.family is not None:
            return self.family.domain(*outputs)
        if self.limits is None:
            return outputs
        low, high = self.limits
        return (outputs[0].sigmoid() * (high - low) + low,)


class ScaleInjection(nn.Module):
    """Location and scale of a series joined to its features: ``(B, C, P, D) -> (B, C, P, D)``.

        s = W4 (W3 [loc, scale] + b3) + b4,   h <- W2 (W1 [h, s] + b1) + b2

    There is no activation between the layers, so their product, which is small, is formed first.
    """

    def __init__(self, dim: int, expansion: int = 2, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.inner = nn.Linear(dim + 2, expansion * dim, **dd)
        self.outer = nn.Linear(expansion * dim, dim, **dd)
        self.scale_inner = nn.Linear(2, 2 * expansion, **dd)
        self.scale_outer = nn.Linear(2 * expansion, 2, **dd)

    def forward(self, h: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        D = h.shape[-1]
        s = self.scale_outer(self.scale_inner(torch.cat([loc, scale], 1).transpose(1, 2)))  # (B, C, 2)
        weight = self.outer.weight @ self.inner.weight  # (D, D + 2)
        bias = self.outer(self.inner.bias.unsqueeze(0))  # (1, D)
        added = s @ weight[:, D:].t() + bias  # (B, C, D)
        return h @ weight[:, :D].t() + added.unsqueeze(2)


class CrossChannelHead(nn.Module):
    """Reconciliation of forecasts across channels: y + W gate(windows of y) + b, ``(B, T, C) -> (B, T, C)``.

    The window of a step has the ``radius`` steps before and after it of all channels, zeros beyond the ends. The paper
    has no public code: this follows its section on the cross-channel head.
    """

    def __init__(self, channels: int, radius: int, *, device=None, dtype=None):
        super().__init__()
        if radius < 0:
            raise ValueError(f"cross_channel, steps on either side, must be at least 0, not {radius}")
        self.radius = radius
        size = (2 * radius + 1) * channels
        self.gate = Gate(size, channels=True, device=device, dtype=dtype)
        self.fc = nn.Linear(size, channels, device=device, dtype=dtype)

    def forward(self, y: Tensor) -> Tensor:
        k = self.radius
        windows = nn.functional.pad(y, (0, 0, k, k)).unfold(1, 2 * k + 1, 1)  # (B, T, C, 2k + 1)
        return y + self.fc(self.gate(windows.flatten(2)))


class PatchMask(nn.Module):
    """Which patches a pre-training hides: 1 in a mask ``(B, C, P)``.

    In training masks are drawn; in eval mode all samples have one mask, always the same, so that a loss can be compared
    with another.

    Args:
        channels, patches: C, P.
        kind: "random", a share of the patches, or "forecast", the last patches.
        ratio: share of a random mask. counts: numbers of last patches, shared evenly among the samples of a batch.
        consistent: a random mask is the same for all channels. exempt: indices of channels that are never hidden.
        value: what stands in hidden patches.
    """

    def __init__(
        self,
        channels: int,
        patches: int,
        *,
        kind: str,
        ratio: float,
        counts: Sequence[int],
        consistent: bool,
        exempt: Sequence[int],
        value: float,
    ):
        super().__init__()
        if kind not in ("random", "forecast"):
            raise ValueError(f"mask must be 'random' or 'forecast', not {kind!r}")
        if not 0 < ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, not {ratio}")
        if kind == "forecast" and (not counts or not all(0 < n < patches for n in counts)):
            raise ValueError(f"mask_patches must be between 1 and {patches - 1}, less than the patches; got {counts}")
        self.kind, self.ratio, self.counts, self.consistent = kind, ratio, tuple(counts), consistent
        self.channels, self.patches, self.value = channels, patches, value
        visible = torch.ones(channels, 1)
        visible[list(exempt)] = 0.0
        self.register_buffer("visible", visible.to(torch.get_default_device()), persistent=False)
        fixed = self.draw(1, torch.Generator().manual_seed(0))[0]
        self.register_buffer("fixed", fixed.to(torch.get_default_device()), persistent=False)

    def draw(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """A mask for every sample, on the CPU: ``(B, C, P)``, before channels are exempt."""
        options = {"generator": generator, "device": "cpu"}
        if self.kind == "random":
            noise = torch.rand(batch, 1 if self.consistent else self.channels, self.patches, **options)
            kept = int(self.patches * (1 - self.ratio))
            mask = (noise.argsort(-1).argsort(-1) >= kept).float()
        else:
            counts = torch.tensor(self.counts, device="cpu")[torch.arange(batch, device="cpu") % len(self.counts)]
            counts = counts[torch.randperm(batch, **options)]
            steps = torch.arange(self.patches, device="cpu")
            mask = (steps >= self.patches - counts.view(-1, 1, 1)).float()
        return mask.expand(batch, self.channels, self.patches)

    def forward(self, batch: int, like: Tensor) -> Tensor:
        """Masks for a batch on the device and in the dtype of ``like``."""
        mask = self.draw(batch).to(like) if self.training else self.fixed.to(like).expand(batch, -1, -1)
        return mask * self.visible.to(like)
