"""Response norm and the MLP around it, in their fast forms, against the same written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mixzoo.mixers import _layers
from mixzoo.mixers._conv_parts import ResponseNorm
from mixzoo.mixers._local_mlp import LocalMlp


def written_out(x: Tensor, norm: ResponseNorm) -> Tensor:
    g = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return (norm.gamma * g / (g.mean(-1, keepdim=True) + norm.eps) + 1) * x + norm.beta


def one_by_one(x: Tensor, mlp: LocalMlp) -> Tensor:
    conv = mlp.local.conv
    a = nn.functional.gelu(nn.functional.linear(x, mlp.fc1.weight, mlp.fc1.bias)).permute(0, 3, 1, 2)
    y = a + nn.functional.conv2d(a, conv.weight, conv.bias, padding=1, groups=len(conv.weight))
    return nn.functional.linear(written_out(y.permute(0, 2, 3, 1), mlp.norm), mlp.fc2.weight, mlp.fc2.bias)


def assert_same(function, plain, module, x):
    inputs = [x, *module.parameters()]
    actual, expected = function(x), plain(x, module)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(y.sin().sum(), inputs) for y in (actual, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def make(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in module.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return module


def test_response_norm():
    norm = make(ResponseNorm(6, dtype=torch.float64))
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    assert_same(norm, written_out, norm, x.requires_grad_())
    silent = x.detach() * torch.tensor([1.0, 1, 0, 1, 1, 0], dtype=x.dtype)
    assert_same(norm, written_out, norm, silent.requires_grad_())


@pytest.mark.parametrize("elements", [2**20, 5 * 4 * 20 * 2, 1])
def test_local_mlp_on_slices(elements, monkeypatch):
    monkeypatch.setattr(_layers, "SLICE_ELEMENTS", elements)
    mlp = make(LocalMlp(6, 20, dtype=torch.float64))
    x = torch.randn(5, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    assert_same(mlp, one_by_one, mlp, x)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), one_by_one(x, mlp))
        assert mlp(x[:0]).shape == x[:0].shape
    torch.func.grad(lambda x: mlp(x).sum())(x.detach())


def test_one_wide_map_is_kept_for_the_backward_pass():
    mlp, saved = LocalMlp(6, 24), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        mlp(torch.randn(2, 16, 16, 6))
    assert sum(n for n in saved if n >= 2 * 16 * 16 * 24) == 2 * 16 * 16 * 24


def test_layers_in_the_place_of_its_own_are_used():
    mlp = make(LocalMlp(6, 20))
    x = torch.randn(2, 5, 4, 6)
    y, calls = mlp(x), []
    handle = mlp.fc2.register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(mlp(x), y)
    assert calls == [1]
    handle.remove()
    mlp.fc2 = nn.Sequential(mlp.fc2, nn.Flatten(0))
    assert mlp(x).shape == (2 * 5 * 4 * 6,)
