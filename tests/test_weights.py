"""Loading into a model: everything or nothing, adapted where that is defined, all of it reported."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from timm.data import ImageNetInfo

import mixzoo
from mixzoo import weights
from mixzoo.weights import CheckpointError

SMALL = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)}
LAYOUTS = ["mixzoo", "sail", "timm"]


def tiny(name: str = "caformer_s18", **options) -> torch.nn.Module:
    return mixzoo.create_model(name, **SMALL | options)


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(model: torch.nn.Module, source, match: str, error=CheckpointError) -> str:
    """The message; also checks that the model stayed as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        mixzoo.load_checkpoint(model, source)
    assert equal(snapshot(model), before)
    return str(caught.value)


# everything or nothing


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_arrive(layout):
    source, model = randomised(tiny()), tiny()
    report = mixzoo.load_checkpoint(model, weights.export(source.state_dict(), layout))
    assert equal(model.state_dict(), source.state_dict())
    assert report.layout == layout
    assert set(report.loaded) == set(model.state_dict())
    assert f"layout {layout}" in str(report)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [1000, 7])
def test_a_missing_tensor_is_named(layout, classes):
    state = weights.export(tiny().state_dict(), layout)
    gone = [key for key in state if "res_scale" in key][-1]
    del state[gone]
    message = refused(tiny(num_classes=classes), state, r"missing, 1 tensor: stages\.3\.blocks\.0\.channel\.res_scale")
    assert "unexpected" not in message


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [1000, 7, 0])
def test_an_unexpected_tensor_is_named(layout, classes):
    state = weights.export(tiny().state_dict(), layout)
    state["stages.2.0.token_mixr.qkv.weight"] = torch.zeros(2)
    refused(tiny(num_classes=classes), state, r"unexpected, 1 tensor: stages\.2\.0\.token_mixr\.qkv\.weight")


def test_an_unknown_key_gets_the_nearest_rule():
    state = weights.export(tiny().state_dict(), "sail")
    state["stages.2.0.res_scale3.scale"] = torch.zeros(32)
    refused(tiny(), state, r"no rule of the layout knows .*; the nearest is 'stages\.\{s\}\.\{i\}\.res_scale\d\.scale'")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shape_off_by_one_is_named(layout):
    source = tiny().state_dict()
    key = "stages.3.blocks.0.channel.op.fc1.weight"
    source[key] = torch.zeros(161, 40)
    message = rf"{re.escape(key)} is \(161, 40\), the model wants \(160, 40\)"
    refused(tiny(), weights.export(source, layout), message)


def test_integers_are_not_weights():
    source = tiny().state_dict()
    source["head.norm.weight"] = torch.ones(40, dtype=torch.int64)
    refused(tiny(), source, r"head\.norm\.weight is int64, the model wants float32")


def test_another_model_is_refused_in_groups(tmp_path):
    path = tmp_path / "convformer.pth"
    torch.save(weights.export(tiny("convformer_s18").state_dict(), "sail"), path)
    message = refused(tiny("caformer_s18"), path, "does not fit caformer_s18")
    assert str(path) in message
    assert "missing, 6 tensors: stages.2.blocks.*" in message.replace("blocks.0.token", "blocks.*").replace(
        "blocks.1", ""
    )
    refused(tiny("poolformer_s12"), path, "does not fit poolformer_s12")
    refused(tiny("poolformer_s12"), {"encoder.x": torch.ones(1)}, "no tensor has a name of this model.*encoder.x")


def test_too_deep_and_too_shallow():
    refused(tiny(), tiny(depths=(1, 1, 3, 1)).state_dict(), r"unexpected.*blocks\.2")
    refused(tiny(depths=(1, 1, 3, 1)), tiny().state_dict(), r"missing.*blocks\.2")


def test_not_strict_leaves_and_reports():
    source, model = randomised(tiny()), tiny()
    state = {"extra": torch.ones(1), **source.state_dict()}
    del state["stem.conv.bias"]
    before = model.stem.conv.bias.clone()
    report = mixzoo.load_checkpoint(model, state, strict=False)
    assert report.fresh == {"stem.conv.bias": "missing in the source"}
    assert report.ignored == {"extra": "unknown to the model"}
    assert torch.equal(model.stem.conv.bias, before)
    assert torch.equal(model.stem.conv.weight, source.stem.conv.weight)
    state["stem.conv.bias"] = torch.ones(17)
    with pytest.raises(CheckpointError, match="misshapen"):
        mixzoo.load_checkpoint(model, state, strict=False)


