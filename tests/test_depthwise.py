"""Depthwise convolutions against torch's, with the kernel's gradient by columns and without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixzoo.mixers import _depthwise
from mixzoo.mixers._depthwise import depthwise_conv, make_depthwise

PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def make(grid, kernel, channels_last=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(grid) + sum(kernel))
    x = torch.randn(2, *grid, 5, generator=generator).movedim(-1, 1).to(dtype)
    x = x if channels_last else x.contiguous()
    weight, bias = torch.randn(5, 1, *kernel, generator=generator), torch.randn(5, generator=generator)
    return [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]


def results(function, inputs):
    y = function(*inputs)
    return [y, *torch.autograd.grad(y.sin().sum(), inputs)]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("grid", "kernel", "padding", "dilation"),
    [
        ((9, 11), (7, 7), (3, 3), 1),
        ((9, 11), (5, 4), (2, 3), 1),
        ((6, 5), (3, 9), (1, 4), 1),
        ((4, 3), (13, 13), (6, 6), 1),
        ((12, 12), (3, 3), (1, 1), 1),
        ((12, 12), (5, 5), (0, 0), 1),
        ((1, 1), (7, 7), (3, 3), 1),
        ((17,), (7,), (3,), 1),
        ((17,), (4,), (3,), 1),
        ((4, 5, 6), (3, 5, 5), (1, 2, 2), 1),
        ((9, 11), (3, 3), (2, 2), 2),
        ((9, 12), (7, 5), (9, 6), 3),
        ((5, 4), (3, 3), (7, 7), 7),
        ((6, 7), (5, 5), (8, 8), 4),
        ((9, 8), (3, 3), (0, 0), 2),
        ((17,), (5,), (4,), 2),
        ((17,), (3,), (8,), 8),
        ((4, 5, 6), (3, 3, 3), (2, 2, 2), 2),
    ],
    ids=str,
)
def test_equals_torch(grid, kernel, padding, dilation, channels_last):
    inputs, steps = make(grid, kernel, channels_last), (dilation,) * len(grid)

    def plain(x, weight, bias):
        return PLAIN[len(grid)](x, weight, bias, padding=padding, dilation=steps, groups=5)

    expected = results(plain, inputs)
    for actual, wanted in zip(results(lambda *t: depthwise_conv(*t, padding, steps), inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_the_kernel_has_its_gradient_by_columns(monkeypatch):
    calls = []
    by_columns = _depthwise._kernel_gradient
    monkeypatch.setattr(_depthwise, "_kernel_gradient", lambda *args: calls.append(1) or by_columns(*args))
    x, weight, bias = make((8, 8), (7, 7))
    depthwise_conv(x, weight, bias, (3, 3)).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        depthwise_conv(x, weight, bias, (3, 3)).sum().backward()
    depthwise_conv(x.double(), weight.double(), bias.double(), (3, 3)).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("dilation", [1, 2])
def test_twice_differentiable(dilation):
    x, weight, bias = make((6, 6), (5, 5))
    padding, steps = (2 * dilation,) * 2, (dilation,) * 2

    def slope(function):
        (dw,) = torch.autograd.grad(function(x, weight, bias).pow(3).sum(), weight, create_graph=True)
        return torch.autograd.grad(dw.pow(2).sum(), (x, weight, bias))

    actual = slope(lambda *t: depthwise_conv(*t, padding, steps))
    expected = slope(lambda *t: F.conv2d(*t, padding=padding, dilation=steps, groups=5))
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()


def test_gradients_of_each_sample():
    x, weight, bias = make((6, 6), (5, 5))

    def loss(w, sample):
        return depthwise_conv(sample[None], w, bias.detach(), (2, 2)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight.detach(), x.detach())
    for sample, gradient in zip(x, each, strict=True):
        (expected,) = torch.autograd.grad(loss(weight, sample), weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layers_are_those_of_torch(rank):
    layer = make_depthwise(6, (5,) * rank, dilation=(2,) * rank, bias=False)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1])
    x = torch.randn(2, 6, *[7] * rank)
    assert layer(x).shape == x.shape
    assert layer(x[:0]).shape == x[:0].shape
