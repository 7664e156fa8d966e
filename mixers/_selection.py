"""Selective scans of the channels of a sequence in several directions: what the Mamba block and its relatives share.

Papers: arXiv:2312.00752 (Mamba), arXiv:2401.10166 (VMamba). Checked against state-spaces/mamba at e9594ce and
MzeroMiko/VMamba at 2ed52ea.

    [r_k | B_k | C_k] = W_k x_k                         x_k: (B, L, E), the sequence as direction k reads it
    y_k = selective_scan(x_k, V_k r_k, -exp(A_log_k), B_k, C_k) + D_k x_k      step softplus(V_k r_k + b_k)
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor

from ._depthwise import depthwise_conv
from ._scan import recurrence
from ._tables import island, widen


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


@register_notrace_module
class SelectiveScans(nn.Module):
    """K scans, each with its own parameters, of E channels with N states.

    Args:
        directions: K. channels: E. states: N. dt_rank: width R that the step sizes are projected through.

    Shapes: ``(B, L, K, E) -> (B, L, K, E)``; steps, decays and states are in float32.
    """

    undecayed = ("A_log", "D", "dt_bias")

    def __init__(self, directions: int, channels: int, *, states: int, dt_rank: int, device=None, dtype=None):
        super().__init__()
        for name, value in (("states", states), ("dt_rank", dt_rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        dd = {"device": device, "dtype": dtype}
        self.widths = [dt_rank, states, states]
        self.x_proj = nn.Parameter(torch.empty(directions, sum(self.widths), channels, **dd))  # W
        self.dt_proj = nn.Parameter(torch.empty(directions, channels, dt_rank, **dd))  # V
        self.dt_bias = nn.Parameter(torch.empty(directions, channels, **dd))  # b
        self.A_log = nn.Parameter(torch.empty(directions, channels, states, **dd))
        self.D = nn.Parameter(torch.ones(directions, channels, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw from the distributions of Mamba: step sizes between 0.001 and 0.1, decays 1 to N."""
        for weight in (self.x_proj, self.dt_proj):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        exponents = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1))
        self.dt_bias.copy_(_inverse_softplus(exponents.exp().clamp(min=1e-4)))
        decays = torch.arange(1, self.A_log.shape[-1] + 1, device=self.A_log.device, dtype=torch.float32)
        self.A_log.copy_(decays.log().expand_as(self.A_log))

    def project(self, x: Tensor) -> Tensor:
        """r, B and C of every direction, ``(B, L, K, E) -> (B, L, K, R + 2N)``."""
        return torch.einsum("blke,kre->blkr", x, self.x_proj)

    def forward(self, x: Tensor, projected: Tensor, valid: Tensor | None = None) -> Tensor:
        """Scan ``x (B, L, K, E)``; ``valid`` (B, L, K) are the positions that states take notice of."""
        r, B, C = projected.split(self.widths, -1)
        dt = torch.einsum("blkr,ker->blke", r, self.dt_proj)
        with island(x):
            u = widen(x)
            dt = F.softplus(widen(dt) + self.dt_bias.to(u.dtype))
            if valid is not None:
                dt = dt * valid.unsqueeze(-1)
            A = -torch.exp(self.A_log.to(u.dtype))
            y, _ = recurrence(u.flatten(2), dt.flatten(2), A.flatten(0, 1), B.to(u.dtype), C.to(u.dtype))
            y = torch.addcmul(y.unflatten(2, x.shape[2:]), u, self.D.to(u.dtype))
        return y.to(x.dtype)


class CausalConv(nn.Conv1d):
    """Depthwise convolution over the steps up to each one, then SiLU: ``(B, L, C) -> (B, L, C)``."""

    def __init__(self, channels: int, kernel_size: int, *, device=None, dtype=None):
        super().__init__(channels, channels, kernel_size, groups=channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, self.kernel_size[0] - 1, 0)).transpose(1, 2)  # (B, C, k - 1 + L)
        return F.silu(depthwise_conv(x, self.weight, self.bias, (0,)).transpose(1, 2))


class SequenceScans(nn.Module):
    """Convolution and scan of a sequence from its beginning and, if there are two directions, from its end; their sum.

    Args:
        directions: 1 or 2, each with its own parameters. channels, states, dt_rank: see `SelectiveScans`.
        kernel_size: of the convolution.

    Shapes: ``(B, L, E) -> (B, L, E)``; ``mask`` (B, L) is true at valid positions.
    """

    def __init__(
        self,
        directions: int,
        channels: int,
        *,
        states: int,
        dt_rank: int,
        kernel_size: int,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"kernel_size must be positive, not {kernel_size}")
        dd = {"device": device, "dtype": dtype}
        self.both = directions == 2
        self.conv = CausalConv(directions * channels, kernel_size, **dd)
        self.scans = SelectiveScans(directions, channels, states=states, dt_rank=dt_rank, **dd)

    def _views(self, x: Tensor) -> Tensor:
        """A sequence as each direction reads it: ``(B, L, ...) -> (B, L, K, ...)``."""
        return torch.stack([x, x.flip(1)], 2) if self.both else x.unsqueeze(2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            x = x * mask.unsqueeze(-1).to(x.dtype)
        views = self._views(x)
        views = self.conv(views.flatten(2)).unflatten(2, views.shape[2:])  # (B, L, K, E)
        y = self.scans(views, self.scans.project(views), None if mask is None else self._views(mask))
        return y[:, :, 0] + y[:, :, 1].flip(1) if self.both else y.squeeze(2)
