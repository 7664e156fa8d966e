"""One level of the dual-tree complex wavelet transform on channels-last maps, as `scattering` wants it.

A map ``(B, H, W, C)`` becomes a low band ``(B, 2, h, 2, w, C)``, with rows and columns by parity, and coefficients
``(6, B, h, w, G, 2, D)`` of C = G D channels, real parts before imaginary ones in each group. Bands come in the order
LH, HL, HH, each with the coefficients z1 and z2 of its cells; see `_dtcwt` for these and for the filters. h and w are
half of the even sides. Coefficients are sqrt 2 times those of `_dtcwt`, and the inverse takes them divided by sqrt 2.

Each axis is one product with a dense matrix, the columns first. Rows of the matrix are sorted by (band, parity), so
that the samples a, b, c, d of the cells are slices. On a CPU a long axis is cut into equal blocks, each a smaller
product with the samples that its filters reach. Shorter blocks than these have fewer multiplications and take longer,
and so do blocks of columns, whose products are small already. Adjoints have the same form with transposed matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._counting import count, numel
from ._dtcwt import first_analysis, first_filters, first_synthesis
from ._layers import is_symbolic
from ._tables import island, left_product, table

# where the bands LH, HL, HH begin among rows and columns (low even, low odd, high even, high odd)
_BEGIN = ((2, 0), (0, 2), (2, 2))
# shortest blocks of rows and of columns, in samples, that pay for products of their own
_ROWS, _COLUMNS = 28, 64


def _blocks(half: int, shortest: int) -> int:
    """Number of equal blocks of an axis of ``2 half`` samples."""
    return max(k for k in range(1, half + 1) if half % k == 0 and (k == 1 or 2 * half >= k * shortest))


def _analysis(length: int, biort: str, blocks: int, *, device) -> Tensor:
    """`first_analysis` by blocks, rows sorted by (band, parity): ``(blocks, 4 h / blocks, samples a block reads)``."""
    return _cut(first_analysis(length, biort, device=device), blocks, biort)


def _synthesis(length: int, biort: str, blocks: int, *, device) -> Tensor:
    """`first_synthesis` by blocks, ``(blocks, samples a block writes, 4 h / blocks)``."""
    return _cut(first_synthesis(length, biort, device=device).T, blocks, biort).transpose(1, 2).contiguous()


def _cut(matrix: Tensor, blocks: int, biort: str) -> Tensor:
    length = matrix.shape[1]
    half = matrix.shape[0] // 4
    step = 2 * half // blocks
    width = min(length, step + 2 * (max(map(len, first_filters(biort))) // 2))
    rows = matrix.reshape(2, blocks, half // blocks, 2, length).permute(1, 0, 3, 2, 4).reshape(blocks, -1, length)
    starts = [_start(k, step, width, length) for k in range(blocks)]
    return torch.stack([rows[k, :, start : start + width] for k, start in enumerate(starts)])


def _start(k: int, step: int, width: int, length: int) -> int:
    """First sample of the window of block k: centred on the block, inside the axis."""
    return min(max(k * step - (width - step) // 2, 0), length - width)


def _windows(bands: Tensor, length: int, rows: int) -> list[tuple[Tensor, int, int]]:
    """Matrix, first and last sample of every block, of bands whose blocks have ``rows`` coefficients."""
    width = bands.shape[1] * bands.shape[2] // rows
    starts = (_start(k, rows // 2, width, length) for k in range(len(bands)))
    return [(matrix, start, start + width) for matrix, start in zip(bands, starts, strict=True)]


def _several(x: Tensor) -> Tensor:
    """A single matrix ``(1, L, R)`` as four of a quarter of its columns: MKL gives each thread a product of its own."""
    return x.unflatten(2, (4, -1)).squeeze(0).transpose(0, 1) if len(x) == 1 and x.shape[2] % 4 == 0 else x


def _down(bands: Tensor, x: Tensor) -> Tensor:
    """Analysis of an axis: ``(N, L, R)`` to ``(N, blocks, 4 h / blocks, R)``."""
    if len(bands) == 1:
        return left_product(bands[0], x).unsqueeze(1)
    y = x.new_empty(x.shape[0], *bands.shape[:2], x.shape[2])
    for k, (matrix, first, last) in enumerate(_windows(bands, x.shape[1], bands.shape[1])):
        seen = _several(x[:, first:last])
        torch.bmm(matrix.expand(len(seen), -1, -1), seen, out=_several(y[:, k]))
    return y


def _up(bands: Tensor, y: Tensor, length: int) -> Tensor:
    """Synthesis of an axis: ``(N, blocks, 4 h / blocks, R)`` to ``(N, length, R)``."""
    if len(bands) == 1:
        return left_product(bands[0], y[:, 0])
    x = y.new_zeros(y.shape[0], length, y.shape[3])
    for k, (matrix, first, last) in enumerate(_windows(bands, length, bands.shape[2])):
        part = _several(y[:, k])
        _several(x[:, first:last]).baddbmm_(matrix.expand(len(part), -1, -1), part)
    return x


def _corners(y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The samples a, b, c, d of the cells, in LH ``(B, K, h / K, J, w / J, G, D)``, and in HL and HH ``(2, B, ...)``.

    ``y (B, K, 4, h / K, J, 4, w / J, G, D)``, rows and columns by (band, parity).
    """
    y = y.unflatten(5, (2, 2)).unflatten(2, (2, 2))  # (B, K, 2, 2, h / K, J, 2, 2, w / J, G, D)
    low, high = y.unbind(6)  # of the columns
    lh, hl_hh = low[:, :, 1], high.movedim(2, 0)
    return [(lh.select(5, j).select(2, i), hl_hh.select(6, j).select(3, i)) for i in (0, 1) for j in (0, 1)]


