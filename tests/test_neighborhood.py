"""Kernels of every position over its neighbourhood, against the sum written out, for every backend that runs here."""

from __future__ import annotations

import importlib
import os
import sys
import types

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mixzoo
from mixzoo.mixers import _neighborhood, _neighborhood_mixing
from mixzoo.mixers._neighborhood_mixing import neighborhood_mix

# grid and window: small ones in one tile, cut ones on one axis and on both, windows of the whole grid, borders all over
CASES = [
    ((7, 9), (3, 3)),
    ((5, 5), (5, 5)),
    ((4, 6), (3, 6)),
    ((23, 6), (3, 5)),
    ((25, 31), (7, 5)),
    ((1, 24), (1, 7)),
    ((6, 7), (4, 2)),
]


# the interpreter takes a millisecond for each operation of each program
FEW = [((5, 5), (5, 5)), ((4, 6), (3, 6)), ((1, 9), (1, 7)), ((8, 3), (3, 2))]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def written_out(weights: Tensor, values: Tensor, window: tuple[int, int]) -> Tensor:
    H, W = values.shape[2:4]
    rows = []
    for i in range(H):
        top = min(max(i - window[0] // 2, 0), H - window[0])
        for j in range(W):
            left = min(max(j - window[1] // 2, 0), W - window[1])
            near = values[:, :, top : top + window[0], left : left + window[1]].flatten(2, 3)  # (B, G, k^2, D)
            rows.append((weights[:, :, i, j].unsqueeze(-1) * near).sum(2))
    return torch.stack(rows, 2).unflatten(2, (H, W))


def make(grid, window, dtype=torch.float64, channels=5):
    generator = torch.Generator().manual_seed(sum(grid))
    shape = (2, 3, *grid)
    weights = torch.randn(*shape, window[0] * window[1], dtype=dtype, generator=generator)
    values = torch.randn(*shape, channels, dtype=dtype, generator=generator)
    return weights.requires_grad_(), values.requires_grad_()


def results(function, inputs):
    y = function(*inputs)
    return [y, *torch.autograd.grad(y.sin().sum(), inputs)]


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize(("grid", "window"), CASES, ids=str)
def test_equals_the_sum(grid, window, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(_neighborhood, "_CHUNK_BYTES", {"cpu": chunk, "cuda": chunk})
    inputs = make(grid, window)
    expected = results(lambda *t: written_out(*t, window), inputs)
    for actual, wanted in zip(results(lambda *t: mixzoo.neighborhood_apply(*t, window), inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def test_sequences_are_maps_of_one_row():
    weights, values = make((1, 24), (1, 7))
    y = mixzoo.neighborhood_apply(weights.squeeze(2), values.squeeze(2), 7)
    torch.testing.assert_close(y, written_out(weights, values, (1, 7)).squeeze(2))


def test_operator_is_well_behaved():
    inputs = make((4, 5), (3, 3))
    torch.library.opcheck(_neighborhood._operator, (*inputs, 3, 3, False))
    assert torch.autograd.gradcheck(lambda *t: mixzoo.neighborhood_apply(*t, 3), inputs)


@pytest.mark.parametrize("chunk", [None, 30_000, 1])
@pytest.mark.parametrize(("grid", "window"), CASES, ids=str)
def test_kernels_of_two_factors(grid, window, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(_neighborhood, "_CHUNK_BYTES", {"cpu": chunk, "cuda": chunk})
    generator = torch.Generator().manual_seed(sum(grid))
    n, taps = grid[0] * grid[1], window[0] * window[1]
    shapes = (3, n, 4, 2), (3, 4, 2, taps), (4, n, taps), (3, *grid, 4, 5)  # q, M, b, v
    inputs = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]

    def plain(q, factor, bias, values):
        p = torch.softmax(torch.einsum("bngd,bgdk->bgnk", q, factor) + bias, -1).unflatten(2, grid)
        return written_out(p, values.permute(0, 3, 1, 2, 4), window).permute(0, 2, 3, 1, 4)

    expected = results(plain, inputs)
    for actual, wanted in zip(results(lambda *t: neighborhood_mix(*t, window), inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
    narrow = [t.detach().bfloat16() for t in inputs]
    assert (neighborhood_mix(*narrow, window) - expected[0]).norm() < 0.05 * expected[0].norm()


def test_kernels_of_two_factors_are_counted_and_well_behaved():
    shapes = (2, 20, 3, 2), (2, 3, 2, 9), (3, 20, 9), (2, 4, 5, 3, 5)
    inputs = [torch.randn(s).requires_grad_() for s in shapes]
    torch.library.opcheck(_neighborhood_mixing._operator, (*inputs, 3, 3))
    with FlopCounterMode(display=False) as counter:
        neighborhood_mix(*inputs, (3, 3)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 3 * 20 * 9) * (2 + 5)


def test_memory_is_not_kept_for_the_backward_pass():
    weights, values = make((25, 31), (7, 5))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        mixzoo.neighborhood_apply(weights, values, (7, 5))
    assert sorted(saved) == sorted([weights.numel(), values.numel()])


@pytest.mark.parametrize(
    ("weights", "values", "kernel", "named"),
    [
        ((2, 3, 4, 5, 9), (2, 3, 4, 6, 7), 3, "got"),
        ((2, 3, 4, 5, 9), (2, 3, 4, 5, 7), 2, r"kernel_size \(2, 2\) does not fit"),
        ((2, 3, 2, 5, 9), (2, 3, 2, 5, 7), 3, "larger than the grid"),
    ],
)
def test_shapes_that_do_not_fit(weights, values, kernel, named):
    with pytest.raises(ValueError, match=named):
        mixzoo.neighborhood_apply(torch.zeros(weights), torch.zeros(values), kernel)


def test_backends_that_cannot_run():
    weights, values = (t.detach() for t in make((4, 5), (3, 3)))
    with pytest.raises(ValueError, match="backend must be one of"):
        mixzoo.neighborhood_apply(weights, values, 3, backend="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA device"):
            mixzoo.neighborhood_apply(weights, values, 3, backend="triton")


def test_natten_is_asked_for_the_same_sum(monkeypatch):
    natten = types.ModuleType("natten.functional")
    natten.na2d_av = lambda attn, value, kernel_size, dilation: written_out(attn, value, kernel_size) / dilation
    monkeypatch.setitem(sys.modules, "natten", types.ModuleType("natten"))
    monkeypatch.setitem(sys.modules, "natten.functional", natten)
    inputs = make((7, 9), (3, 5))
    actual, expected = (mixzoo.neighborhood_apply(*inputs, (3, 5), backend=name) for name in ("natten", "torch"))
    torch.testing.assert_close(actual, expected)


def natten_has_sums() -> bool:
    try:
        return hasattr(importlib.import_module("natten.functional"), "na2d_av")
    except ImportError:
        return False


@pytest.mark.skipif(not natten_has_sums(), reason="natten with na2d_av, 0.15 to 0.17, is not installed")
@pytest.mark.parametrize(("grid", "window"), [case for case in CASES if all(k % 2 for k in case[1])], ids=str)
def test_natten(grid, window):
    inputs = make(grid, window, torch.float32)
    on_natten, on_torch = (
        results(lambda *t, backend=backend: mixzoo.neighborhood_apply(*t, window, backend=backend), inputs)
        for backend in ("natten", "torch")
    )
    for a, b in zip(on_natten, on_torch, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_in_its_interpreter")
@pytest.mark.parametrize(("grid", "window"), FEW, ids=str)
def test_triton(grid, window, monkeypatch):
    from mixzoo.mixers import _neighborhood_triton as kernels

    monkeypatch.setattr(kernels, "_POSITIONS", 4)
    monkeypatch.setattr(kernels, "_CHANNELS", 4)
    weights, values = (t[:1, :1].detach().contiguous() for t in make(grid, window, torch.float32))
    grad = torch.randn_like(values)
    expected = written_out(weights.requires_grad_(), values.requires_grad_(), window)
    gradients = torch.autograd.grad(expected, (weights, values), grad)
    weights, values = weights.detach(), values.detach()
    torch.testing.assert_close(kernels.apply(weights, values, *window), expected.detach(), rtol=1e-5, atol=1e-5)
    actual = kernels.backward(grad, weights, values, *window)
    for a, b in zip(actual, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_triton_in_its_interpreter(interpret):
    interpret(__file__)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("grid", "window"), CASES, ids=str)
def test_triton_on_a_gpu(grid, window, dtype):
    inputs = [t.detach().to("cuda", dtype).requires_grad_() for t in make(grid, window)]
    on_triton, on_torch = (
        results(lambda *t, backend=backend: mixzoo.neighborhood_apply(*t, window, backend=backend), inputs)
        for backend in ("triton", "torch")
    )
    for a, b in zip(on_triton, on_torch, strict=True):
        assert (a - b).float().norm() <= 5 * torch.finfo(dtype).eps * b.float().norm()
