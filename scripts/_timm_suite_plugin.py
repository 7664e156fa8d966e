"""pytest plugin that points timm's own test-suite at the models of the zoo: ``pytest -p`` this module.

timm's tests take their parameters from `timm.list_models` while they are imported. The plugin is imported before and
puts a listing of our models in its place, so that tests which timm limits to some of its modules run on ours too, and
none of ours counts as non-standard. Tests that name timm's models are deselected.

`timm_suite` holds the exclusions and sets the environment variable that names the models to test.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence

import pytest
import timm
import timm.models

import mixzoo
from mixzoo.models._registry import MODELS
from mixzoo.models.timm_bridge import timm_name
from mixzoo.scripts.timm_suite import EXCLUSIONS, MODELS_VARIABLE

MARKERS = ("base", "forward", "backward", "cfg", "cfg_nonstd", "torchscript", "features", "fxforward", "fxbackward")


def _chosen() -> dict[str, str]:
    """Our names by the names in timm's registry, of the models to test."""
    patterns = [p for p in os.environ.get(MODELS_VARIABLE, "*").split(",") if p]
    names = [name for name in mixzoo.list_models(patterns, modality="image") if MODELS[name].timm]
    if not names:
        raise pytest.UsageError(f"{MODELS_VARIABLE}: no model of the zoo fits {patterns}")
    return {timm_name(name): name for name in names}


OURS = _chosen()
_list_models = timm.list_models


def _arch(name: str) -> str:
    return name.partition(".")[0]


def list_ours(
    filter: str | Sequence[str] = "",
    module: str | Sequence[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """`timm.list_models` of our models; modules and exclusions are timm's bookkeeping of its own and are ignored."""
    if not isinstance(filter, str):
        # the list of name patterns with non-standard APIs, which ours do not have
        return []
    names = _list_models(filter, pretrained=pretrained, name_matches_cfg=name_matches_cfg, include_tags=include_tags)
    return [name for name in names if _arch(name) in OURS]


timm.list_models = timm.models.list_models = list_ours


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of timm's suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of our models, and skip the exclusions with their reasons."""
    kept, dropped = [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        name = OURS.get(_arch(str(parameters.get("model_name", ""))))
        (dropped if name is None else kept).append(item)
        for exclusion in EXCLUSIONS if name else ():
            if fnmatch.fnmatch(item.originalname, exclusion.test) and fnmatch.fnmatch(name, exclusion.models):
                item.add_marker(pytest.mark.skip(reason=exclusion.reason))
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
