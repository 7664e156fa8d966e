"""Outputs and input gradients of the MetaFormer family against the published implementations.

A fixture lists the keys of a reference checkpoint; its tensors follow from their names. They go through
`load_checkpoint`, strictly, so a wrong key rule cannot hide.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import mixzoo

FOLDER = Path(__file__).parent / "parity"
FIXTURES = FOLDER / "fixtures"
_spec = importlib.util.spec_from_file_location("parity", FOLDER / "parity.py")
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

FAMILIES = re.compile(r"(poolformer|poolformerv2|metaformer|identityformer|randformer|convformer|caformer)_")
NAMES = sorted(path.name.removesuffix(".json.gz") for path in FIXTURES.glob("*.json.gz"))
MODELS = [name for name in NAMES if FAMILIES.match(name) and not name.endswith("_feat")]

# fixture: mixer, options, its grid if it needs one, whether the reference's maps are (B, C, H, W)
MIXERS = {
    "mixer_pooling": ("pooling", {}, None, True),
    "mixer_random_mixing": ("random", {}, (5, 7), False),
    "mixer_sep_conv": ("separable_conv", {}, None, False),
    "mixer_caformer_attention": ("attention", {}, None, False),
    "mixer_metaformer_v1_attention": ("attention", {"proj_bias": True}, None, True),
    "mixer_spatial_fc": ("spatial_fc", {}, (5, 7), True),
}
_STAR = ("mlp", {"act": "star_relu", "bias": False})
BLOCKS = {
    "block_poolformer_v1": (
        {"token_mixer": "pooling", "norm": "group", "norm_eps": 1e-5, "layer_scale": 1e-5},
        True,
    ),
    "block_metaformer_v2_sepconv": (
        {"token_mixer": "separable_conv", "channel_mixer": _STAR, "norm": "layer_nobias"}
        | {"layer_scale": 1.0, "res_scale": 1.0},
        False,
    ),
    "block_metaformer_v2_identity": (
        {"token_mixer": "identity", "channel_mixer": _STAR, "norm": "group_nobias", "res_scale": 1.0},
        False,
    ),
}


def open_fixture(name: str):
    fixture = parity.load_fixture(FIXTURES / f"{name}.json.gz")
    x = parity.seeded_input("x", fixture["inputs"]["x"]).requires_grad_()
    return fixture, parity.reference_state_dict(fixture), x


def load_whole(module: torch.nn.Module, state: dict) -> torch.nn.Module:
    """Load, and check that nothing of either side was left out."""
    report = mixzoo.load_checkpoint(module, state)
    assert not report.fresh
    assert not report.ignored
    assert not report.adapted
    assert set(report.loaded) == set(module.state_dict())
    return module.eval()


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    fixture, state, x = open_fixture(name)
    model = load_whole(mixzoo.create_model(name), state)
    assert sum(weight.numel() for weight in model.state_dict().values()) == fixture["parameters"]
    features = model.forward_features(x)
    logits = model.forward_head(features)
    outputs = {"logits": logits, "features": features, "pooled": model.forward_head(features, pre_logits=True)}
    outputs["grad_x"] = torch.autograd.grad(logits.sum(), x)[0]
    assert parity.compare(fixture, outputs) == []


@pytest.mark.parametrize("name", ["poolformer_s12_feat"])
def test_dense_prediction(name):
    fixture, state, x = open_fixture(name)
    maps = load_whole(mixzoo.create_model(name), state)(x)
    outputs = {f"feat{i}": y for i, y in enumerate(maps)}
    outputs["grad_x"] = torch.autograd.grad(sum(y.sum() for y in maps), x)[0]
    assert parity.compare(fixture, outputs) == []


def run_channels_last(module: torch.nn.Module, x: torch.Tensor, nchw: bool) -> dict[str, torch.Tensor]:
    y = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if nchw else module(x)
    return {"y": y, "grad_x": torch.autograd.grad(y.sum(), x)[0]}


@pytest.mark.parametrize("name", MIXERS)
def test_mixer(name):
    fixture, state, x = open_fixture(name)
    mixer, options, grid, nchw = MIXERS[name]
    dim = x.shape[1] if nchw else x.shape[-1]
    module = mixzoo.create_mixer(mixer, dim, grid_size=grid, **options)
    if state:
        load_whole(module, state)
    assert parity.compare(fixture, run_channels_last(module.eval(), x, nchw)) == []


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    fixture, state, x = open_fixture(name)
    options, nchw = BLOCKS[name]
    module = load_whole(mixzoo.MetaFormerBlock(x.shape[1] if nchw else x.shape[-1], **options), state)
    assert parity.compare(fixture, run_channels_last(module, x, nchw)) == []


def test_every_fixture_of_the_family_is_used():
    used = {*MODELS, *MIXERS, *BLOCKS, "poolformer_s12_feat"}
    ours = {name for name in NAMES if FAMILIES.match(name) or name in MIXERS or name in BLOCKS}
    assert ours <= used
    assert len(MODELS) >= 13
