"""Load a checkpoint into a model, all of it or nothing."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..mixers import TOKEN_MIXERS
from ..mixers._layers import NCHW
from . import _adapt
from ._adapt import Plan, grouped
from ._fetch import fetch, find_release, known_hash
from ._files import FORMAT, CheckpointError, Contents, read, unwrap
from ._rules import OWN, Layout, Pattern, choose

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".npz")


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor; keys are the model's, those of `ignored` the source's where it had no other name.

    Attributes:
        source: file, release or "state dict".
        layout: name of the layout it was recognised as; title: what that layout covers.
        loaded: parameters and buffers that now have the source's values, adapted ones included.
        fresh: those that kept the values they had, and why.
        adapted: what was changed to fit, and how.
        ignored: what the source had besides, and why it was left out.
        activation: form of GELU that the source's network has, for a model that leaves the choice.
    """

    source: str
    layout: str
    title: str
    loaded: tuple[str, ...]
    fresh: dict[str, str] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    activation: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.source} (layout {self.layout}: {self.title}): {len(self.loaded)} tensors loaded"]
        for title, entries in (("fresh", self.fresh), ("adapted", self.adapted), ("ignored", self.ignored)):
            reasons: dict[str, list[str]] = {}
            for key, why in entries.items():
                reasons.setdefault(why, []).append(key)
            lines += [f"  {title}: {grouped(keys)} - {why}" for why, keys in reasons.items()]
        return "\n".join(lines)


def load_checkpoint(model: nn.Module, source: str | os.PathLike | Mapping[str, Any], strict: bool = True) -> LoadReport:
    """Load weights from a file, a release or a state dict, in any layout this library knows.

    The grid, the input channels and the classifier are adapted to the model, and token mixers that were swapped when it
    was created keep their values. Everything else must fit, or nothing is loaded. Of a training checkpoint the averaged
    weights are taken (``state_dict_ema``, ``model_ema``), then ``state_dict``, ``model``, or ``model_state_dict``.

    Args:
        model: a model, block or mixer of this library, before it is wrapped for feature extraction.
        source: a path, a release (``"arch.tag"`` or its authors' name for it), or a dict of tensors.
        strict: False leaves missing parameters fresh and unexpected tensors out. Wrong shapes are an error regardless.

    Raises:
        CheckpointError: the source cannot be read or does not fit; the model is as it was before.
        TypeError: ``model`` is not a module of this library.
        FileNotFoundError: no such file, and no such release.
    """
    model = target_of(model)
    contents, provenance = open_source(source)
    report, plan = plan_load(model, contents, strict)
    commit(model, report, plan, provenance)
    if "class_names" in contents.metadata and _whole_head(model, report):
        model.class_names = json.loads(contents.metadata["class_names"])
    return report


def load_pretrained(model: nn.Module, release: str) -> LoadReport:
    """Download a release and load it, see `load_checkpoint`."""
    find_release(release)
    return load_checkpoint(model, release)


