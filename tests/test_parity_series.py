"""Outputs and input gradients of TimeMixer, PatchTSMixer and TSMixer against the published implementations.

A fixture lists the keys of a reference checkpoint; its tensors follow from their names. They go through
`load_checkpoint`, strictly, so a wrong key rule cannot hide.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import mixzoo
from mixzoo import weights
from mixzoo.mixers.decomposable_mixing import PastDecomposableMixing

FOLDER = Path(__file__).parent / "parity"
_spec = importlib.util.spec_from_file_location("parity", FOLDER / "parity.py")
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

RTOL = 1e-4
# the reference pairs marks with rows of other samples, which is on request here
LEGACY = {"timemixer_etth1_96_96@mixed_marks": {"legacy": True}}
TIMEMIXERS = [
    "timemixer_etth1_96_96",
    "timemixer_etth1_96_96@mixed_marks",
    "timemixer_etth1_96_96@no_marks",
    "timemixer_pems08_96_12",
]


def open_fixture(name: str):
    fixture = parity.load_fixture(FOLDER / "fixtures" / f"{name}.json.gz")
    inputs = {key: parity.seeded_input(key, spec) for key, spec in fixture["inputs"].items()}
    return fixture, parity.reference_state_dict(fixture), inputs


def load_whole(module: torch.nn.Module, fixture: dict, state: dict) -> torch.nn.Module:
    """Load, and check that nothing of either side was left out but what the reference never uses."""
    report = mixzoo.load_checkpoint(module, state)
    assert not report.fresh
    assert not report.adapted
    assert set(report.loaded) == set(module.state_dict())
    dead = sum(
        t.numel() for key, t in state.items() if key in fixture.get("unused_keys", ()) and not key.endswith(".pe")
    )
    if "unused_keys" in fixture:
        marks = "enc_embedding.temporal_embedding.embed.weight"
        used = dead - (state[marks].numel() if marks in fixture["unused_keys"] and module.marks is not None else 0)
        assert sum(p.numel() for p in module.parameters()) == fixture["parameters"] - used
    else:
        assert not report.ignored
    return module.eval()


def assert_equal(fixture: dict, outputs: dict[str, torch.Tensor]) -> None:
    assert parity.compare(fixture, outputs, fixture.get("rtol", RTOL)) == []


@pytest.mark.parametrize("name", TIMEMIXERS)
def test_timemixer(name):
    fixture, state, inputs = open_fixture(name)
    model = load_whole(mixzoo.create_model(name.partition("@")[0], **LEGACY.get(name, {})), fixture, state)
    x, marks = inputs["x"].requires_grad_(), inputs.get("x_mark")
    y = model(x, past_time_features=marks)
    maps = model.forward_features(x, marks)
    outputs = {"prediction": y, **{f"features_{i}" if i else "features": h for i, h in enumerate(maps)}}
    outputs["grad_x"] = torch.autograd.grad(y.sum(), x)[0]
    assert_equal(fixture, outputs)


def test_marks_belong_to_their_sample_unless_legacy():
    fixture, state, inputs = open_fixture("timemixer_etth1_96_96@mixed_marks")
    model = mixzoo.create_model("timemixer_etth1_96_96", checkpoint=state).eval()
    with torch.no_grad():
        y = model(inputs["x"], inputs["x_mark"])
        alone = torch.cat([model(x, m) for x, m in zip(inputs["x"].split(1), inputs["x_mark"].split(1), strict=True)])
    assert parity.compare(fixture, {"prediction": y})
    torch.testing.assert_close(y, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "cross"), [("mixer_timemixer_pdm", False), ("mixer_timemixer_pdm_channelmix", True)])
def test_past_decomposable_mixing(name, cross):
    fixture, state, inputs = open_fixture(name)
    module = PastDecomposableMixing(8, (48, 24, 12), hidden=24, cross=cross)
    mixzoo.load_checkpoint(module, state)
    scales = [inputs[f"x_{i}"].requires_grad_() for i in range(3)]
    mixed = module(scales)
    gradients = torch.autograd.grad(sum(y.sum() for y in mixed), scales)
    outputs = {f"y_{i}": y for i, y in enumerate(mixed)} | {f"grad_x_{i}": g for i, g in enumerate(gradients)}
    assert_equal(fixture, outputs)


@pytest.mark.parametrize("name", [name for name in TIMEMIXERS if "@" not in name])
def test_exported_timemixers_have_every_key_of_the_reference(name):
    _, state, _ = open_fixture(name)
    layout = weights._rules.choose(state)
    converted = layout.convert(state)
    again = layout.export(converted.tensors, converted.dead)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())
    model = mixzoo.create_model(name, checkpoint=state)
    exported = weights.export(model.state_dict(), "timemixer")
    lacking = {key for key in state if key not in exported}
    # parameters that this configuration never uses
    assert all(key.startswith(("normalize_layers.", "enc_embedding.temporal")) for key in lacking)
    assert all(exported[key].shape == state[key].shape for key in exported)
    twice = mixzoo.create_model(name, checkpoint=exported)
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), model.state_dict().values(), strict=True))


def forecaster_outputs(model: torch.nn.Module, x: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """The model's output by its name in the fixtures, the features, and the gradient of their input."""
    y = model(x)
    return {name: y, "features": model.forward_features(x), "grad_x": torch.autograd.grad(y.sum(), x)[0]}


