"""Key rules: the pattern grammar, and the round trip of every layout for every model."""

from __future__ import annotations

import fnmatch
import functools
from pathlib import Path

import pytest
import timm
import torch

import mixzoo
from mixzoo import weights
from mixzoo.weights._rules import OWN, Layout, Pattern, Rule, Transform, choose, under

SMALL = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)}
FAMILY = ("poolformer*", "metaformer*", "identityformer*", "randformer*", "convformer*", "caformer*")
MODELS = [name for name in mixzoo.list_models() if any(fnmatch.fnmatch(name, f) for f in FAMILY)]
V1 = [name for name in MODELS if name.startswith(("poolformer_", "metaformer_id", "metaformer_p"))]
CLASSIFIERS = [name for name in MODELS if not name.endswith("_feat")]
ON_TIMM = [name for name in CLASSIFIERS if mixzoo.models.timm_bridge.timm_name(name) != name]

# layout: the models it can hold
HOLDS = {
    "sail": MODELS,
    "timm": ON_TIMM,
    "huggingface": [name for name in V1 if name.startswith("poolformer_") and name in CLASSIFIERS],
    "mmpretrain": [name for name in V1 if name.startswith("poolformer_") and name in CLASSIFIERS],
    "mmdetection": [name for name in V1 if name.endswith("_feat")],
    "mixzoo": MODELS,
}
PAIRS = [(layout, name) for layout, names in HOLDS.items() for name in names]


def bits(state: dict) -> dict:
    return {key: (tuple(t.shape), t.dtype, t.contiguous().numpy().tobytes()) for key, t in state.items()}


@functools.cache
def blueprint(name: str) -> torch.nn.Module:
    """The model at its full size, without values."""
    return mixzoo.create_model(name, device="meta")


def filled(name: str, **options) -> torch.nn.Module:
    """A small model whose every tensor differs from its initial value, so that nothing stands for anything else."""
    model = mixzoo.create_model(name, **SMALL | options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_full_depth_keys_and_shapes_survive(layout, name):
    model = blueprint(name)
    theirs = weights.export(model.state_dict(), layout)
    report = mixzoo.load_checkpoint(model, theirs)
    assert report.layout == layout
    assert set(report.loaded) == set(model.state_dict())
    assert not report.fresh
    assert not report.ignored
    used = choose(theirs, model.state_dict())
    again = used.export(used.convert(theirs).tensors)
    assert {k: t.shape for k, t in again.items()} == {k: t.shape for k, t in theirs.items()}


@pytest.mark.parametrize(("layout", "name"), [p for p in PAIRS if p[1].endswith(("s12", "s12_224", "s18", "s12_feat"))])
def test_round_trip_is_exact(layout, name):
    ours = filled(name).state_dict()
    theirs = weights.export(ours, layout)
    used = choose(theirs, ours)
    assert bits(used.convert(theirs).tensors) == bits(ours)
    assert bits(used.export(used.convert(theirs).tensors)) == bits(theirs)
    assert bits(weights.convert(theirs)) == bits(ours)


@pytest.mark.parametrize("name", ON_TIMM)
def test_timm_layout_is_that_of_timm(name):
    with torch.device("meta"):
        theirs = timm.create_model(name).state_dict()
    ours = weights.export(blueprint(name).state_dict(), "timm")
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}


@pytest.mark.parametrize("name", ["poolformerv2_s12", "convformer_s18", "caformer_s18"])
def test_timm_weights_give_timm_logits(name):
    theirs = timm.create_model(name).eval()
    ours = mixzoo.create_model(name, checkpoint=theirs.state_dict()).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        want, got = theirs(x), ours(x)
    # timm's MLP head has another eps in its norm
    assert torch.allclose(got, want, rtol=0, atol=1e-3 * want.std().item())


def test_timm_poolformer_agrees_up_to_its_head():
    theirs = timm.create_model("poolformer_s12").eval()
    ours = mixzoo.create_model("poolformer_s12", checkpoint=theirs.state_dict()).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        want, got = theirs.forward_features(x), ours.forward_features(x)
    assert torch.allclose(got, want, rtol=0, atol=1e-4 * want.std().item())


def test_either_rank_of_a_pointwise_weight_is_read():
    model = filled("caformer_s18")
    timms = weights.export(model.state_dict(), "timm")
    flat = {k: t.flatten(1) if t.shape[2:] == (1, 1) else t for k, t in timms.items()}
    mlp = [k for k in flat if k.endswith(("mlp.fc1.weight", "mlp.fc2.weight"))]
    deep = {**flat, **{k: flat[k][:, :, None, None] for k in mlp}}
    for state in (flat, deep):
        loaded = mixzoo.create_model("caformer_s18", **SMALL, checkpoint=state)
        assert bits(loaded.state_dict()) == bits(model.state_dict())


def test_openmmlab_detector_leaves_its_head_out():
    model = filled("poolformer_s12_feat")
    theirs = weights.export(model.state_dict(), "mmdetection")
    theirs["neck.lateral_convs.0.conv.weight"] = torch.zeros(2, 2, 1, 1)
    theirs["bbox_head.retina_cls.bias"] = torch.zeros(3)
    report = mixzoo.load_checkpoint(model, {"state_dict": theirs, "meta": {"epoch": 12}})
    assert set(report.ignored) == {"neck.lateral_convs.0.conv.weight", "bbox_head.retina_cls.bias", "meta"}
    layout = choose(theirs, model.state_dict())
    converted = layout.convert(theirs)
    assert bits(layout.export(converted.tensors, converted.dead)) == bits(theirs)


