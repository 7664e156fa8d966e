"""Outputs and input gradients of the text encoders and their mixers against the published implementations; see
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

FOLDER = Path(__file__).parent / "parity"
FIXTURES = FOLDER / "fixtures"
_spec = importlib.util.spec_from_file_location("parity", FOLDER / "parity.py")
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

FAMILIES = re.compile(r"(fnet_|ponet_|lra_|mixer_ponet)")
NAMES = sorted(path.name.removesuffix(".json.gz") for path in FIXTURES.glob("*.json.gz"))
NAMES = [name for name in NAMES if FAMILIES.match(name)]

# fixture: name and options of the model, unless the name is the fixture's and there are none
TINY = {"vocab_size": 160, "dim": 64, "depth": 2, "max_length": 64, "token_mixer": ("ponet", {"head_dim": 16})}
TINY["channel_mixer"] = ("mlp", {"ratio": 2.0})
MODELS = {
    "fnet_base_cls": ("fnet_base", {"num_classes": 3}),
    "ponet_tiny": ("ponet_base_uncased", TINY),
    "ponet_tiny_segments": ("ponet_base_uncased", TINY),
    "ponet_tiny_seqcls": ("ponet_base_uncased", TINY | {"num_classes": 3}),
}
MIXERS = {
    "mixer_ponet": {"head_dim": 8, "proj": False},
    "mixer_ponet_plain": {"head_dim": 8, "proj": False, "special_pooling": False},
    "mixer_ponet_lra": {"head_dim": 16, "num_segments": 4},
}


def open_fixture(name: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    fixture = parity.load_fixture(FIXTURES / f"{name}.json.gz")
    inputs = {key: parity.seeded_input(key, spec) for key, spec in fixture["inputs"].items()}
    return fixture, parity.reference_state_dict(fixture), inputs


def load_whole(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load, and check that nothing of either side was left out but what the reference does not use."""
    report = mixzoo.load_checkpoint(module, state)
    assert not report.fresh
    assert not report.adapted
    assert all(re.search(r"position_ids$|mha\.W_[qkv]", key) for key in report.ignored)
    assert set(report.loaded) == set(module.state_dict())
    return module.eval()


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("mixer_")])
@pytest.mark.filterwarnings("ignore:the batch is padded")
def test_model(name):
    fixture, state, inputs = open_fixture(name)
    arch, options = MODELS.get(name, (name, {}))
    model = load_whole(mixzoo.create_model(arch, **options), state)
    unused = sum(t.numel() for key, t in state.items() if name.startswith("lra_fnet") and ".mha." in key)
    assert sum(p.numel() for p in model.parameters()) == fixture["parameters"] - unused
    with torch.no_grad():
        features = model.forward_features(**inputs)
        result = model(**inputs)
        outputs = {"features": features, "logits": result}
        if model.head_kind == "pretraining":
            relation = "nsp_logits" if name.startswith("fnet") else "sso_logits"
            outputs |= {"logits": result.logits, relation: result.relation_logits}
        if "pooled" in fixture["outputs"]:
            outputs["pooled"] = model.pooler(features)
    assert parity.compare(fixture, outputs, rtol=fixture.get("rtol", 1e-4)) == []


@pytest.mark.parametrize("name", MIXERS)
def test_mixer(name):
    fixture, state, inputs = open_fixture(name)
    x = inputs["x"].requires_grad_()
    mask = inputs.get("attention_mask")
    mixer = load_whole(mixzoo.create_mixer("ponet", 32, rank=1, **MIXERS[name]), state)
    y = mixer(x, mask, inputs.get("segment_index"), inputs.get("special_mask"))
    outputs = {"output": y, "grad_x": torch.autograd.grad(y.sum(), x)[0]}
    if "attention" in fixture["outputs"]:
        outputs["attention"] = mixer.attention(x, None if mask is None else mask.bool()).transpose(1, 2)
    assert parity.compare(fixture, outputs, rtol=2e-5) == []


def test_every_fixture_of_the_families_is_used():
    assert {name for name in NAMES if name.startswith("mixer_")} == set(MIXERS)
    assert set(MODELS) <= set(NAMES)
    assert len(NAMES) >= 13
