"""What every model of time series shares: its sizes, checks of its inputs, scalers and instance norms.

Letters: B batch, L past steps, T future steps, C channels (series), F time features, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

from ..mixers._layers import is_symbolic, undecayed
from ..mixers._tables import widen


class SeriesModel(nn.Module):
    """Abstract model of time series: ``past_values`` ``(B, L, C)`` to a forecast ``(B, T, C)`` or what its head gives.

    Attributes:
        context_length, prediction_length, num_channels: L, T, C.
        forward_inputs: names of the optional inputs that this model takes.
        task: what the head is for; models with several tasks write it in their constructor.
        config: name and options it was created with.
        class_names: of a classifier, or None.
    """

    modality = "series"
    task = "forecast"

    def __init__(self, *, context_length: int, prediction_length: int, num_channels: int):
        super().__init__()
        sizes = {
            "context_length": context_length,
            "prediction_length": prediction_length,
            "num_channels": num_channels,
        }
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
            setattr(self, name, value)
        self.forward_inputs: tuple[str, ...] = ()
        self.config: dict = {}
        self.class_names: list[str] | None = None

    def get_classifier(self) -> nn.Module | None:
        """The last linear layer of a classifier; None for the other tasks."""
        return self.head.fc if self.task == "classification" else None

    def reset_classifier(self, num_classes: int) -> None:
        """New last layer of a classifier.

        Raises:
            ValueError: the model is no classifier.
        """
        if self.task != "classification":
            raise ValueError(f"this {type(self).__name__} is for {self.task} and has no classifier to reset")
        self.head.reset(num_classes)
        self.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay besides vectors and biases."""
        return undecayed(self)

    def check(self, past_values: Tensor, optional: Mapping[str, Tensor | None], any_channels: bool = False) -> None:
        """Raise unless this model takes these inputs; graphs are captured without the check.

        Raises:
            ValueError: a wrong shape, with the one that is wanted, or an input that the model has no use for.
        """
        given = [name for name, value in optional.items() if value is not None]
        unused = [name for name in given if name not in self.forward_inputs]
        if unused:
            takes = ", ".join(self.forward_inputs) or "none"
            raise ValueError(
                f"{type(self).__name__} as configured has no use for {unused[0]}; optional inputs: {takes}"
            )
        if is_symbolic(past_values):
            return
        L, C = self.context_length, self.num_channels
        shape = tuple(past_values.shape)
        if past_values.ndim != 3 or shape[1] != L or not (any_channels or shape[2] == C):
            raise ValueError(f"past_values must be (B, {L}, {'C' if any_channels else C}), got {shape}")
        for name in given:
            if not name.startswith(("past_", "future_")):
                continue
            steps = self.prediction_length if name.startswith("future") else L
            if optional[name].shape[:2] != (shape[0], steps):
                raise ValueError(f"{name} must be ({shape[0]}, {steps}, ...), got {tuple(optional[name].shape)}")


class StdScaler(nn.Module):
    """Location and scale of every series: mean and standard deviation over the observed steps.

        loc = sum(m x) / n,  scale = sqrt(sum((m (x - loc))^2) / n + 1e-5),  n = max(sum m, 1)

    ``(B, L, C) -> ((x - loc) / scale, loc, scale)``, the last two ``(B, 1, C)``. Gradients pass through the statistics,
    which are computed in float32. Unobserved steps count in neither, but are scaled like the others: fill them.
    """

    def forward(self, x: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        wide = widen(x)
        if observed is None:
            variance, loc = torch.var_mean(wide, 1, correction=0, keepdim=True)
        else:
            mask = observed.to(wide.dtype)
            n = mask.sum(1, keepdim=True).clamp(min=1)
            loc = (wide * mask).sum(1, keepdim=True) / n
            variance = ((wide - loc) * mask).square().sum(1, keepdim=True) / n
        scale = (variance + 1e-5).sqrt()
        return ((wide - loc) / scale).to(x.dtype), loc.to(x.dtype), scale.to(x.dtype)


class MeanScaler(nn.Module):
    """Scale of every series: mean absolute value over the observed steps, at least 1e-10; one where none is observed.

    As `StdScaler`, with loc = 0.
    """

    def forward(self, x: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        wide = widen(x)
        mask = torch.ones_like(wide) if observed is None else observed.to(wide.dtype)
        n = mask.sum(1, keepdim=True)
        scale = (wide * mask).abs().sum(1, keepdim=True) / n.clamp(min=1)
        scale = torch.where(n > 0, scale.clamp(min=1e-10), torch.ones_like(scale))
        return (wide / scale).to(x.dtype), torch.zeros_like(scale).to(x.dtype), scale.to(x.dtype)


class NoScaler(nn.Module):
    """Leaves series as they are: loc 0, scale 1."""

    def forward(self, x: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        zeros = torch.zeros_like(x[:, :1])
        return x, zeros, torch.ones_like(zeros)


_SCALERS = {"std": StdScaler, "mean": MeanScaler, None: NoScaler}


def make_scaler(name: str | None) -> nn.Module:
    """The scaler of that name: "std", "mean", or None for none."""
    if name not in _SCALERS:
        raise ValueError(f"scaling must be 'std', 'mean' or None, not {name!r}")
    return _SCALERS[name]()


class InstanceNorm(nn.Module):
    """Reversible instance norm: every series to mean 0 and variance 1, then a scale and shift of its own.

    z = (x - mean) / sqrt(var + 1e-5) * weight + bias        x, z: (B, L, C); mean, var over L, detached, in float32
    """

    def __init__(self, num_channels: int, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normed series, and the statistics `inverse` needs."""
        wide = widen(x)
        variance, mean = torch.var_mean(wide.detach(), 1, correction=0, keepdim=True)
        std = (variance + 1e-5).sqrt()
        return ((wide - mean) / std * self.weight + self.bias).to(x.dtype), mean, std

    def inverse(self, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Back to the scale of the input: ``(B, T, C)``."""
        return ((widen(y) - self.bias) / (self.weight + 1e-10) * std + mean).to(y.dtype)
