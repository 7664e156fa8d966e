"""What tests over the registry of models share: names to run on, and small models with telling weights.

A test that takes one of these arguments runs once for each of its values:

    model_name        every registered model
    model_kind        one name of those that differ in depths, widths and other numbers alone
    image_kind        those of images
    classifier_name   every image classifier, that is, every model in timm's registry
    classifier_kind   one of a kind of them
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import mixzoo
from mixzoo.models._registry import MODELS

# what a small model overrides of its row
SMALL = {
    "depths": (1, 1, 1, 1),
    "dims": (16, 24, 32, 40),
    "depth": 4,
    "dim": 32,
    "max_length": 40,
    "vocab_size": 160,
    "drop_rate": 0.0,
    "focus_depths": (1, 2),
    "focus_heads": (2, 2),
    "weight_size": 64,
    "proj_drop_rate": 0.0,
}
# and of the options of its mixers
SMALL_OPTIONS = {"low_heads": 1, "head_dim": 8, "group": 8}


def _small_mixers(row: Mapping[str, Any]) -> dict[str, Any]:
    kinds = ("token_mixer", "channel_mixer")
    return {kind: [_small_mixer(entry) for entry in row[kind]] for kind in kinds if isinstance(row.get(kind), list)}


def _small_mixer(entry: Any) -> Any:
    """A mixer, or the first one of a list with one per block, with small options."""
    if isinstance(entry, list):
        return _small_mixer(entry[0])
    if isinstance(entry, str):
        return entry
    name, options = entry
    return name, {key: SMALL_OPTIONS.get(key, value) for key, value in options.items()}


def _without_numbers(value: Any) -> str:
    """How a value is written, with all numbers alike."""
    if isinstance(value, Mapping):
        return str({key: _without_numbers(entry) for key, entry in value.items()})
    if isinstance(value, list | tuple):
        return str([_without_numbers(entry) for entry in value])
    return "number" if type(value) in (int, float) else repr(value)


def _kinds(names: Sequence[str]) -> list[str]:
    first: dict[tuple, str] = {}
    for name in names:
        spec = MODELS[name]
        row = {k: v for k, v in spec.row.items() if k not in SMALL} | _small_mixers(spec.row)
        first.setdefault((spec.skeleton, *sorted((k, _without_numbers(v)) for k, v in row.items())), name)
    return list(first.values())


_NAMES = mixzoo.list_models()
_IMAGES = [name for name in _NAMES if MODELS[name].modality == "image"]
_CLASSIFIERS = [name for name in _IMAGES if MODELS[name].timm]
_PARAMETERS = {
    "model_name": _NAMES,
    "model_kind": _kinds(_NAMES),
    "image_kind": _kinds(_IMAGES),
    "classifier_name": _CLASSIFIERS,
    "classifier_kind": _kinds(_CLASSIFIERS),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, names in _PARAMETERS.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)


def _shrink(name: str) -> dict:
    row = MODELS[name].row
    small = {
        k: value if isinstance(value, int | float) else value[: len(row[k])] for k, value in SMALL.items() if k in row
    }
    return small | _small_mixers(row)


@pytest.fixture(scope="session")
def shrink() -> Callable[[str], dict]:
    """``shrink(name)``: keywords that make a model small and leave the parts and options of its row alone."""
    return _shrink


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], nn.Module]:
    """``randomise(model)``: give every weight a value that depends on its name alone.

    Scales that start at zero or one would hide what is missing. Names are the same inside timm's feature wrappers;
    scales keep their mean; matrices keep the size of what passes through them.
    """

    def run(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            frozen = (
                (f"{prefix}.{name}", getattr(module, name))
                for prefix, module in model.named_modules()
                for name in getattr(module, "frozen_weights", ())
            )
            for name, parameter in (*model.named_parameters(), *frozen):
                if parameter.device.type == "meta":
                    continue
                name = name.removeprefix("model.").replace("stages_", "stages.")
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
                if parameter.ndim > 1:
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
                elif name.endswith("bias"):
                    parameter.copy_(0.2 * noise)
                else:
                    parameter += 0.2 * noise
        return model

    return run


def _image_defaults(name: str) -> dict:
    """Colour images, small, not square, and of whole patches."""
    patch = MODELS[name].row.get("patch_size", 16)
    width = -(-48 // patch) * patch
    return {"in_chans": 3, "img_size": (width + patch, width)} if MODELS[name].modality == "image" else {}


@pytest.fixture(scope="session")
def small(randomise: Callable) -> Callable[..., nn.Module]:
    """``small(name, **options)``: the model narrow and shallow, for small images, random values, in eval mode."""

    def build(name: str, **options) -> nn.Module:
        return randomise(mixzoo.create_model(name, **_shrink(name) | _image_defaults(name) | options)).eval()

    return build


@pytest.fixture
def interpret() -> Callable[[str], None]:
    """Runs the tests of a file that have "triton" in their names in Triton's interpreter, on the CPU.

    In a process of its own, since Triton decides when it is imported.
    """
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("these tests run in Triton's interpreter already")

    def run(path: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", path, "-k", "triton"]
        done = subprocess.run(
            command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert " passed" in done.stdout, done.stdout

    return run