def target_of(model: nn.Module) -> nn.Module:
    """The module itself, out of the wrappers of torch.compile, DistributedDataParallel and `mixzoo.nchw`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, got {type(model).__name__}")
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    model = model.mixer if isinstance(model, NCHW) else model
    package = __package__.split(".")[0]
    ours = any(base.__module__.split(".")[0] == package for base in type(model).__mro__)
    if not ours and type(model) not in tuple(info.factory for info in TOKEN_MIXERS.infos().values()):
        raise TypeError(
            f"{type(model).__name__} is not a model of {package}, so its parameter names are unknown; load before "
            f"wrapping a model, e.g. {package}.create_model(name, checkpoint=..., features_only=True)"
        )
    return model


def open_source(source: str | os.PathLike | Mapping[str, Any]) -> tuple[Contents, dict[str, str]]:
    """What the source holds, and what is known of where it is from."""
    if isinstance(source, Mapping):
        return unwrap(source, "state dict"), {}
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be a path, the name of a release or a state dict, not {type(source).__name__}")
    path = Path(source)
    if path.is_file() or path.suffix in _SUFFIXES or len(path.parts) > 1:
        contents = read(path)
        return contents, json.loads(contents.metadata.get("weights", "{}")) or {"source": path.name}
    try:
        name, release = find_release(str(source))
    except ValueError as error:
        if path.is_dir():
            return read(path), {"source": path.name}
        raise FileNotFoundError(f"{source}: no such file, and {error}") from None
    file = fetch(name)
    known = {"source": name, "url": release.url, "licence": release.licence, "sha256": known_hash(file, release)}
    return read(file), {key: value for key, value in known.items() if value}


def _translate(model: nn.Module, contents: Contents) -> tuple[Layout, tuple[str, ...], Plan]:
    """Recognise the layout and rename; also the source's keys that no rule knows."""
    names = model.state_dict().keys()
    layout = OWN if contents.metadata.get("format") == FORMAT else choose(contents.tensors, names)
    converted = layout.convert(contents.tensors)
    plan = Plan(dict(converted.tensors), ignored={**contents.ignored, **converted.reasons})
    for key, why in converted.optional.items():
        if key not in names:
            plan.drop([key], why)
    _leave_fresh(layout, names, plan)
    if not names & plan.tensors.keys():
        _cross(plan, names)
    return layout, converted.unknown, plan


def plan_load(model: nn.Module, contents: Contents, strict: bool) -> tuple[LoadReport, Plan]:
    """Convert, adapt and account; raises if anything does not fit."""
    _check_devices(model, contents)
    layout, unknown, plan = _translate(model, contents)
    config = json.loads(contents.metadata.get("config", "{}")) if layout is OWN else {}
    folded, ours = config.get("reparameterized"), getattr(model, "config", {}).get("reparameterized")
    if config and folded != ours:
        raise CheckpointError(
            f"{contents.name}: holds a model that is {'' if folded else 'not '}reparameterized, the model it is loaded "
            f"into is {'' if ours else 'not'}; use mixzoo.load, which rebuilds the model that a file belongs to"
        )
    saved = config.get("options", {})
    _adapt.fit_grid(model, plan, json.loads(contents.metadata.get("grids", "{}")))
    _adapt.fit_input(model, plan)
    _adapt.fit_ties(model, plan)
    _adapt.fit_parts(model, plan)
    _adapt.fit_horizon(model, plan)
    _adapt.fit_head(model, plan, headless=saved.get("num_classes") == 0)
    if _mixers(_options(model)) not in (None, _mixers(saved)):
        _adapt.leave_swapped(model, plan)
    _adapt.account(model, plan, unknown, strict)
    _raise_problems(model, contents, layout, plan, unknown)
    loaded = tuple(key for key in model.state_dict() if key in plan.tensors) + tuple(plan.untied)
    activation = layout.activation or saved.get("act")
    accounts = (plan.fresh, plan.adapted, plan.ignored)
    return LoadReport(contents.name, layout.name, layout.title, loaded, *accounts, activation), plan


def _options(model: nn.Module) -> dict[str, Any]:
    """What the model was created with besides its name."""
    return (getattr(model, "config", None) or {}).get("options", {})


def _mixers(options: Mapping[str, Any]) -> str | None:
    """The mixers that were asked for, None where they are the variant's own."""
    return json.dumps(options["token_mixer"]) if options.get("token_mixer") is not None else None


def source_options(name: str, source: str | os.PathLike | Mapping[str, Any]) -> dict[str, int]:
    """``num_classes`` and ``in_chans`` of weights for the model ``name``, to create it so that they fit as they are."""
    from ..models import create_model

    model = create_model(name, device="meta")
    return _adapt.shape_options(model, _translate(model, open_source(source)[0])[2].tensors)


