"""Adaptive frequency filter: the spectrum is multiplied by a mask that a small network computes from it.

Paper: arXiv:2307.14008 (AFFNet). Checked against microsoft/TokenMixers at 99dbe38.

    S = F x                                             F the orthonormal real FFT over the grid
    h = act(S W1 + b1),  M = shrink(h W2 + b2)          complex, block-diagonal over G groups of C / G channels
    y = x + F^-1 (M . S)                                x, y: (B, *grid, C)

act and shrink(t) = sign(t) max(|t| - lambda, 0) work on real and imaginary parts separately. The skip belongs to the
mixer. Runs in float32 or wider and returns the input's dtype; `_dft` says how F is computed.

A complex layer is one real matrix product a group on [re | im], [[Wr, Wi], [-Wi, Wr]], in place of eight einsums:
2 to 12 times faster on a CPU at the published sizes, where grouped 1x1 convolutions are 2 times slower than this. With
transforms by matrices the whole mixer takes 0.7 to 1.0 of the time of FFT and einsums, most of it at 32 x 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor

from ._complex import complex_product, real_bias, real_blocks
from ._dft import from_spectrum, spectrum
from ._layers import by_samples
from ._registry import register_mixer
from ._tables import island, widen

_ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}


@register_notrace_module
@register_mixer("aff", ranks=(1, 2, 3), paper="arXiv:2307.14008")
class AdaptiveFrequencyFilter(nn.Module):
    """y = x + F^-1 (M(F x) . F x) over any grid.

    Args:
        dim: channels C, a multiple of ``num_blocks``.
        num_blocks: groups G of the mask network.
        sparsity_threshold: lambda of the shrinkage.
        act: "silu" (the published models), "relu" or "gelu".

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``, any grid.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        num_blocks: int = 8,
        sparsity_threshold: float = 0.01,
        act: str = "silu",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_blocks < 1 or dim % num_blocks:
            raise ValueError(f"num_blocks must divide the channels dim={dim}, which num_blocks={num_blocks} does not")
        if act not in _ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(_ACTIVATIONS)}, not {act!r}")
        if sparsity_threshold < 0:
            raise ValueError(f"sparsity_threshold must not be negative, got {sparsity_threshold}")
        self.num_blocks = num_blocks
        self.sparsity_threshold = sparsity_threshold
        self.act = act
        width = dim // num_blocks
        dd = {"device": device, "dtype": dtype}
        # [real or imaginary, group, in, out]
        self.w1 = nn.Parameter(torch.empty(2, num_blocks, width, width, **dd))
        self.b1 = nn.Parameter(torch.empty(2, num_blocks, width, **dd))
        self.w2 = nn.Parameter(torch.empty(2, num_blocks, width, width, **dd))
        self.b2 = nn.Parameter(torch.empty(2, num_blocks, width, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters from N(0, 0.02^2), biases too."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        with island(x):
            # spectrum and mask of a sample are as large as two maps
            return by_samples(self._filtered, x, widest=2 * x.shape[1:].numel())

    def _filtered(self, x: Tensor) -> Tensor:
        return from_spectrum(self._masked(spectrum(widen(x))), x.shape[1:-1]).to(x.dtype).add_(x)

    def _masked(self, s: Tensor) -> Tensor:
        """M . S of a spectrum ``(2, B, *bins, C)``."""
        G, D = self.num_blocks, s.shape[-1] // self.num_blocks
        weight1, weight2 = (real_blocks(weight.to(s.dtype)) for weight in (self.w1, self.w2))
        bias1, bias2 = (real_bias(bias.to(s.dtype)) for bias in (self.b1, self.b2))
        real, imag = s.reshape(2, -1, G, D).transpose(1, 2).unbind(0)  # 2 x (G, P, D), P bins of all samples
        # one product on [re | im] in two parts, which saves bringing them together
        h = torch.baddbmm(bias1, real, weight1[:, :D]).baddbmm_(imag, weight1[:, D:])  # (G, P, 2 D)
        h = torch.baddbmm(bias2, _ACTIVATIONS[self.act](h), weight2)
        mask = F.softshrink(h, self.sparsity_threshold).unflatten(-1, (2, D))  # (G, P, 2, D)
        return complex_product(s, mask.permute(2, 1, 0, 3).reshape(s.shape))

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, sparsity_threshold={self.sparsity_threshold}, act={self.act!r}"
