"""Folders as transformers saves models: a ``config.json`` beside the weights.

A family registers how its configuration translates, by the ``model_type`` that stands in the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ._files import CheckpointError

Options = Callable[[Mapping[str, Any]], dict[str, Any]]
_CONFIGS: dict[str, tuple[str, Options]] = {}


def register_config(model_type: str, name: str, options: Options) -> None:
    """Models of the folders with that ``model_type`` are our model ``name`` with ``options(config)``."""
    _CONFIGS[model_type] = (name, options)


def described(folder: Path) -> tuple[str, dict[str, Any]]:
    """Name and options of the model that a folder's ``config.json`` describes.

    Raises:
        CheckpointError: there is no such file, it is no description, or it is of a model that is not known here.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be read as the description of a model: {error}") from None
    if kind not in _CONFIGS:
        raise CheckpointError(
            f"{file}: has model_type {kind!r}; models are built from configurations of {', '.join(_CONFIGS)}. Create "
            "the model by its name and give checkpoint="
        )
    name, options = _CONFIGS[kind]
    try:
        return name, options(config)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None