def test_nan_and_infinity_warn():
    state = tiny().state_dict()
    state["stem.conv.bias"] = torch.full((16,), float("nan"))
    state["head.norm.weight"] = torch.full((40,), float("inf"))
    with pytest.warns(UserWarning, match=r"NaN or Inf in 2 tensors: stem\.conv\.bias, head\.norm\.weight"):
        mixzoo.load_checkpoint(tiny(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_cast_to_the_model(dtype):
    source, model = randomised(tiny()), tiny()
    mixzoo.load_checkpoint(model, {key: tensor.to(dtype) for key, tensor in source.state_dict().items()})
    want = {key: tensor.to(dtype).float() for key, tensor in source.state_dict().items()}
    assert equal(model.state_dict(), want)
    narrow = tiny().to(dtype)
    mixzoo.load_checkpoint(narrow, source.state_dict())
    assert {tensor.dtype for tensor in narrow.state_dict().values()} == {dtype}


def test_meta_device():
    state = tiny().state_dict()
    with pytest.raises(ValueError, match=r"meta device.*to_empty"):
        mixzoo.load_checkpoint(tiny(device="meta"), state)
    empty = tiny(device="meta").state_dict()
    refused(tiny(), empty, "on the meta device")
    assert mixzoo.load_checkpoint(tiny(device="meta"), empty).loaded


def test_only_modules_of_this_library():
    with pytest.raises(TypeError, match="Linear is not a model of mixzoo"):
        mixzoo.load_checkpoint(torch.nn.Linear(2, 2), {})
    with pytest.raises(TypeError, match=r"load before\s+wrapping"):
        mixzoo.load_checkpoint(tiny(features_only=True), tiny().state_dict())
    with pytest.raises(TypeError, match="expected a model, got dict"):
        mixzoo.load_checkpoint({}, {})


def test_wrappers_of_torch_are_looked_through():
    source, model = randomised(tiny()), tiny()
    mixzoo.load_checkpoint(torch.compile(model), source.state_dict())
    assert equal(model.state_dict(), source.state_dict())


def test_frozen_parameters_stay_frozen():
    model = tiny("randformer_s12", img_size=64)
    model.stem.requires_grad_(False)
    mixzoo.load_checkpoint(model, randomised(tiny("randformer_s12", img_size=64)).state_dict())
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert all(p.requires_grad for p in model.stages.parameters())


# channels, classes, grid, mixers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("have", "want"), [(3, 1), (3, 4), (3, 6), (1, 3), (4, 3), (6, 1), (2, 5)])
def test_input_channels(layout, have, want):
    source, model = randomised(tiny(in_chans=have)), tiny(in_chans=want)
    report = mixzoo.load_checkpoint(model, weights.export(source.state_dict(), layout))
    kernel = source.stem.conv.weight
    expected = kernel.sum(1, keepdim=True) if want == 1 else kernel[:, [i % have for i in range(want)]] * (have / want)
    assert torch.allclose(model.stem.conv.weight, expected)
    assert list(report.adapted) == ["stem.conv.weight"]
    if want != 1 and want % have:
        return
    # images whose channels are all alike give the same answer
    grey = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        a, b = (m.stem(grey.expand(-1, m.in_chans, -1, -1)) for m in (source, model))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["caformer_s18", "poolformer_s12"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("have", "want"), [(1000, 7), (7, 1000), (5, 7), (21841, 7)])
def test_other_classes_get_a_fresh_head(name, layout, have, want):
    source, model = randomised(tiny(name, num_classes=have)), tiny(name, num_classes=want)
    head = {key: tensor for key, tensor in snapshot(model).items() if key.startswith("head.fc.")}
    report = mixzoo.load_checkpoint(model, weights.export(source.state_dict(), layout))
    assert set(report.fresh) == set(head)
    assert set(report.ignored) == set(head)
    after = model.state_dict()
    assert all(torch.equal(after[key], head.get(key, source.state_dict()[key])) for key in after)


def test_without_classifier():
    source = randomised(tiny())
    model = tiny(num_classes=0)
    report = mixzoo.load_checkpoint(model, source.state_dict())
    assert all(key.startswith("head.fc.") for key in report.ignored)
    refused(tiny(), randomised(tiny(num_classes=0)).state_dict(), r"missing, 6 tensors: head\.fc\.\*")


def test_a_wrong_head_is_not_taken_for_another_number_of_classes():
    state = tiny(num_classes=7).state_dict()
    state["head.fc.fc2.weight"] = state["head.fc.fc2.weight"][:, :-1]
    refused(tiny(), state, r"head\.fc\.fc2\.weight is \(7, 159\)")
    linear = tiny("poolformerv2_s12", num_classes=7).state_dict()
    refused(
        tiny(), {**tiny().state_dict(), "head.fc.weight": linear["head.fc.weight"]}, r"unexpected, 1.*head\.fc\.weight"
    )


def test_a_fresh_head_that_nobody_asked_for_warns():
    state = tiny(num_classes=7).state_dict()
    with pytest.warns(UserWarning, match="the model has 1000 classes, the source 7; give num_classes="):
        mixzoo.load_checkpoint(tiny(), state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixzoo.load_checkpoint(tiny(num_classes=5), state)


@pytest.mark.parametrize("name", ["caformer_s18", "poolformerv2_s12"])
def test_imagenet_21k_head_to_1k(name):
    source, model = randomised(tiny(name, num_classes=21841)), tiny(name, num_classes=1000)
    report = mixzoo.load_checkpoint(model, source.state_dict())
    assert not report.fresh
    last = "head.fc.fc2" if name == "caformer_s18" else "head.fc"
    assert set(report.adapted) == {f"{last}.weight", f"{last}.bias"}
    large = ImageNetInfo("imagenet-22k").label_names()
    small = ImageNetInfo("imagenet-1k").label_names()
    assert [i for i, synset in enumerate(small) if synset not in set(large)] == [850]
    rows = {
        kind: (source.state_dict()[f"{last}.{kind}"], model.state_dict()[f"{last}.{kind}"])
        for kind in ("weight", "bias")
    }
    for theirs, ours in rows.values():
        # first and last classes as the authors list them
        for i, j in {0: 359, 1: 368, 11: 548, 998: 21367, 999: 21815}.items():
            assert torch.equal(ours[i], theirs[j])
        assert all(torch.equal(ours[i], theirs[large.index(small[i])]) for i in range(0, 1000, 7) if i != 850)
        assert torch.allclose(ours[850], theirs.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("randformer_s12", {}),
        ("metaformer_ppff_s12_224", {}),
        ("metaformer_ppaa_s12_224", {}),
        ("metaformer_pppa_s12_224", {}),
        ("metaformer_s12", {"token_mixer": ["pooling", "pooling", "spatial_fc", "random"]}),
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (128, 64), (96, 160)])
def test_grid_is_resized_as_set_input_size_does_it(name, options, size):
    source = randomised(tiny(name, img_size=96, **options))
    model = tiny(name, img_size=size, **options)
    report = mixzoo.load_checkpoint(model, source.state_dict())
    assert not report.fresh
    assert report.adapted
    source.set_input_size(size)
    assert all(
        torch.allclose(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )


def test_a_grid_that_cannot_be_known_is_refused_unless_recorded(tmp_path):
    source = randomised(tiny("randformer_s12", img_size=(64, 128)))
    refused(tiny("randformer_s12", img_size=64), source.state_dict(), "neither recorded nor square.*set_input_size")
    mixzoo.save(source, tmp_path / "a.safetensors")
    model = tiny("randformer_s12", img_size=64)
    mixzoo.load_checkpoint(model, tmp_path / "a.safetensors")
    source.set_input_size(64)
    assert equal(model.state_dict(), source.state_dict())
    # the same number of tokens on another grid
    turned = tiny("randformer_s12", img_size=(128, 64))
    assert mixzoo.load_checkpoint(turned, tmp_path / "a.safetensors").adapted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swapped_mixers_stay_fresh_and_are_reported(layout):
    source = randomised(tiny("caformer_s18"))
    model = tiny("caformer_s18", token_mixer=["separable_conv", "pooling", "spatial_fc", "attention"], img_size=64)
    before = snapshot(model)
    report = mixzoo.load_checkpoint(model, weights.export(source.state_dict(), layout))
    assert set(report.fresh) == {f"stages.2.blocks.{i}.token.op.fc.weight" for i in range(2)}
    assert {key.split(".")[1] for key in report.ignored} == {"1", "2"}
    assert all(".token.op." in key for key in report.ignored)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key] if key in report.fresh else source.state_dict()[key])


def test_swapped_mixers_do_not_excuse_anything_else():
    state = tiny("caformer_s18").state_dict()
    del state["stages.1.blocks.0.token.norm.weight"]
    refused(tiny("caformer_s18", token_mixer="pooling"), state, r"missing, 1 .*token\.norm\.weight")


def test_swapped_mixers_in_the_source_too(tmp_path):
    options = {"token_mixer": ("separable_conv", {"kernel_size": 5})}
    source = randomised(tiny(**options))
    mixzoo.save(source, tmp_path / "a.safetensors")
    model = tiny(**options)
    assert not mixzoo.load_checkpoint(model, tmp_path / "a.safetensors").fresh
    assert equal(model.state_dict(), source.state_dict())
    other = tiny(token_mixer=("separable_conv", {"kernel_size": 3}))
    fresh = mixzoo.load_checkpoint(other, tmp_path / "a.safetensors").fresh
    assert {key.split(".token.op.")[1].split(".")[0] for key in fresh} >= {"dwconv"}
