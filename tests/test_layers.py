"""Fast forms of small layers against their plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mixzoo.mixers._layers import Linear, StarReLU


@pytest.mark.parametrize("shape", [(5, 8), (2, 7, 8), (2, 3, 5, 8), (1, 2, 3, 4, 8), (0, 3, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_linear_map_of_torch(shape, bias):
    layer = Linear(8, 6, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    inputs = (x, *layer.parameters())
    y, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous()
    weights = torch.randn(y.shape)
    for actual, wanted in zip(
        torch.autograd.grad((y * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_star_relu_is_its_formula_up_to_second_derivatives():
    layer = StarReLU(0.9, -0.4, dtype=torch.float64)
    # away from zero, where the second derivative jumps
    x = torch.randn(3, 5, dtype=torch.float64)
    x = (x + 0.1 * x.sign()).requires_grad_()
    plain = layer.scale * torch.relu(x).square() + layer.bias
    torch.testing.assert_close(layer(x), plain)
    weights = torch.randn(3, 5, dtype=torch.float64)
    inputs = (x, layer.scale, layer.bias)
    for actual, wanted in zip(
        torch.autograd.grad((layer(x) * weights).sum(), inputs),
        torch.autograd.grad((plain * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)

    def of(x, scale, bias):
        return torch.func.functional_call(layer, {"scale": scale, "bias": bias}, (x,))

    assert torch.autograd.gradgradcheck(of, inputs)
