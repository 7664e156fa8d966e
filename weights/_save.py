"""Save a model so that it can be rebuilt from the file alone.

The file is safetensors. Its header holds strings: ``format`` and ``format_version``; ``config``, the model's name and
options as JSON, swapped mixers, classes and input size included; ``grids``, the grids of its mixers; ``class_names``;
``weights``, where they are from (source, url, licence, sha256); ``licence``.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import operator
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn as nn
from torch import Tensor

from ._adapt import grids_of, grouped
from ._files import FORMAT, CheckpointError, read
from ._folders import described
from ._load import commit, plan_load, target_of

FORMAT_VERSION = "1"

# options of a model that may have changed since it was created, and where their present values are
_PRESENT = {
    "num_classes": "num_classes",
    "in_chans": "in_chans",
    "img_size": "img_size",
    "max_length": "max_length",
    "head": "head_kind",
    "global_pool": "head.global_pool.pool_type",
}


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write weights and all that is needed to rebuild the model to a safetensors file, see `load`.

    The file appears under its name only once it is complete; an existing one is replaced.

    Raises:
        TypeError: the model was not made by `mixzoo.create_model`.
    """
    model = target_of(model)
    metadata = _metadata(model)
    tensors = model.state_dict()
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        raise ValueError("a model on the meta device has no weights to save")
    write_safetensors({key: t.detach().cpu() for key, t in tensors.items()}, path, metadata)


def load(path: str | os.PathLike) -> nn.Module:
    """Rebuild a model, with its weights and class names, from a file that `save` wrote.

    A folder as transformers saves models, ``config.json`` beside the weights, does too for families that read it.

    Raises:
        CheckpointError: the file has no description of a model.
    """
    from ..models import create_model

    if Path(path).is_dir():
        name, options = described(Path(path))
        return create_model(name, checkpoint=path, **options)
    contents = read(path)
    if contents.metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: holds weights but not the model they belong to, so it was not written by mixzoo.save; "
            "use mixzoo.create_model(name, checkpoint=path)"
        )
    version = contents.metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: has format version {version}, this mixzoo reads {FORMAT_VERSION}; update it")
    config = json.loads(contents.metadata["config"])
    try:
        model = _rebuilt(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: describes a model that cannot be built here: {error}") from error
    kinds = {tensor.dtype for tensor in contents.tensors.values() if tensor.is_floating_point()}
    if len(kinds) == 1:
        model.to(kinds.pop())
    report, plan = plan_load(model, contents, strict=True)
    commit(model, report, plan, json.loads(contents.metadata.get("weights", "{}")))
    model.class_names = json.loads(contents.metadata.get("class_names", "null"))
    return model


def _config(model: nn.Module) -> dict[str, Any]:
    """Name and options that rebuild the model as it is now."""
    config = getattr(model, "config", None)
    if not config or "model" not in config:
        raise TypeError(
            f"this {type(model).__name__} does not know how it was created, so it could not be rebuilt; "
            "save models made by mixzoo.create_model, or use safetensors.torch.save_file(model.state_dict(), path)"
        )
    options = dict(config["options"])
    for option in _PRESENT.keys() & inspect.signature(type(model)).parameters.keys():
        with contextlib.suppress(AttributeError):
            options[option] = operator.attrgetter(_PRESENT[option])(model)
    folded = {key: config[key] for key in ("reparameterized",) if key in config}
    return {"model": config["model"], "options": options, **folded}


def _rebuilt(config: Mapping[str, Any], **options: Any) -> nn.Module:
    """The model of a configuration, with fresh weights, in the form that its keys belong to."""
    from ..models import create_model, reparameterize

    model = create_model(config["model"], **config["options"], **options)
    if "reparameterized" in config:
        reparameterize(model, inplace=True, norms=config["reparameterized"] == "norms")
    return model


def _metadata(model: nn.Module) -> dict[str, str]:
    """Header of the file; raises if `load` could not rebuild the model from it."""
    config = _config(model)
    try:
        text = json.dumps(config)
    except TypeError as error:
        raise TypeError(f"an option of {config['model']} cannot be written to a file: {error}") from None
    config = json.loads(text)
    twin = _rebuilt(config, device="meta").state_dict()
    other = [key for key, t in model.state_dict().items() if key not in twin or twin.pop(key).shape != t.shape]
    if other or twin:
        raise ValueError(
            f"{config['model']} was changed after it was created, so its file could not be loaded; "
            f"its options do not give {grouped([*other, *twin])}"
        )
    weights = dict(model.config.get("weights", {}))
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": text,
        "grids": grids_of(model),
        "class_names": json.dumps(getattr(model, "class_names", None)),
        "weights": json.dumps(weights),
        "licence": weights.get("licence", ""),
    }


def write_safetensors(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file at once: under a temporary name beside it, then renamed."""
    from safetensors.torch import save as to_bytes

    # safetensors refuses tensors that share memory, so tied parameters are written as copies
    seen: set[int] = set()
    separate = {}
    for key, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        separate[key] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    write_bytes(path, lambda file: file.write(to_bytes(separate, dict(metadata))))


def write_bytes(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Call ``write(file)`` on a temporary file beside ``path`` and rename it; on failure nothing is left."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