@pytest.mark.parametrize("name", ["patchtsmixer_etth1_512_96", "patchtsmixer_mixchannel_512_96"])
def test_patchtsmixer_forecasts(name):
    fixture, state, inputs = open_fixture(name)
    model = load_whole(mixzoo.create_model(name), fixture, state)
    assert_equal(fixture, forecaster_outputs(model, inputs["past_values"].requires_grad_(), "prediction"))


def test_patchtsmixer_classifies():
    fixture, state, inputs = open_fixture("patchtsmixer_classification_512")
    model = load_whole(mixzoo.create_model("patchtsmixer_classification_512"), fixture, state)
    assert_equal(fixture, forecaster_outputs(model, inputs["past_values"].requires_grad_(), "logits"))


def test_tsmixer():
    fixture, state, inputs = open_fixture("tsmixer_allmlp_96_96")
    model = load_whole(mixzoo.create_model("tsmixer_allmlp_96_96"), fixture, state)
    assert_equal(fixture, forecaster_outputs(model, inputs["x"].requires_grad_(), "prediction"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixer_patchtsmixer_layer", {"mode": "mix_channel"}),
        ("mixer_patchtsmixer_layer_batchnorm", {"norm": "batch"}),
        ("mixer_patchtsmixer_layer_nogate", {"gated": False}),
        ("mixer_patchtsmixer_patch_attn", {"attn_heads": 3}),
    ],
)
def test_layers_of_patchtsmixer(name, options):
    fixture, state, inputs = open_fixture(name)
    sizes = {"context_length": 96, "patch_length": 8, "patch_stride": 8, "num_channels": 5, "dim": 12, "ratio": 2.0}
    model = mixzoo.create_model("patchtsmixer", depth=1, **sizes, **options)
    layer = model.blocks[0].token if name.endswith("attn") else model.blocks[0]
    load_whole(layer, fixture, state)
    x = inputs["x"].requires_grad_()
    y = layer(x) if model.mixed else layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    assert_equal(fixture, {"y": y, "grad_x": torch.autograd.grad(y.square().sum(), x)[0]})


SERIES = [name for name in mixzoo.list_models(modality="series") if name.startswith(("timem", "patchts", "tsmixer"))]


@pytest.mark.parametrize("name", SERIES)
def test_every_model_has_names_in_the_layout_of_its_authors(name):
    model = mixzoo.create_model(name, device="meta")
    theirs = weights.export(model.state_dict(), name.split("_")[0])
    report = mixzoo.load_checkpoint(model, theirs)
    assert set(report.loaded) == set(model.state_dict())
    layout = weights._rules.choose(theirs)
    converted = layout.convert(theirs)
    again = layout.export(converted.tensors, converted.dead)
    assert {key: tensor.shape for key, tensor in again.items()} == {key: t.shape for key, t in theirs.items()}


@pytest.mark.parametrize("name", ["timemixer", "timemixer_pems08_96_12", "patchtsmixer", "tsmixer_allmlp"])
def test_a_shorter_horizon_takes_the_first_steps(name):
    sizes = {"num_channels": 5}
    model = mixzoo.create_model(name, **sizes).eval()
    short = mixzoo.create_model(name, prediction_length=7, **sizes, checkpoint=model.state_dict()).eval()
    x = torch.randn(2, model.context_length, 5)
    with torch.no_grad():
        torch.testing.assert_close(short(x), model(x)[:, :7])
    with pytest.raises(weights.CheckpointError, match=r"misshapen.*head\.time"):
        mixzoo.create_model(name, **sizes, checkpoint=short.state_dict())


PATCHTSMIXERS = ["patchtsmixer_etth1_512_96", "patchtsmixer_mixchannel_512_96", "patchtsmixer_classification_512"]


@pytest.mark.parametrize("name", [*PATCHTSMIXERS, "tsmixer_allmlp_96_96"])
def test_exported_models_have_the_keys_of_the_reference(name):
    _, state, _ = open_fixture(name)
    exported = weights.export(mixzoo.create_model(name, checkpoint=state).state_dict(), name.split("_")[0])
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], tensor) for key, tensor in state.items())
