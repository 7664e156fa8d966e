"""Real Fourier transforms of channels-last maps, by FFT or by two small matrix products.

A spectrum is the non-redundant half over the last axis of the grid, real parts first: ``(2, B, *bins, C)``, bins
(H, W // 2 + 1) for a grid (H, W). Transforms are orthonormal.

By matrices, for real x and the DFT written out in cosines and sines:

    S = F_H (F_W x),  x = G_W (F_H* S)

F_W is (2 V, W), and G_W its inverse, in which bins that stand for two weigh 2.

Over the rows, the frequencies k and -k have the same cosines and opposite sines, so (H, H) cosines and sines applied to
real and imaginary parts, and sums and differences of their results, give both. Spectra by matrices have the rows in the
order 0, 1, .., H // 2, -1, -2, .., see `sort_rows`.

Both inverses ignore the imaginary part of the bins 0 and, for even W, W / 2, once the other axes are transformed, as
`irfftn` does on CPU; cuFFT leaves that case undefined, so there the last axis is inverted on its own.

On a CPU matrices beat MKL's FFT up to 32 positions a side. There and back, with parts apart, they are 1.2 times as fast
at 32 x 32, 1.7 times at 28, 2 times at 24 and 16, 2.6 times at 14, 2.9 times at 8 and 4.8 times at 7; at 56 they are
0.6 times as fast. They need no complex numbers, so graphs captured for export use them at any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._layers import is_symbolic
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


def _waves(n: int, device) -> Tensor:
    """Cosines of the frequencies 0 .. n // 2, then sines of those but 0 and n / 2: ``(n, n)``."""
    angle = angles(n // 2 + 1, n, device)
    return torch.cat([angle.cos(), angle[1 : (n + 1) // 2].sin()]) / math.sqrt(n)


def _waves_transposed(n: int, device) -> Tensor:
    return _waves(n, device).T.contiguous()


def sort_rows(values: Tensor, axis: int) -> Tensor:
    """Rows in the FFT's order, 0, 1, .., -2, -1, to that of a spectrum by matrices, or back."""
    n = values.shape[axis]
    first, rest = values.split([n // 2 + 1, (n - 1) // 2], axis)
    return torch.cat([first, rest.flip(axis)], axis)


def _pairs(n: int) -> tuple[slice, slice, list[int]]:
    """Rows of the frequencies k and -k, and of those that are their own opposite, of a spectrum and of `_waves`."""
    return slice(1, (n + 1) // 2), slice(n // 2 + 1, n), [0, n // 2] if n % 2 == 0 else [0]


def _fold(z: Tensor) -> Tensor:
    """``(B, n, 2, V, C)``, products with cosines and sines, to the spectrum ``(2, B, n, V, C)``."""
    k, opposite, alone = _pairs(z.shape[1])
    (a, b), (c, d) = z[:, k].unbind(2), z[:, opposite].unbind(2)
    s = z.new_empty(2, *z.shape[:2], *z.shape[3:])
    for row in alone:
        s[:, :, row] = z[:, row].transpose(0, 1)
    torch.add(a, d, out=s[0, :, k])
    torch.sub(b, c, out=s[1, :, k])
    torch.sub(a, d, out=s[0, :, opposite])
    torch.add(b, c, out=s[1, :, opposite])
    return s


def _unfold(s: Tensor) -> Tensor:
    """Adjoint of `_fold`."""
    k, opposite, alone = _pairs(s.shape[2])
    (p, q), (r, t) = s[:, :, k], s[:, :, opposite]
    z = s.new_empty(*s.shape[1:3], 2, *s.shape[3:])
    for row in alone:
        z[:, row] = s[:, :, row].transpose(0, 1)
    torch.add(p, r, out=z[:, k, 0])
    torch.add(q, t, out=z[:, k, 1])
    torch.sub(t, q, out=z[:, opposite, 0])
    torch.sub(p, r, out=z[:, opposite, 1])
    return z


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return _fold(z)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Unfold.apply(grad)


class _Unfold(torch.autograd.Function):
    @staticmethod
    def forward(s: Tensor) -> Tensor:
        return _unfold(s)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Fold.apply(grad)


def _fold_symbolic(z: Tensor, n: int) -> Tensor:
    k, opposite, alone = _pairs(n)
    (a, b), (c, d) = z[:, k].unbind(2), z[:, opposite].unbind(2)
    rows = [z[:, row : row + 1].permute(2, 0, 1, 3, 4) for row in alone]  # (2, B, 1, V, C)
    return torch.cat([rows[0], torch.stack([a + d, b - c]), *rows[1:], torch.stack([a - d, b + c])], 2)


def _unfold_symbolic(s: Tensor, n: int) -> Tensor:
    k, opposite, alone = _pairs(n)
    (p, q), (r, t) = s[:, :, k].unbind(0), s[:, :, opposite].unbind(0)
    rows = [s[:, :, row : row + 1].permute(1, 2, 0, 3, 4) for row in alone]  # (B, 1, 2, V, C)
    return torch.cat([rows[0], torch.stack([p + r, q + t], 2), *rows[1:], torch.stack([t - q, p - r], 2)], 1)


def by_matrices(grid: Sequence[int]) -> bool:
    """Whether matrices transform maps of this grid."""
    if torch.jit.is_tracing() and not exporting():
        # a trace shows the transform itself, whatever computes it, so that it is counted as one
        return False
    return len(grid) < 3 and (exporting() or max(grid) <= MATRIX_SIDE)


def rfft(x: Tensor) -> Tensor:
    """FFT of ``(B, *grid, C)``, complex, ``(B, *bins, C)``."""
    return torch.fft.rfftn(x, dim=tuple(range(1, x.ndim - 1)), norm="ortho")


def irfft(bins: Tensor, grid: Sequence[int]) -> Tensor:
    """Inverse of `rfft`, also of spectra that belong to no real map."""
    if bins.device.type in ("cpu", "meta"):
        return torch.fft.irfftn(bins, s=tuple(grid), dim=tuple(range(1, len(grid) + 1)), norm="ortho")
    if len(grid) > 1:
        bins = torch.fft.ifftn(bins, dim=tuple(range(1, len(grid))), norm="ortho")
    return torch.fft.irfft(bins, n=grid[-1], dim=len(grid), norm="ortho")


def spectrum(x: Tensor) -> Tensor:
    """Map ``(B, *grid, C)`` to its spectrum ``(2, B, *bins, C)``."""
    grid = x.shape[1:-1]
    if not by_matrices(grid):
        return torch.view_as_real(rfft(x)).movedim(-1, 0)
    B, C, W = x.shape[0], x.shape[-1], grid[-1]
    y = left_product(table(_real_dft, x, W), x)  # (B, [H,] 2 V, C)
    if len(grid) == 1:
        return y.reshape(B, 2, W // 2 + 1, C).transpose(0, 1)
    y = left_product(table(_waves, x, grid[0]), y.reshape(B, grid[0], (W // 2 + 1) * 2 * C))
    y = y.reshape(B, grid[0], 2, W // 2 + 1, C)
    return _fold_symbolic(y, grid[0]) if is_symbolic(y) else _Fold.apply(y)


def from_spectrum(s: Tensor, grid: Sequence[int]) -> Tensor:
    """Inverse of `spectrum`, also of spectra that belong to no real map: ``(2, B, *bins, C)`` to ``(B, *grid, C)``."""
    if not by_matrices(grid):
        return irfft(torch.view_as_complex(s.movedim(0, -1).contiguous()), grid)
    B, C, V, W = s.shape[1], s.shape[-1], s.shape[-2], grid[-1]
    inverse = table(_real_inverse, s, W)
    if len(grid) == 1:
        return left_product(inverse, s.transpose(0, 1).reshape(B, 2 * V, C))
    y = _unfold_symbolic(s, grid[0]) if is_symbolic(s) else _Unfold.apply(s)
    y = left_product(table(_waves_transposed, s, grid[0]), y.reshape(B, grid[0], 2 * V * C))
    return left_product(inverse, y.reshape(B, grid[0], 2 * V, C))
