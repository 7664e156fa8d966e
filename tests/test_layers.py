"""Fast forms of small layers against their plain ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixzoo.mixers._layers import Dropout, Linear, StarReLU, activated


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


def test_an_evaluated_layer_whose_input_wants_a_gradient_rounds_as_torch_does():
    layer, x = Linear(256, 64).eval(), torch.randn(2, 49, 256, requires_grad=True)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_reaches_onednn_whatever_the_threads(threads, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        Linear(32, 64)(torch.randn(2, 400, 32)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in names
    assert not [name for name in names if "slow_conv" in name]


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


@pytest.mark.parametrize("shape", [(5, 8), (2, 7, 8), (2, 3, 5, 8), (1, 1, 1, 8), (1, 2, 3, 4, 8), (0, 3, 8)])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_gelu_goes_along_with_the_product(shape, approximate, bias):
    layer, act, x = Linear(8, 6, bias=bias), nn.GELU(approximate), torch.randn(shape)
    expected, calls = act(layer(x)), []
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = activated(x, layer, act)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous()
    assert counter.get_total_flops() == 2 * x.numel() * 6
    assert torch.equal(activated(x, layer, act), expected), "with a graph the two are apart"
    act.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        activated(x, layer, act)
    assert calls == [1]


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"stride": 2, "dilation": 2}, {"groups": 4, "bias": False}], ids=str
)
def test_gelu_goes_along_with_the_convolution(options):
    layer, act, x = nn.Conv2d(8, 12, 3, **options), nn.GELU(), torch.randn(2, 8, 9, 7)
    expected = act(layer(x))
    with torch.no_grad():
        y = activated(x.contiguous(memory_format=torch.channels_last), layer, act)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(77,), (300, 401)])
def test_dropout_drops_its_share_and_keeps_the_mean(p, shape):
    layer = Dropout(p).train()
    x = torch.ones(shape, requires_grad=True)
    torch.manual_seed(0)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)
    torch.manual_seed(0)
    assert torch.equal(layer(x), y)
    if p < 1:
        torch.testing.assert_close(y[y > 0].unique(), torch.tensor([1 / (1 - p)]), rtol=1e-4, atol=0)
    if len(shape) == 2:
        assert abs((y == 0).float().mean().item() - p) < 5e-3
        # neighbours share a random number
        dropped = (y[:, :400] == 0).double().reshape(-1, 4).T
        assert p == 1 or (torch.corrcoef(dropped) - torch.eye(4)).abs().max() < 0.02


def test_dropout_leaves_the_dtype_and_evaluation_alone():
    x = torch.randn(5, 3, dtype=torch.bfloat16)
    assert Dropout(0.3).train()(x).dtype == torch.bfloat16
    assert Dropout(0.3).eval()(x) is x
    assert Dropout(0.3)(x[:0]).shape == (0, 3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)
