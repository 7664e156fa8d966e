"""Folded models give what the trained ones give, and their files come back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mixzoo
from mixzoo import weights
from mixzoo.models import example_inputs
from mixzoo.scripts import convert


def with_statistics(model: nn.Module) -> nn.Module:
    """Running statistics and affine values as of a trained model."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(0.2 * torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


def outputs(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    inputs = example_inputs(model, 2)
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else torch.cat([part.flatten() for part in result])


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def test_every_model_gives_the_same_folded(model_kind, small):
    model = with_statistics(small(model_kind))
    expected, before = outputs(model), {key: t.clone() for key, t in model.state_dict().items()}
    folded = mixzoo.reparameterize(model)
    torch.testing.assert_close(outputs(folded), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items()), "the original was changed"
    assert norms(folded) == 0


@pytest.mark.parametrize("name", ["overlock_xt", "iformer_small", "affnet_et"])
def test_models_with_norms_to_fold_change_once(name, small):
    model = with_statistics(small(name))
    assert norms(model) > 0
    folded = mixzoo.reparameterize(model)
    assert len(folded.state_dict()) < len(model.state_dict())
    again = mixzoo.reparameterize(folded)
    assert torch.equal(outputs(again), outputs(folded))
    assert mixzoo.reparameterize(model, inplace=True) is model
    assert torch.equal(outputs(model), outputs(folded))


@pytest.mark.parametrize("name", ["overlock_xt", "iformer_small"])
@pytest.mark.parametrize("fold_norms", [True, False])
def test_folded_models_come_back(name, fold_norms, small, tmp_path):
    model = mixzoo.reparameterize(with_statistics(small(name)), norms=fold_norms)
    mixzoo.save(model, tmp_path / "folded.safetensors")
    back = mixzoo.load(tmp_path / "folded.safetensors").eval()
    assert back.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(outputs(back), outputs(model))
    with pytest.raises(weights.CheckpointError, match=r"reparameterized.*mixzoo\.load"):
        mixzoo.load_checkpoint(small(name), tmp_path / "folded.safetensors")


def test_the_authors_folded_keys_are_written_and_read(small, tmp_path):
    model = with_statistics(small("overlock_xt"))
    mixzoo.save(model, tmp_path / "trained.safetensors")
    source, out = tmp_path / "trained.safetensors", tmp_path / "folded.pth"
    assert convert.main([str(source), str(out), "--reparameterize", "--to", "overlock"]) == 0
    state = torch.load(out, weights_only=True)
    assert any(key.endswith("lk_origin.bias") for key in state)
    assert not any("dil_conv" in key or "origin_bn" in key for key in state)
    deployed = small("overlock_xt_reparam")
    mixzoo.load_checkpoint(deployed, out)
    torch.testing.assert_close(outputs(deployed), outputs(model), rtol=1e-4, atol=1e-4)
    out = tmp_path / "folded.safetensors"
    assert convert.main([str(source), str(out), "--reparameterize"]) == 0
    torch.testing.assert_close(outputs(mixzoo.load(out).eval()), outputs(model), rtol=1e-4, atol=1e-4)
