"""Outputs and input gradients of the spectral families (FNet's mixer, GFNet, AFFNet, SVT, DTCWT) against the published
implementations; see `test_parity_metaformer`.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mixzoo
from mixzoo.mixers import dtcwt_forward, dtcwt_inverse

FOLDER = Path(__file__).parent / "parity"
FIXTURES = FOLDER / "fixtures"
_spec = importlib.util.spec_from_file_location("parity", FOLDER / "parity.py")
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

FAMILIES = re.compile(r"(gfnet_|affnet_|svt_|affblock|block_aff|mixer_(aff|gfnet|fnet|svt|dtcwt))")
NAMES = sorted(path.name.removesuffix(".json.gz") for path in FIXTURES.glob("*.json.gz"))
NAMES = [name for name in NAMES if FAMILIES.match(name)]
MODELS = [name for name in NAMES if re.match(r"(gfnet|affnet|svt)_", name)]

# fixture: mixer, options, grid, whether the reference's maps are (B, C, H, W)
MIXERS = {
    "mixer_fnet": ("fourier", {}, None, False),
    "mixer_fnet_odd": ("fourier", {}, None, False),
    "mixer_gfnet": ("global_filter", {}, (8, 8), False),
    "mixer_gfnet_odd": ("global_filter", {}, (7, 5), False),
    "mixer_aff": ("aff", {}, None, True),
    "mixer_aff_odd": ("aff", {}, None, True),
    "mixer_svt_scatter": ("scattering", {}, (28, 28), False),
    "mixer_svt_scatter_small": ("scattering", {}, (8, 12), False),
    "mixer_svt_scatter_token": ("scattering", {"form": "channel_token"}, (28, 28), False),
    "mixer_svt_scatter_token_small": ("scattering", {"form": "channel_token", "num_blocks": 2}, (4, 8), False),
}


def open_fixture(name: str):
    fixture = parity.load_fixture(FIXTURES / f"{name}.json.gz")
    inputs = {key: parity.seeded_input(key, spec).requires_grad_() for key, spec in fixture["inputs"].items()}
    return fixture, parity.reference_state_dict(fixture), inputs


def load_whole(module: nn.Module, state: dict, resized: bool = False) -> nn.Module:
    """Load, and check that nothing of either side was left out but buffers the reference computes."""
    report = mixzoo.load_checkpoint(module, state)
    assert not report.fresh
    assert all(re.search(r"[xi]fm\.[hg]\d[abo]$", key) for key in report.ignored)
    assert bool(report.adapted) == resized
    assert set(report.loaded) == set(module.state_dict())
    return module.eval()


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("svt")])
def test_model(name):
    fixture, state, inputs = open_fixture(name)
    x = inputs["x"]
    options = {"img_size": tuple(x.shape[2:])} if "@" in name else {}
    model = load_whole(mixzoo.create_model(name.partition("@")[0], **options), state, resized="@" in name)
    if "@" not in name:
        assert sum(p.numel() for p in model.parameters()) == fixture["parameters"]
    features = model.forward_features(x)
    logits = model.forward_head(features)
    if name.startswith("gfnet_h"):
        features = model.head.norm(features.permute(0, 2, 3, 1)).flatten(1, 2)
    elif name.startswith("gfnet"):
        features = features.flatten(2).transpose(1, 2)
    outputs = {"logits": logits, "features": features, "grad_x": torch.autograd.grad(logits.sum(), x)[0]}
    assert parity.compare(fixture, outputs) == []


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("svt")])
def test_model_with_class_block(name):
    fixture, state, inputs = open_fixture(name)
    x = inputs["x"]
    model = load_whole(mixzoo.create_model(name), state)
    assert sum(p.numel() for p in model.parameters()) == fixture["parameters"]
    maps = model.forward_features(x)
    logits = model.forward_head(maps)
    outputs = {"logits": logits, "features": model.head.tokens(maps)}
    outputs["grad_x"] = torch.autograd.grad(logits.sum(), x)[0]
    assert parity.compare(fixture, outputs) == []


def run_mixer(module: nn.Module, x: Tensor, grid: tuple[int, int] | None, nchw: bool) -> Tensor:
    if nchw:
        return mixzoo.nchw(module)(x)
    return module(x.unflatten(1, grid)).flatten(1, 2) if grid else module(x)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("exporting", [False, True])
def test_mixer(name, exporting, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    fixture, state, inputs = open_fixture(name)
    x = inputs["x"]
    mixer, options, grid, nchw = MIXERS[name]
    rank = 1 if mixer == "fourier" else 2
    module = mixzoo.create_mixer(mixer, x.shape[1 if nchw else -1], rank=rank, grid_size=grid, **options)
    if state:
        load_whole(module, state)
    y = run_mixer(module.eval(), x, grid, nchw)
    if "cotangent" in fixture:
        loss = (y * parity.seeded_input("r", fixture["cotangent"]["y"])).sum()
    else:
        loss = y.square().sum()
    outputs = {"y": y, "grad_x": torch.autograd.grad(loss, x)[0]}
    assert parity.compare(fixture, outputs, rtol=2e-5) == []


@pytest.mark.parametrize("name", ["mixer_dtcwt_forward", "mixer_dtcwt_forward@11x9", "mixer_dtcwt_forward_j3"])
def test_wavelet_analysis(name):
    fixture, _, inputs = open_fixture(name)
    x = inputs["x"]
    low, highs = dtcwt_forward(x, fixture["constructor"]["J"])
    outputs = {"low": low, "high": highs[0]} | {f"high{i}": high for i, high in enumerate(highs, start=1)}
    loss = 0.5 * sum(band.square().sum() for band in (low, *highs))
    outputs["grad_x"] = torch.autograd.grad(loss, x)[0]
    assert parity.compare(fixture, outputs, rtol=2e-5) == []


def test_wavelet_synthesis():
    fixture, _, inputs = open_fixture("mixer_dtcwt_inverse")
    y = dtcwt_inverse(inputs["low"], [inputs["high"]])
    gradients = torch.autograd.grad(0.5 * y.square().sum(), (inputs["low"], inputs["high"]))
    outputs = {"y": y, "grad_low": gradients[0], "grad_high": gradients[1]}
    assert parity.compare(fixture, outputs, rtol=2e-5) == []


@pytest.mark.parametrize("name", ["block_aff", "affblock"])
def test_block(name):
    from mixzoo.models.affnet import AFFBlock, AFFMixingBlock

    fixture, state, inputs = open_fixture(name)
    x = inputs["x"]
    module = AFFMixingBlock(32) if name == "block_aff" else AFFBlock(32, depth=2)
    load_whole(module, state)
    y = mixzoo.nchw(module)(x) if name == "block_aff" else module(x)
    assert parity.compare(fixture, {"y": y, "grad_x": torch.autograd.grad(y.square().sum(), x)[0]}) == []


def test_every_fixture_of_the_families_is_used():
    wavelets = {name for name in NAMES if name.startswith("mixer_dtcwt")}
    assert set(NAMES) == {*MODELS, *MIXERS, *wavelets, "block_aff", "affblock"}
    assert len(wavelets) == 4
    assert len(MODELS) >= 10
