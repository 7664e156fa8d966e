"""timm's own test-suite on our models, where its tests are at hand: set MIXZOO_TIMM_TESTS to their folder.

They are in timm's source distribution, not in its wheel. `mixzoo timm-suite` fetches them and takes all models;
here one small model of each family runs.
"""

from __future__ import annotations

import ast
import os
from fnmatch import fnmatch
from pathlib import Path

import pytest

import mixzoo
from mixzoo.scripts import timm_suite

VARIABLE = "MIXZOO_TIMM_TESTS"
MODELS = ("poolformer_s12", "metaformer_pp*_s12_224", "randformer_s12", "poolformerv2_s12", "caformer_s18")

with_suite = pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} does not name timm's tests folder")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@with_suite
@pytest.mark.parametrize("model", MODELS)
def test_suite_passes(model):
    assert timm_suite.main(["--tests", os.environ[VARIABLE], "--models", model]) == 0


@with_suite
def test_exclusions_name_tests_and_models():
    source = Path(os.environ[VARIABLE], "test_models.py").read_text()
    tests = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    models = mixzoo.list_models(modality="image")
    for exclusion in timm_suite.EXCLUSIONS:
        assert any(fnmatch(test, exclusion.test) for test in tests), exclusion
        assert any(fnmatch(model, exclusion.models) for model in models), exclusion
        assert exclusion.reason


def test_folder_without_the_suite_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        timm_suite.main(["--tests", str(tmp_path)])
    assert stop.value.code == 2
    assert "test_models.py" in capsys.readouterr().err


def test_pattern_without_models_is_refused(capsys):
    with pytest.raises(SystemExit):
        timm_suite.main(["--models", "no_such_model"])
    assert "no_such_model" in capsys.readouterr().err
