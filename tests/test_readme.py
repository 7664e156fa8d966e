"""What README.md claims: its commands, its examples, its tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import mixzoo
from mixzoo.mixers import TOKEN_MIXERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def _block(mark: str) -> str:
    return next(block for block in BLOCKS if mark in block)


def test_ci_runs_the_test_command() -> None:
    command = re.search(r"\*\*Test it\*\*.*?```bash\n(.*?)\n```", README, re.DOTALL).group(1)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_tour_prints_what_it_says() -> None:
    code = _block("features_only")
    scope: dict = {}
    with torch.inference_mode():
        exec(code, scope)
        assert scope["model"](scope["images"]).shape == (2, 10)
        maps = str([tuple(f.shape) for f in scope["backbone"](scope["images"])])
    assert maps in code
    counted = str(mixzoo.complexity(mixzoo.create_model("caformer_s18")))
    assert counted in code


def test_a_mixer_is_added_as_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKEN_MIXERS, "_infos", dict(TOKEN_MIXERS._infos))
    exec(_block("register_mixer"), {"mixzoo": mixzoo, "torch": torch})
    assert TOKEN_MIXERS["shift"].options == {"step": 1}


def test_mixers_alone_are_as_shown() -> None:
    code = _block("rank=1")
    with pytest.raises(TypeError) as error:
        exec(code, {"mixzoo": mixzoo})
    assert str(error.value) in code


def test_every_mixer_has_a_row_with_its_options() -> None:
    for name, info in mixzoo.list_mixers().items():
        row = re.search(rf"^\| `{name}` \|(.*)$", README, re.MULTILINE)
        assert row, name
        assert all(f"`{option}`" in row.group(1) for option in info.options), name


def test_every_model_has_a_row() -> None:
    table = README.partition("## Models")[2]
    for name in mixzoo.list_models():
        family = name.removesuffix("_feat").split("_")[0]
        assert f"`{family}_" in table or f"`{name}`" in table, name