@pytest.mark.parametrize("layout", ["sail", "timm", "huggingface", "mmpretrain", "mixzoo"])
def test_imagenet_weights_start_a_dense_prediction_model(layout):
    classifier = filled("poolformer_s12")
    dense = mixzoo.create_model("poolformer_s12_feat", **SMALL)
    report = mixzoo.load_checkpoint(dense, weights.export(classifier.state_dict(), layout))
    assert {key.split(".")[0] for key in report.fresh} == {"norms"}
    assert {key.split(".")[0] for key in report.ignored} == {"head"}
    assert bits(dense.body.stages.state_dict()) == bits(classifier.stages.state_dict())


def test_a_layout_without_a_name_for_a_mixer_refuses():
    swapped = mixzoo.create_model("caformer_s18", token_mixer="spatial_fc", img_size=64, **SMALL)
    with pytest.raises(weights.CheckpointError, match=r"'timm'.*token\.op\.fc\.weight"):
        weights.export(swapped.state_dict(), "timm")
    with pytest.raises(ValueError, match=r"no layout named 'keras'; layouts: .*timm"):
        weights.export(swapped.state_dict(), "keras")


def test_an_unknown_key_is_named_without_a_model_too():
    state = weights.export(blueprint("caformer_s18").state_dict(), "sail")
    with pytest.raises(weights.CheckpointError, match=r"sail-sg/metaformer\) knows stages\.0\.0\.norm3\.weight"):
        weights.convert({**state, "stages.0.0.norm3.weight": state["norm.weight"]})


def test_every_family_is_imported():
    files = {path.stem for path in Path(weights.__file__).parent.glob("[!_]*.py")}
    assert files <= set(weights.__all__)
    assert files <= set(dir(weights))


def test_every_layout_of_these_families_is_exercised():
    used = set()
    for layout, name in PAIRS:
        if "s12" in name:
            state = blueprint(name).state_dict()
            used.add(choose(weights.export(state, layout), state))
    ours = [*weights.poolformer.LAYOUTS, *weights.metaformer_baselines.LAYOUTS]
    assert {layout for layout in ours if not layout.bridge and ", one " not in layout.title} <= used


# the grammar


@pytest.mark.parametrize(
    ("pattern", "key", "values"),
    [
        ("a.{i}.b", "a.12.b", {"i": 12}),
        ("a.{i}.b", "a.x.b", None),
        ("a.{2s}", "a.6", {"s": 3}),
        ("a.{2s}", "a.5", None),
        ("a.{2s-1}", "a.5", {"s": 3}),
        ("a{s+1}.{p:weight|bias}", "a1.bias", {"s": 0, "p": "bias"}),
        ("a{s+1}", "a0", None),
        ("a.{p:weight|bias}", "a.scale", None),
        ("a.{rest:*}", "a.b.c.d", {"rest": "b.c.d"}),
        ("{i}.{i}", "3.3", {"i": 3}),
        ("{i}.{i}", "3.4", None),
    ],
)
def test_pattern(pattern, key, values):
    assert Pattern(pattern).match(key) == values
    if values is not None:
        assert Pattern(pattern).fill(values) == key


@pytest.mark.parametrize("layout", weights.LAYOUTS, ids=lambda layout: f"{layout.name}: {layout.title}")
def test_every_rule_is_well_formed(layout):
    assert layout.marks
    for rule in layout.table:
        assert rule.via
        assert rule.patterns or rule.why


def test_a_rule_checks_itself():
    with pytest.raises(ValueError, match="different placeholders"):
        Rule("a.{i}", "b.{j}").patterns  # noqa: B018
    with pytest.raises(ValueError, match="without a reason"):
        Rule("a", None)
    with pytest.raises(ValueError, match="malformed"):
        Pattern("a.{I}")


def test_one_key_to_several_parameters():
    halves = Transform(lambda t: (t[: len(t) // 2], t[len(t) // 2 :]), lambda a, b: torch.cat((a, b)))
    layout = Layout(
        "theirs",
        "tied and split tensors",
        ("tied",),
        [("tied", ("embed", "out")), ("kv.{i}", ("k.{i}", "v.{i}"), halves), ("ids", None, "a constant")],
    )
    theirs = {"tied": torch.randn(3), "kv.0": torch.randn(4, 2), "ids": torch.arange(3)}
    converted = layout.convert(theirs)
    assert sorted(converted.tensors) == ["embed", "k.0", "out", "v.0"]
    assert bits(layout.export(converted.tensors, converted.dead)) == bits(theirs)
    assert converted.reasons == {"ids": "a constant"}
    with pytest.raises(weights.CheckpointError, match="different values"):
        layout.export({**converted.tensors, "out": torch.zeros(3)})
    with pytest.raises(weights.CheckpointError, match=r"stores k\.0, v\.0 together"):
        layout.export({"k.0": torch.zeros(2)})


def test_rules_can_be_moved_under_a_prefix():
    (rule,) = under("net.{s}.", "stages.{s}.", [("w", "x", "pointwise")])
    assert (rule.theirs, rule.ours, rule.transform) == ("net.{s}.w", ("stages.{s}.x",), "pointwise")


def test_our_own_layout_is_the_fallback():
    assert choose(["nothing.known"], ["a"]) is OWN
