"""Saving a model, and rebuilding it from the file alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import mixzoo
from mixzoo import weights
from mixzoo.weights import CheckpointError

SMALL = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)}


def tiny(name: str = "caformer_s18", **options) -> torch.nn.Module:
    return mixzoo.create_model(name, **SMALL | options)


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("caformer_s18", {}),
        ("caformer_s18.sail_in22k", {"num_classes": 3}),
        ("poolformer_s12", {"in_chans": 1, "num_classes": 10, "stem_stride": 1, "stem_kernel": 3, "stem_padding": 1}),
        ("poolformer_s12_feat", {"in_chans": 4}),
        ("metaformer_s12", {"token_mixer": ["pooling", "identity", "random", ("attention", {"head_dim": 16})]}),
        ("randformer_s12", {"img_size": (64, 96)}),
        ("convformer_s18", {"num_classes": 0, "global_pool": ""}),
    ],
)
def test_save_and_load(tmp_path, name, options):
    options = {"img_size": 64, **options}
    model = randomised(tiny(name, **options)).eval()
    model.class_names = ["cat", "дог", "鳥"]
    mixzoo.save(model, tmp_path / "model.safetensors")
    again = mixzoo.load(tmp_path / "model.safetensors").eval()
    assert equal(again.state_dict(), model.state_dict())
    assert again.class_names == model.class_names
    assert again.config["model"] == model.config["model"]
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    x = torch.randn(1, model.in_chans, *model.img_size)
    with torch.no_grad():
        a, b = model(x), again(x)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_changed_after_creation_is_saved(tmp_path):
    model = tiny("randformer_s12", img_size=64)
    model.reset_classifier(4, "max")
    model.set_input_size((96, 64))
    mixzoo.save(model, tmp_path / "a.safetensors")
    again = mixzoo.load(tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))
    assert again.img_size == (96, 64)


def test_what_could_not_be_rebuilt_is_not_saved(tmp_path):
    model = tiny()
    model.head.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"changed after it was created.*head\.extra"):
        mixzoo.save(model, tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match="does not know how it was created"):
        mixzoo.save(mixzoo.MetaFormer(depths=(1,), dims=(8,)), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="meta device"):
        mixzoo.save(tiny(device="meta"), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        mixzoo.save(tiny(), path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_is_kept(tmp_path, dtype):
    model = randomised(tiny()).to(dtype)
    mixzoo.save(model, tmp_path / "a.safetensors")
    assert equal(mixzoo.load(tmp_path / "a.safetensors").state_dict(), model.state_dict())


def test_header_and_provenance(tmp_path):
    model = tiny(num_classes=2)
    torch.save(weights.export(tiny().state_dict(), "sail"), tmp_path / "caformer_s18.pth")
    mixzoo.load_checkpoint(model, tmp_path / "caformer_s18.pth")
    mixzoo.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        header = file.metadata()
    assert header["format"] == "mixzoo"
    assert json.loads(header["config"])["options"]["num_classes"] == 2
    assert json.loads(header["weights"]) == {"source": "caformer_s18.pth"}
    assert mixzoo.load(tmp_path / "a.safetensors").config["weights"] == {"source": "caformer_s18.pth"}


def test_class_names_come_with_their_head(tmp_path):
    model = tiny(num_classes=2)
    model.class_names = ["cat", "dog"]
    mixzoo.save(model, tmp_path / "a.safetensors")
    same, other = (tiny(num_classes=n, checkpoint=tmp_path / "a.safetensors") for n in (2, 3))
    assert same.class_names == ["cat", "dog"]
    assert other.class_names is None


def test_load_wants_a_description(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"create_model\(name, checkpoint=path\)"):
        mixzoo.load(tmp_path / "a.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"format": "mixzoo", "format_version": "9"})
    with pytest.raises(CheckpointError, match="format version 9"):
        mixzoo.load(tmp_path / "a.safetensors")
    config = json.dumps({"model": "caformer_s18", "options": {"token_mixer": "of_another_package"}})
    header = {"format": "mixzoo", "format_version": "1", "config": config}
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match=r"cannot be built here.*of_another_package"):
        mixzoo.load(tmp_path / "a.safetensors")
