"""Real Fourier transforms of channels-last maps, by FFT or by two small matrix products.

A spectrum is the non-redundant half over the last axis of the grid, with real and imaginary parts on an axis of their
own: ``(B, *bins, 2, C)``, bins (H, W // 2 + 1) for a grid (H, W). Transforms are orthonormal.

By matrices, for real x and the DFT written out in cosines and sines:

    S = F_H (F_W x)        F_W: (2 V, W) over a row, F_H: (2 H, 2 H) over rows of real and imaginary parts
    x = G_W (F_H^T S)      G_W: (W, 2 V), bins that stand for two weighted by 2

Both inverses ignore the imaginary part of the bins 0 and, for even W, W / 2, once the other axes are transformed, as
`irfftn` does on CPU; cuFFT leaves that case undefined, so there the last axis is inverted on its own.

On a CPU the matrices are faster than an FFT up to 32 positions a side, most for sizes with the factor 7 (5 times at
7 x 7 x 512, 2.5 times at 14 x 14 x 256, even at 56 x 56), and they need no complex numbers, so graphs captured for
export use them at any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._tables import exporting, left_product, table

# longest side that matrices transform
MATRIX_SIDE = 32


def angles(rows: int, n: int, device) -> Tensor:
    """2 pi k m / n for k < rows, m < n; reduced before the division, so that large products stay exact."""
    k = torch.arange(rows, device=device).unsqueeze(1) * torch.arange(n, device=device)
    return (k % n).to(torch.float64) * (2 * math.pi / n)  # (rows, n)


def _real_dft(n: int, device) -> Tensor:
    angle = angles(n // 2 + 1, n, device)
    return torch.cat([angle.cos(), -angle.sin()]) / math.sqrt(n)  # (2 V, n), real parts first


def _real_inverse(n: int, device) -> Tensor:
    bins = torch.arange(n // 2 + 1, device=device)
    twice = 2 - ((bins == 0) | (2 * bins == n)).to(torch.float64)
    return (_real_dft(n, device).unflatten(0, (2, -1)) * twice.unsqueeze(1)).flatten(0, 1).T.contiguous()  # (n, 2 V)


def _complex_dft(n: int, device) -> Tensor:
    """Over rows (position, part), part 0 the real one: ``(2 n, 2 n)``."""
    angle = angles(n, n, device)
    cos, sin = angle.cos() / math.sqrt(n), angle.sin() / math.sqrt(n)
    blocks = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], 1)  # (n, part, n, part)
    return blocks.reshape(2 * n, 2 * n)


def _complex_inverse(n: int, device) -> Tensor:
    return _complex_dft(n, device).T.contiguous()


def _by_matrices(grid: Sequence[int]) -> bool:
    if torch.jit.is_tracing() and not exporting():
        # a trace shows the transform itself, whatever computes it, so that it is counted as one
        return False
    return len(grid) < 3 and (exporting() or max(grid) <= MATRIX_SIDE)


def spectrum(x: Tensor) -> Tensor:
    """Map ``(B, *grid, C)`` to its spectrum ``(B, *bins, 2, C)``, a view."""
    grid = x.shape[1:-1]
    if not _by_matrices(grid):
        bins = torch.fft.rfftn(x, dim=tuple(range(1, x.ndim - 1)), norm="ortho")
        return torch.view_as_real(bins).transpose(-1, -2)
    B, C, W = x.shape[0], x.shape[-1], grid[-1]
    y = left_product(table(_real_dft, x, W), x)  # (B, [H,] 2 V, C)
    if len(grid) == 1:
        return y.reshape(B, 2, W // 2 + 1, C).transpose(1, 2)
    y = left_product(table(_complex_dft, x, grid[0]), y.reshape(B, 2 * grid[0], (W // 2 + 1) * C))
    return y.reshape(B, grid[0], 2, W // 2 + 1, C).transpose(2, 3)  # (B, H, V, 2, C)


def from_spectrum(s: Tensor, grid: Sequence[int]) -> Tensor:
    """Inverse of `spectrum`, also of spectra that belong to no real map: ``(B, *bins, 2, C)`` to ``(B, *grid, C)``."""
    if not _by_matrices(grid):
        bins = torch.view_as_complex(s.transpose(-1, -2).contiguous())  # (B, *bins, C)
        if s.device.type in ("cpu", "meta"):
            return torch.fft.irfftn(bins, s=tuple(grid), dim=tuple(range(1, len(grid) + 1)), norm="ortho")
        if len(grid) > 1:
            bins = torch.fft.ifftn(bins, dim=tuple(range(1, len(grid))), norm="ortho")
        return torch.fft.irfft(bins, n=grid[-1], dim=len(grid), norm="ortho")
    B, C, V, W = s.shape[0], s.shape[-1], s.shape[-3], grid[-1]
    inverse = table(_real_inverse, s, W)
    if len(grid) == 1:
        return left_product(inverse, s.transpose(1, 2).reshape(B, 2 * V, C))
    z = left_product(table(_complex_inverse, s, grid[0]), s.transpose(2, 3).reshape(B, 2 * grid[0], V * C))
    return left_product(inverse, z.reshape(B, grid[0], 2 * V, C))
