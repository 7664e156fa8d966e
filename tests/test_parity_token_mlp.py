"""Outputs and input gradients of MLP-Mixer, RaftMLP and NiNformer against the published implementations.

A fixture lists the keys of a reference checkpoint; its tensors follow from their names. They go through
`load_checkpoint`, strictly, so a wrong key rule cannot hide.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import mixzoo
from mixzoo.models.ninformer import one_norm_block
from mixzoo.models.raftmlp import RaftMLPBlock

FOLDER = Path(__file__).parent / "parity"
_spec = importlib.util.spec_from_file_location("parity", FOLDER / "parity.py")
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

# the references are float32 and repeat to 1e-8; fixtures without a tolerance of their own are held to this one
RTOL = 1e-4

MODELS = [
    "mixer_s32_224",
    "mixer_b16_224",
    "mixer_s32_google",
    "mixer_b16_google",
    "raftmlp_s",
    "raftmlp_s@256x320",
    "raftmlp_m",
    "raftmlp_hierarchy_m",
    "raftmlp_12",
    "raftmlp_36",
    "raftmlp_org_mixer_b16",
    "raftmlp_tiny_shortcut",
    "ninformer_cifar10",
]
# fixture: the mixer, the grid of its weights
MIXERS = {
    "mixer_mlp_token": ("mlp", (4, 4)),
    "mixer_nin_gating": (("nin_gating", {"hidden": 20}), (4, 4)),
    "mixer_raft": (("raft", {"raft_size": 4}), (7, 7)),
    "mixer_raft@9x5": (("raft", {"raft_size": 4}), (7, 7)),
}


def _mixer_block() -> torch.nn.Module:
    return mixzoo.MetaFormerBlock(8, token_mixer="mlp", grid_size=(3, 3), norm_eps=1e-6)


def _nin_block() -> torch.nn.Module:
    mixers = {"token_mixer": ("nin_gating", {"hidden": 12}), "channel_mixer": ("mlp", {"ratio": 1.5})}
    return one_norm_block(8, **mixers, grid_size=(3, 3), norm_eps=1e-5)


BLOCKS = {
    "block_mlp_mixer_lowvar": _mixer_block,
    "block_ninformer_lowvar": _nin_block,
    "block_raft_lowvar": lambda: RaftMLPBlock(8, weight_grid=(3, 3)),
}


def open_fixture(name: str):
    fixture = parity.load_fixture(FOLDER / "fixtures" / f"{name}.json.gz")
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


def assert_equal(fixture: dict, outputs: dict[str, torch.Tensor]) -> None:
    assert parity.compare(fixture, outputs, min(RTOL, fixture.get("rtol", RTOL))) == []


def like(features: torch.Tensor, fixture: dict) -> torch.Tensor:
    """Maps as the reference has them: ``(B, C, H, W)`` or tokens ``(B, N, C)``."""
    tokens = len(fixture["outputs"]["features"]["shape"]) == 3
    return features.flatten(2).transpose(1, 2) if tokens else features


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    fixture, state, x = open_fixture(name)
    model = load_whole(mixzoo.create_model(name.partition("@")[0]), state)
    if "@" in name:
        model.set_input_size(x.shape[2:])
    assert sum(p.numel() for p in model.parameters()) == fixture["parameters"]
    logits = model(x)
    outputs = {"logits": logits, "features": like(model.forward_features(x), fixture)}
    outputs["grad_x"] = torch.autograd.grad(logits.sum(), x)[0]
    assert_equal(fixture, outputs)


@pytest.mark.parametrize("name", ["raftmlp_s_backbone@256x320"])
def test_dense_prediction(name):
    fixture, state, x = open_fixture(name)
    model = load_whole(mixzoo.create_model(name.partition("@")[0]), state)
    assert sum(p.numel() for p in model.parameters()) == fixture["parameters"]
    maps = model(x)
    outputs = {f"feat{i}": y for i, y in enumerate(maps)}
    outputs["grad_x"] = torch.autograd.grad(sum(y.sum() for y in maps), x)[0]
    assert_equal(fixture, outputs)


def run_tokens(module: torch.nn.Module, x: torch.Tensor, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    y = module(x.unflatten(1, grid)).flatten(1, 2)
    return {"y": y, "grad_x": torch.autograd.grad(y.sum(), x)[0]}


@pytest.mark.parametrize("name", MIXERS)
def test_mixer(name):
    fixture, state, x = open_fixture(name)
    mixer, grid = MIXERS[name]
    module = load_whole(mixzoo.create_mixer(mixer, x.shape[-1], grid_size=grid), state)
    grid = tuple(fixture["constructor"].get("grid", grid))
    module.set_grid_size(grid)
    assert_equal(fixture, run_tokens(module, x, grid))


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    fixture, state, x = open_fixture(name)
    module = load_whole(BLOCKS[name](), state)
    assert sum(p.numel() for p in module.parameters()) == fixture["parameters"]
    assert_equal(fixture, run_tokens(module, x, (3, 3)))


@pytest.mark.parametrize("name", ["mixer_mlp_token", "mixer_nin_gating"])
def test_sequences_mix_as_images_of_as_many_tokens(name):
    fixture, state, x = open_fixture(name)
    module = load_whole(mixzoo.create_mixer(MIXERS[name][0], x.shape[-1], rank=1, grid_size=x.shape[1:2]), state)
    y = module(x)
    assert_equal(fixture, {"y": y, "grad_x": torch.autograd.grad(y.sum(), x)[0]})


def test_every_fixture_of_these_families_is_used():
    used = {*MODELS, *MIXERS, *BLOCKS, "raftmlp_s_backbone@256x320"}
    ours = ("mixer_s32_", "mixer_b16_", "raftmlp", "ninformer", "mixer_mlp", "mixer_raft", "mixer_nin")
    names = {path.name.removesuffix(".json.gz") for path in (FOLDER / "fixtures").glob("*.json.gz")}
    assert {name for name in names if name.startswith(ours)} <= used