def _check_devices(model: nn.Module, contents: Contents) -> None:
    def on_meta(tensors: Mapping[str, Tensor]) -> bool:
        return any(tensor.device.type == "meta" for tensor in tensors.values())

    if on_meta(model.state_dict()) and not on_meta(contents.tensors):
        raise ValueError(
            "the model is on the meta device and has no memory to load into; call model.to_empty(device=...) first"
        )
    if on_meta(contents.tensors) and not on_meta(model.state_dict()):
        raise CheckpointError(f"{contents.name}: its tensors are on the meta device and have no values")


def _whole_head(model: nn.Module, report: LoadReport) -> bool:
    """Whether the classifier is the source's, class by class."""
    place = _adapt.classifier_of(model)
    keys = [] if place is None else [key for key in model.state_dict() if key.startswith(place[0] + ".")]
    return bool(keys) and not any(key in report.fresh or key in report.adapted for key in keys)


def _leave_fresh(layout: Layout, names: Any, plan: Plan) -> None:
    """Parameters that the layout never holds."""
    for text, why in layout.fresh:
        pattern = Pattern(text)
        plan.fresh.update({key: why for key in names if key not in plan.tensors and pattern.match(key) is not None})


def _cross(plan: Plan, names: Any) -> None:
    """Go from the form of the model that the source is of to the form that is being loaded, if there is a way."""
    bridge = choose(plan.tensors, names, bridges=True)
    if bridge is OWN:
        return
    crossed = bridge.convert(plan.tensors)
    plan.tensors = {**crossed.tensors, **{key: plan.tensors[key] for key in crossed.unknown}}
    plan.ignored.update(crossed.reasons)
    _leave_fresh(bridge, names, plan)


def _raise_problems(model: nn.Module, contents: Contents, layout: Layout, plan: Plan, unknown: tuple[str, ...]) -> None:
    problems = plan.problems()
    if not problems:
        return
    for key in unknown[:3]:
        near = layout.nearest(key)
        problems.append(f"no rule of the layout knows {key!r}" + (f"; the nearest is {near!r}" if near else ""))
    what = getattr(model, "config", {}).get("model") or type(model).__name__
    if not model.state_dict().keys() & plan.tensors.keys():
        first = ", ".join(list(contents.tensors)[:4])
        problems.append(f"no tensor has a name of this model; the source begins with {first}")
    lines = "\n  ".join(problems)
    raise CheckpointError(
        f"{contents.name} (recognised as layout {layout.name}: {layout.title}) does not fit {what}; "
        f"nothing was loaded\n  {lines}"
    )


def commit(model: nn.Module, report: LoadReport, plan: Plan, provenance: Mapping[str, str]) -> None:
    """Copy; everything was verified before."""
    bad = _adapt.not_finite(plan.tensors)
    if bad:
        warnings.warn(f"{report.source}: NaN or Inf in {len(bad)} tensors: {grouped(bad)}", stacklevel=3)
    place = _adapt.classifier_of(model)
    fresh = [why for key, why in report.fresh.items() if place is not None and key.startswith(place[0] + ".")]
    if fresh and "num_classes" not in _options(model):
        # asked for by nobody: the default number of classes met a source with another one
        warnings.warn(f"{report.source}: {fresh[0]}; give num_classes= when creating the model", stacklevel=3)
    if plan.untied:
        model.untie()
        model.config.setdefault("options", {})["tie_embeddings"] = False
    targets = model.state_dict()
    with torch.no_grad():
        for key in report.loaded:
            targets[key].copy_(plan.tensors[key] if key in plan.tensors else plan.untied[key])
    if report.activation is not None and hasattr(model, "set_activation") and model.act != report.activation:
        model.set_activation(report.activation)
        model.config.setdefault("options", {})["act"] = report.activation
    if getattr(model, "config", None) is not None and provenance:
        model.config["weights"] = dict(provenance)
