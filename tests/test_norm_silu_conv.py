"""Batch norm, SiLU and convolution with one map kept, against the three layers one after another."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import mixzoo
from mixzoo.mixers import _layers, _norm_silu_conv
from mixzoo.mixers._layers import InplaceSiLU
from mixzoo.mixers._norm_silu_conv import norm_silu_conv


@pytest.fixture(autouse=True)
def slices_of_two(monkeypatch):
    monkeypatch.setattr(_norm_silu_conv, "LARGE", 1)
    monkeypatch.setattr(_layers, "SLICE_ELEMENTS", 2 * 6 * 7 * 9)


def layers(act: type[nn.Module] = InplaceSiLU, **options) -> tuple[BatchNormAct2d, nn.Conv2d]:
    torch.manual_seed(0)
    options = {"kernel_size": 3, "padding": 1} | options
    norm, conv = BatchNormAct2d(6, act_layer=act), nn.Conv2d(6, 12, **options)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.double(), conv.double()


def maps() -> Tensor:
    x = 2 + torch.randn(5, 6, 7, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def is_lean(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_NormSiluConvBackward"


def assert_twins(norm: nn.Module, conv: nn.Module) -> None:
    """Values, gradients, their derivatives and running statistics."""
    x, other = maps(), copy.deepcopy(norm)
    outputs = norm_silu_conv(x, norm, conv), conv(other(x))
    assert is_lean(outputs[0])
    assert not is_lean(outputs[1])
    results = []
    for y, layer in zip(outputs, (norm, other), strict=True):
        inputs = [t for t in (x, *layer.parameters(), *conv.parameters()) if t.requires_grad]
        once = torch.autograd.grad(y.sin().sum(), inputs, retain_graph=True)
        twice = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        curvature = torch.autograd.grad(sum(g.square().sum() for g in twice), x)
        results.append([y, *once, *twice, *curvature, layer.running_mean, layer.running_var, layer.num_batches_tracked])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 6},
        {"groups": 6, "stride": 2, "bias": False},
        {"kernel_size": 1, "padding": 0},
        {"dilation": 2, "padding": 2},
    ],
    ids=["depthwise", "strided", "pointwise", "dilated"],
)
def test_equals_the_layers(options):
    assert_twins(*layers(**options))


@pytest.mark.parametrize("frozen", ["norm.weight", "norm.bias", "conv.weight", "conv.bias"])
def test_frozen_parameters(frozen):
    norm, conv = layers()
    dict(nn.ModuleDict({"norm": norm, "conv": conv}).named_parameters())[frozen].requires_grad_(False)
    assert_twins(norm, conv)


def test_one_map_is_kept():
    norm, conv = layers(groups=6)
    x, kept = maps(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        norm_silu_conv(x, norm, conv)
    assert [n for n in kept if n >= x.numel()] == [x.numel()]


def test_layers_in_any_other_state_run_themselves():
    x = maps()
    norm, conv = layers()
    seen = []
    handle = norm.register_forward_hook(lambda *args: seen.append(1))
    assert not is_lean(norm_silu_conv(x, norm, conv))
    assert seen == [1]
    handle.remove()
    for other in (nn.BatchNorm2d(6).double(), layers(nn.ReLU)[0], layers()[0].eval()):
        torch.testing.assert_close(norm_silu_conv(x, other, conv), conv(other(x)))
    for options in ({"momentum": None}, {"track_running_stats": False}, {"affine": False}):
        norm = BatchNormAct2d(6, act_layer=InplaceSiLU, **options).double()
        assert not is_lean(norm_silu_conv(x, norm, conv))
    norm, _ = layers()
    with torch.no_grad():
        assert norm_silu_conv(x, norm, conv).grad_fn is None
    norm.num_batches_tracked = None  # which functional transforms may not change
    norm.running_mean = norm.running_var = None
    torch.func.grad(lambda x: norm_silu_conv(x, norm, conv).sum())(x.detach())


def test_a_model_trains_alike(monkeypatch):
    options = {"widths": (8, 8, 16, 16, 24), "depths": (1, 1, 1), "img_size": 64, "num_classes": 5}
    torch.manual_seed(0)
    model = mixzoo.create_model("affnet_et", **options).double().train()
    x, results = torch.randn(3, 3, 64, 64, dtype=torch.float64), []
    for large in (1, 2**40):
        monkeypatch.setattr(_norm_silu_conv, "LARGE", large)
        twin = copy.deepcopy(model)
        twin(x).square().sum().backward()
        results.append({n: p.grad for n, p in twin.named_parameters()} | dict(twin.named_buffers()))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)
