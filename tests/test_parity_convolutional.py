"""Outputs and input gradients of iFormer, OverLoCK and their parts against the published implementations; see
`test_parity_metaformer`.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mixzoo
from mixzoo.models.overlock import ContMixBlock, FocusBlock, RepConvBlock

FOLDER = Path(__file__).parent / "parity"
FIXTURES = FOLDER / "fixtures"
_spec = importlib.util.spec_from_file_location("parity", FOLDER / "parity.py")
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

FAMILIES = re.compile(r"iformer_|overlock_|mixer_(contmix|dilated|na2d|inception|repconv)")
NAMES = sorted(path.name.removesuffix(".json.gz") for path in FIXTURES.glob("*.json.gz"))
NAMES = [name for name in NAMES if FAMILIES.match(name)]

# a small configuration of the reference's class
_MICRO_HEADS = [("inception", {"low_heads": n, "head_dim": 32, "pool_size": p}) for n, p in ((1, 2), (1, 2), (2, 1))]
MICRO = {
    "num_classes": 10,
    "img_size": 48,
    "pos_size": 32,
    "depths": (1, 1, 2, 1),
    "dims": (64, 64, 96, 96),
    "token_mixer": [
        _MICRO_HEADS[0],
        _MICRO_HEADS[0],
        [("inception", {"low_heads": n, "head_dim": 32}) for n in (1, 2)],
        ("inception", {"low_heads": 2, "head_dim": 32}),
    ],
}


def open_fixture(name: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    fixture = parity.load_fixture(FIXTURES / f"{name}.json.gz")
    inputs = {key: parity.seeded_input(key, spec).requires_grad_() for key, spec in fixture["inputs"].items()}
    return fixture, parity.reference_state_dict(fixture), inputs


def load_whole(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load, and check that nothing of either side was left out."""
    report = mixzoo.load_checkpoint(module, state)
    assert not report.fresh
    assert not report.ignored
    assert set(report.loaded) == set(module.state_dict())
    return module.eval()


def assert_agrees(fixture: dict, outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    total = sum(y.sum() for y in outputs.values())
    wanted = {key: x for key, x in inputs.items() if f"grad_{key}" in fixture["outputs"]}
    gradients = torch.autograd.grad(total, list(wanted.values()))
    outputs = outputs | {f"grad_{key}": gradient for key, gradient in zip(wanted, gradients, strict=True)}
    assert parity.compare(fixture, outputs) == []


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("mixer_")])
def test_model(name):
    fixture, state, inputs = open_fixture(name)
    model = mixzoo.create_model("iformer_small", **MICRO) if name == "iformer_micro" else mixzoo.create_model(name)
    load_whole(model, state)
    assert sum(p.numel() for p in model.parameters()) == fixture["parameters"]
    features = model.forward_features(inputs["x"])
    logits = model.forward_head(features)
    outputs = {"features": features, "logits": logits}
    outputs["grad_x"] = torch.autograd.grad(logits.sum(), inputs["x"])[0]
    assert parity.compare(fixture, outputs) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("mixer_na2d")])
def test_neighborhood(name):
    fixture, _, inputs = open_fixture(name)
    y = mixzoo.neighborhood_apply(inputs["attn"], inputs["value"], fixture["constructor"]["kernel_size"])
    assert_agrees(fixture, {"y": y}, inputs)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("mixer_inception")])
def test_inception(name):
    fixture, state, inputs = open_fixture(name)
    built = fixture["constructor"]
    options = {"low_heads": built["attention_head"], "head_dim": 32, "pool_size": built["pool_size"]}
    mixer = load_whole(mixzoo.create_mixer("inception", built["dim"], **options), state)
    assert_agrees(fixture, {"out": mixer(inputs["x"])}, inputs)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("mixer_dilated")])
def test_large_kernel(name):
    fixture, state, inputs = open_fixture(name)
    built = fixture["constructor"]
    mixer = load_whole(
        mixzoo.create_mixer("large_kernel_conv", built["channels"], kernel_size=built["kernel_size"]), state
    )
    assert_agrees(fixture, {"y": nchw(mixer, inputs["x"])}, inputs)


def test_rep_conv_block():
    fixture, state, inputs = open_fixture("mixer_repconv_block")
    mixer = ("large_kernel_conv", {"kernel_size": 17})
    block = load_whole(RepConvBlock(16, token_mixer=mixer, res_scale=1.0), state)
    assert_agrees(fixture, {"y": nchw(block, inputs["x"])}, inputs)


def nchw(block: nn.Module, x: Tensor, *others: Tensor) -> Tensor:
    maps = [map_.permute(0, 2, 3, 1) for map_ in (x, *others)]
    return block(*maps).permute(0, 3, 1, 2)


CONTMIX = [name for name in NAMES if name.startswith("mixer_contmix") and "focus" not in name]


@pytest.mark.parametrize("name", CONTMIX)
def test_contmix_block(name):
    fixture, state, inputs = open_fixture(name)
    built = fixture["constructor"]
    options = {"kernel_size": built["kernel_size"], "num_heads": built["num_heads"], "mlp_ratio": built["mlp_ratio"]}
    options |= {"res_scale": 1.0 if built["res_scale"] else None, "deploy": built.get("deploy", False)}
    block = load_whole(ContMixBlock(built["dim"], **options), state)
    assert_agrees(fixture, {"y": nchw(block, inputs["x"])}, inputs)


@pytest.mark.parametrize("name", [name for name in NAMES if "focus" in name])
def test_focus_block(name):
    fixture, state, inputs = open_fixture(name)
    built = fixture["constructor"]
    # the authors' ctx_dim is twice the channels of the context
    widths = built["dim"], built["ctx_dim"] // 4
    options = {"kernel_size": built["kernel_size"], "num_heads": built["num_heads"], "first": built["is_first"]}
    block = load_whole(FocusBlock(*widths, **options), state)
    x = torch.cat([inputs["x"], inputs["ctx"]], 1)
    y = nchw(block, x, inputs.get("ctx0", inputs["ctx"]))
    outputs = {"y": y} if built["is_last"] else dict(zip(("x_out", "ctx_out"), y.split(widths, 1), strict=True))
    assert_agrees(fixture, outputs, inputs)


def test_every_fixture_of_the_families_is_used():
    assert len(CONTMIX) >= 4
    assert len(NAMES) >= 20
