"""One level of the dual-tree complex wavelet transform on channels-last maps, as `scattering` wants it.

The samples of a cell, a and b in its even row, c and d in its odd one, make two complex coefficients

    z1 = (p + i q) / sqrt 2,    z2 = (p - i q) / sqrt 2        p = a + i b,  q = c + i d

Whatever is linear may act on p and q, which are slices of filtered maps, so z is never formed. See `_dtcwt` for the
filters. Below, h and w are half of the even sides, and C = G D channels come in G groups.

Each axis is one product with a dense matrix. `analyse` and `synthesise` are made of differentiable operations, for any
device and for graphs. `FilterBank` is for a CPU: products into buffers, which leave p and q as matrices of real and
imaginary parts side by side. It cuts long axes into equal blocks, each a smaller product with the samples that its
filters reach. Blocks shorter than these have fewer multiplications still and take longer. Depthwise convolutions of
oneDNN have a third of the multiplications and wait for memory: they take as long on 56 samples, and longer on 28.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._counting import count, numel
from ._dtcwt import first_analysis, first_filters, first_synthesis
from ._tables import left_product, table

# samples of the longest axis that one product takes, and of the shortest blocks of rows and of columns beyond it
_WHOLE, _ROWS, _COLUMNS = 64, 28, 64

# p and q
Pair = Sequence[Tensor]


def _blocks(half: int, shortest: int) -> int:
    """Number of equal blocks of an axis of ``2 half`` samples."""
    if 2 * half <= _WHOLE:
        return 1
    return max(k for k in range(1, half + 1) if half % k == 0 and (k == 1 or 2 * half >= k * shortest))


def _analysis(length: int, biort: str, blocks: int, rows: bool, *, device) -> Tensor:
    """`first_analysis` by blocks, ``(blocks, outputs, inputs)``.

    Outputs of a block are sorted by (parity, band, cell) for rows, by (band, cell, parity) for columns.
    """
    return _cut(first_analysis(length, biort, device=device), biort, blocks, rows)


def _synthesis(length: int, biort: str, blocks: int, rows: bool, *, device) -> Tensor:
    """`first_synthesis` by blocks, ``(blocks, outputs, inputs)``, inputs sorted as outputs of `_analysis`."""
    return _cut(first_synthesis(length, biort, device=device).T, biort, blocks, rows).transpose(1, 2).contiguous()


def _cut(matrix: Tensor, biort: str, blocks: int, rows: bool) -> Tensor:
    half, length = matrix.shape[0] // 4, matrix.shape[1]
    step = 2 * half // blocks
    width = min(length, step + 2 * (max(map(len, first_filters(biort))) // 2))
    lines = matrix.reshape(2, blocks, half // blocks, 2, length)  # (band, block, cell, parity, sample)
    lines = lines.permute((1, 3, 0, 2, 4) if rows else (1, 0, 2, 3, 4)).reshape(blocks, 2 * step, length)
    starts = [_start(k, step, width, length) for k in range(blocks)]
    return torch.stack([lines[k, :, start : start + width] for k, start in enumerate(starts)])


def _start(k: int, step: int, width: int, length: int) -> int:
    """First sample of the window of block k: centred on the block, inside the axis."""
    return min(max(k * step - (width - step) // 2, 0), length - width)


def _windows(matrices: Tensor, length: int, coefficients: int) -> list[tuple[Tensor, slice]]:
    """Matrix and window of every block, of so many coefficients."""
    width = matrices[0].numel() // coefficients
    starts = [_start(k, coefficients // 2, width, length) for k in range(len(matrices))]
    return [(matrix, slice(start, start + width)) for matrix, start in zip(matrices, starts, strict=True)]


def _down(matrices: Tensor, x: Tensor, y: Tensor) -> None:
    """Analysis of an axis, ``x (S, N, length, R)`` into ``y (S, blocks, N, coefficients of a block, R)``."""
    for k, (matrix, window) in enumerate(_windows(matrices, x.shape[2], y.shape[3])):
        for part, into in zip(x, y[:, k], strict=True):
            torch.bmm(matrix.expand(len(part), -1, -1), part[:, window], out=into)


def _up(matrices: Tensor, y: Tensor, x: Tensor) -> None:
    """Synthesis of an axis, ``y (S, blocks, N, coefficients of a block, R)`` into ``x (S, N, length, R)``."""
    if len(matrices) > 1:
        x.zero_()
    for k, (matrix, window) in enumerate(_windows(matrices, x.shape[2], y.shape[3])):
        for part, into in zip(y[:, k], x, strict=True):
            factors = matrix.expand(len(part), -1, -1), part
            if len(matrices) > 1:
                into[:, window].baddbmm_(*factors)
            else:
                torch.bmm(*factors, out=into)


class Cells:
    """Views of filtered maps of B samples, ``values (2, B, K, G, 2, 2, h / K, w, 2, D)``.

    Axes: band of the columns, sample, block of rows, group, parity and band of the rows, row of cells in the block,
    column of cells, parity of the columns, channel in the group.

    Attributes:
        low: the low band, ``(B, K, G, 2, h / K, w, 2, D)``.
        parts: p and q of the bands HL and HH, then of LH, each ``(B, K, G, bands, h / K, w, 2, D)``.
        matrices: the same as ``(B K G, positions, 2 D)``.
    """

    def __init__(self, values: Tensor):
        self.values = values
        self.low = values[0, :, :, :, :, 0]
        batch, features = values.shape[1:4].numel(), values.shape[-2:].numel()
        by_parity = [values[:, :, :, :, parity] for parity in (0, 1)]
        self.parts: list[Pair] = [tuple(part[band, :, :, :, 1 - band :] for part in by_parity) for band in (1, 0)]
        self.matrices: list[Pair] = [tuple(part.view(batch, -1, features) for part in pair) for pair in self.parts]


class FilterBank:
    """The transform of maps like ``x (B, H, W, C)`` on a CPU, ``batch`` of them at a time, with buffers for it.

    Attributes:
        shape: that of `Cells.values`.
    """

    def __init__(self, x: Tensor, batch: int, groups: int, biort: str):
        _, H, W, C = x.shape
        h, w, D = (H + 1) // 2, (W + 1) // 2, C // groups
        K, J = _blocks(h, _ROWS), _blocks(w, _COLUMNS)
        sides = (H, biort, K, True), (W, biort, J, False)
        self._analysis, self._synthesis = (
            [table(build, x, *side) for side in sides] for build in (_analysis, _synthesis)
        )
        self.shape = 2, batch, K, groups, 2, 2, h // K, w, 2, D
        # filtered columns as their products leave them, and sorted by band and group for the products over rows, which
        # go all at once unless blocks of rows stand between samples and groups
        wide = x.new_empty(J, batch, H, 2, w // J, 2, groups, D)
        self._wide = wide.view(1, J, batch * H, 4 * w // J, C)
        self._of_wide = wide.permute(3, 1, 6, 2, 0, 4, 5, 7)
        self._sorted = x.new_empty(self._of_wide.shape)
        separate = 1 if K == 1 else 2 * batch
        self._maps = self._sorted.view(separate, 2 * batch * groups // separate, H, -1)
        self._of_rows = separate, K, self._maps.shape[1], 4 * (h // K), self._maps.shape[3]

    def analyse(self, x: Tensor, cells: Cells, *, adjoint: bool = False) -> None:
        """Fill ``cells``; with ``adjoint``, by the adjoint of `synthesise`."""
        rows, columns = (m.transpose(1, 2) for m in self._synthesis) if adjoint else self._analysis
        _down(columns, x.reshape(1, -1, *x.shape[2:]), self._wide)
        self._sorted.copy_(self._of_wide)
        _down(rows, self._maps, cells.values.view(self._of_rows))

    def synthesise(self, cells: Cells, x: Tensor, *, adjoint: bool = False) -> None:
        """Fill ``x``, which is contiguous; with ``adjoint``, by the adjoint of `analyse`."""
        rows, columns = (m.transpose(1, 2) for m in self._analysis) if adjoint else self._synthesis
        _up(rows, cells.values.view(self._of_rows), self._maps)
        self._of_wide.copy_(self._sorted)
        _up(columns, self._wide, x.view(1, -1, *x.shape[2:]))


torch.library.define("mixzoo::filter_axis", "(Tensor matrix, Tensor x, int taps) -> Tensor")


@torch.library.impl("mixzoo::filter_axis", "CompositeImplicitAutograd")
def _filter_axis(matrix: Tensor, x: Tensor, taps: int) -> Tensor:
    return left_product(matrix, x)


@count("mixzoo::filter_axis", column="transform")
def _filter_macs(inputs, outputs) -> int:
    """Taps of the filters on every sample they are centred on, as if they were convolutions."""
    return min(numel(inputs[1]), numel(outputs[0])) * inputs[2].toIValue()


def _filter(matrix: Tensor, x: Tensor, biort: str) -> Tensor:
    """``matrix`` over the second-last axis; traced as a filter bank, which is what is counted."""
    if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
        return torch.ops.mixzoo.filter_axis(matrix, x, sum(map(len, first_filters(biort))))
    return left_product(matrix, x)


def analyse(x: Tensor, grid: tuple[int, int], groups: int, biort: str) -> tuple[Tensor, Tensor, Tensor]:
    """Low band ``(B, h, 2, w, 2, G, D)`` and p and q of the bands LH, HL, HH, ``(3, B, h, w, 2, G, D)``."""
    B, H, _, C = x.shape
    rows, columns = (table(first_analysis, x, side, biort) for side in grid)
    h, w = rows.shape[0] // 4, columns.shape[0] // 4
    y = _filter(columns, x, biort).reshape(B, H, 4 * w * C)
    y = _filter(rows, y, biort).reshape(B, 2, h, 2, 2, w, 2, groups, C // groups)
    bands = torch.stack([y[:, 1, :, :, 0], y[:, 0, :, :, 1], y[:, 1, :, :, 1]])  # (3, B, h, 2, w, 2, G, D)
    return y[:, 0, :, :, 0], bands[:, :, :, 0], bands[:, :, :, 1]


def synthesise(low: Tensor, p: Tensor, q: Tensor, grid: tuple[int, int], biort: str) -> Tensor:
    """Map ``(B, *grid, C)`` of what `analyse` returns."""
    B, h, _, w, _, G, D = low.shape
    rows, columns = (table(first_synthesis, low, side, biort) for side in grid)
    lh, hl, hh = torch.stack([p, q], 3).unbind(0)  # (B, h, 2, w, 2, G, D)
    y = torch.stack([torch.stack([low, hl], 3), torch.stack([lh, hh], 3)], 1)  # (B, 2, h, 2, 2, w, 2, G, D)
    y = _filter(rows, y.reshape(B, 4 * h, 4 * w * G * D), biort)
    return _filter(columns, y.reshape(B, grid[0], 4 * w, G * D), biort)