def _bands(z: Tensor, K: int, J: int) -> list[tuple[Tensor, Tensor]]:
    """Real and imaginary part of z1, then of z2, in shapes and order of `_corners`, of ``z (6, B, h, w, G, 2, D)``."""
    parts = z.unflatten(3, (J, -1)).unflatten(2, (K, -1)).unflatten(0, (3, 2))
    return [(both[0], both[1:]) for k in (0, 1) for both in parts.select(1, k).unbind(-2)]


def _analyse(x: Tensor, rows: Tensor, columns: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    B, H, W, C = x.shape
    K, J, D = len(rows), len(columns), C // groups
    y = _down(columns, x.reshape(B * H, W, C))  # (B H, J, 4 w / J, C)
    y = _down(rows, y.reshape(B, H, J * columns.shape[1] * C))  # (B, K, 4 h / K, 4 w C)
    y = y.reshape(B, K, 4, rows.shape[1] // 4, J, 4, columns.shape[1] // 4, groups, D)
    h, w = K * y.shape[3], J * y.shape[6]
    z = y.new_empty(6, B, h, w, groups, 2, D)
    for a, b, c, d, real1, imag1, real2, imag2 in zip(*_corners(y), *_bands(z, K, J), strict=True):
        torch.sub(a, d, out=real1)
        torch.add(b, c, out=imag1)
        torch.add(a, d, out=real2)
        torch.sub(b, c, out=imag2)
    low = y[:, :, :2, :, :, :2].permute(0, 2, 1, 3, 5, 4, 6, 7, 8).reshape(B, 2, h, 2, w, C)
    return low, z


def _synthesise(low: Tensor, z: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Tensor:
    B, _, h, _, w, C = low.shape
    K, J, groups, D = len(rows), len(columns), z.shape[4], z.shape[6]
    y = low.new_empty(B, K, 4, h // K, J, 4, w // J, groups, D)
    y[:, :, :2, :, :, :2] = low.view(B, 2, K, h // K, 2, J, w // J, groups, D).permute(0, 2, 1, 3, 5, 4, 6, 7, 8)
    for a, b, c, d, p, q, r, s in zip(*_corners(y), *_bands(z, K, J), strict=True):
        torch.add(p, r, out=a)
        torch.add(q, s, out=b)
        torch.sub(q, s, out=c)
        torch.sub(r, p, out=d)
    y = _up(rows, y.reshape(B, K, 4 * h // K, 4 * w * C), grid[0])  # (B, H, 4 w C)
    y = _up(columns, y.reshape(B * grid[0], J, 4 * w // J, C), grid[1])
    return y.reshape(B, *grid, C)


class _Analyse(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, rows: Tensor, columns: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        return _analyse(x, rows, columns, groups)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, rows, columns, _ = inputs
        ctx.save_for_backward(rows, columns)
        ctx.grid = x.shape[1:3]

    @staticmethod
    def backward(ctx, low: Tensor, z: Tensor):
        rows, columns = (bands.transpose(1, 2) for bands in ctx.saved_tensors)
        with island(low):
            return _Synthesise.apply(low.contiguous(), z, rows, columns, ctx.grid), None, None, None


class _Synthesise(torch.autograd.Function):
    @staticmethod
    def forward(low: Tensor, z: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Tensor:
        return _synthesise(low, z, rows, columns, grid)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, z, rows, columns, _ = inputs
        ctx.save_for_backward(rows, columns)
        ctx.groups = z.shape[4]

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, columns = (bands.transpose(1, 2) for bands in ctx.saved_tensors)
        with island(grad):
            return *_Analyse.apply(grad, rows, columns, ctx.groups), None, None, None


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


def _analyse_symbolic(x: Tensor, rows: Tensor, columns: Tensor, groups: int, biort: str) -> tuple[Tensor, Tensor]:
    B, H, _, C = x.shape
    h, w = rows.shape[0] // 4, columns.shape[0] // 4
    y = _filter(columns, x, biort).reshape(B, H, 4 * w * C)
    y = _filter(rows, y, biort).reshape(B, 1, 4, h, 1, 4, w, groups, C // groups)
    z = []
    for r, c in _BEGIN:
        a, b, c, d = (y[:, 0, r + i, :, 0, c + j] for i in (0, 1) for j in (0, 1))
        z += [torch.stack([a - d, b + c], -2), torch.stack([a + d, b - c], -2)]
    low = y[:, 0, :2, :, 0, :2].reshape(B, 2, h, 2, w, C)
    return low, torch.stack(z).reshape(6, B, h, w, groups, 2, C // groups)


def _synthesise_symbolic(low: Tensor, z: Tensor, rows: Tensor, columns: Tensor, biort: str) -> Tensor:
    B, _, h, _, w, C = low.shape
    quarters = {(0, 0): low}
    for band, corner in enumerate(_BEGIN):
        (p, q), (r, s) = z[2 * band].unbind(-2), z[2 * band + 1].unbind(-2)
        cells = [torch.stack([p + r, q + s], 2), torch.stack([q - s, r - p], 2)]  # (B, h, 2, w, G, D)
        quarters[corner] = torch.stack(cells, 1).flatten(-2)  # (B, 2, h, 2, w, C)
    top = torch.cat([quarters[0, 0], quarters[0, 2]], 3)
    y = torch.cat([top, torch.cat([quarters[2, 0], quarters[2, 2]], 3)], 1)  # (B, 4, h, 4, w, C)
    y = _filter(rows, y.reshape(B, 4 * h, 4 * w * C), biort)
    return _filter(columns, y.reshape(B, rows.shape[0], 4 * w, C), biort)


def _tables(build, like: Tensor, grid: tuple[int, int], biort: str, blocks: bool) -> list[Tensor]:
    numbers = [_blocks((side + 1) // 2, shortest) for side, shortest in zip(grid, (_ROWS, _COLUMNS), strict=True)]
    return [table(build, like, side, biort, k if blocks else 1) for side, k in zip(grid, numbers, strict=True)]


def analyse(x: Tensor, grid: tuple[int, int], groups: int, biort: str) -> tuple[Tensor, Tensor]:
    """Low band ``(B, 2, h, 2, w, C)`` and coefficients times sqrt 2 ``(6, B, h, w, G, 2, D)`` of ``(B, *grid, C)``."""
    symbolic = is_symbolic(x)
    rows, columns = _tables(_analysis, x, grid, biort, x.device.type == "cpu" and not symbolic)
    if symbolic:
        return _analyse_symbolic(x, rows[0], columns[0], groups, biort)
    return _Analyse.apply(x, rows, columns, groups)


def synthesise(low: Tensor, z: Tensor, grid: tuple[int, int], biort: str) -> Tensor:
    """Map ``(B, *grid, C)`` from a low band and coefficients divided by sqrt 2, see `analyse`."""
    symbolic = is_symbolic(low)
    rows, columns = _tables(_synthesis, low, grid, biort, low.device.type == "cpu" and not symbolic)
    if symbolic:
        return _synthesise_symbolic(low, z, rows[0], columns[0], biort)
    return _Synthesise.apply(low, z, rows, columns, grid)
