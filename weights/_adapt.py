"""Fit a state dict in our names to one model: grid, input channels, classifier, swapped mixers; then account for every
tensor. Nothing here writes to the model.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor

from ..mixers import TOKEN_MIXERS
from ..mixers._layers import resample

# class counts whose rows have known names, so that the 1000 classes of ImageNet-1k can be picked from them
IMAGENET_SUBSETS = {21841: "imagenet-22k"}
IMAGENET_1K = 1000


@dataclass
class Plan:
    """What to copy into the model, and what happened to everything else; keys are the model's unless unexpected.

    `untied` are tensors that the model has once its ``untie`` was called.
    """

    tensors: dict[str, Tensor]
    fresh: dict[str, str] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)
    untied: dict[str, Tensor] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def drop(self, keys: Iterable[str], why: str) -> None:
        """Leave source tensors out."""
        for key in list(keys):
            del self.tensors[key]
            self.ignored[key] = why

    def problems(self) -> list[str]:
        """Lines of the error; none if everything fits."""
        lines = [f"missing, {_count(self.missing)}: {grouped(self.missing)}"] if self.missing else []
        if self.unexpected:
            lines.append(f"unexpected, {_count(self.unexpected)}: {grouped(self.unexpected)}")
        if self.misshapen:
            shown = self.misshapen[:8] + [f"and {len(self.misshapen) - 8} more"] * (len(self.misshapen) > 8)
            lines.append(f"misshapen, {_count(self.misshapen)}: {'; '.join(shown)}")
        return lines + self.notes if lines else []


def _count(items: Sequence) -> str:
    return f"{len(items)} tensor{'s' * (len(items) != 1)}"


def grouped(keys: Iterable[str], most: int = 8) -> str:
    """Keys by prefix, ``stages.2.blocks.5.token.* (9, first op.qkv.weight)``; one key alone is shown as it is."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        indexed = re.match(r"(.*\.\d+)\.", key)
        groups.setdefault(indexed.group(1) if indexed else key.split(".")[0], []).append(key)
    parts = [group[0] if len(group) == 1 else _summary(group) for group in groups.values()]
    return ", ".join(parts[:most] + [f"and {len(parts) - most} more groups"] * (len(parts) > most))


def _summary(keys: Sequence[str]) -> str:
    first, last = min(keys).split("."), max(keys).split(".")
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], last[:-1], strict=False))
    start = "".join(f"{part}." for part, _ in common)
    return f"{start}* ({len(keys)}, first {keys[0].removeprefix(start)})"


def _inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one module, by their names inside it."""
    start = prefix + "." if prefix else ""
    return {key[len(start) :]: tensor for key, tensor in tensors.items() if key.startswith(start)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def fit_grid(model: nn.Module, plan: Plan, grids: Mapping[str, Sequence[int]]) -> None:
    """Resize what depends on the grid by its module's own procedure.

    Args:
        grids: grids of the source by module name, where they are recorded; others are taken to be square.
    """
    for name, module in model.named_modules():
        _fit_position(name, module, plan)
        # a grid mixer is any module with these two; those of other packages need not share a base class with ours
        resize, new = getattr(module, "resize_grid_state", None), getattr(module, "grid_size", None)
        if resize is None or new is None:
            continue
        source, target = _inside(plan.tensors, name), _shapes(module.state_dict())
        if set(source) != set(target):
            continue
        new = tuple(new)
        old = tuple(grids[name]) if name in grids else _grid_of(module, source, target, new)
        if old is None:
            plan.notes.append(
                f"the grid of {name} in the source is neither recorded nor square; create the model with the img_size "
                "of the checkpoint, load, then call set_input_size"
            )
        elif old != new:
            resized = resize(source, old, new)
            plan.tensors.update({f"{name}.{key}" if name else key: tensor for key, tensor in resized.items()})
            note = getattr(module, "resize_note", "")
            plan.adapted[name or "the mixer"] = (
                f"resized from grid {_times(old)} to {_times(new)}{note and ', ' + note}"
            )


def _fit_position(name: str, module: nn.Module, plan: Plan) -> None:
    """Position embeddings ``(1, H, W, C)`` carry their grid; they are resampled as `set_input_size` does it."""
    key = f"{name}.pos_embed"
    source, target = plan.tensors.get(key), getattr(module, "pos_embed", None)
    if source is None or target is None or source.ndim != 4 or target.ndim != 4:
        return
    old, new = tuple(source.shape[1:3]), tuple(target.shape[1:3])
    if old != new:
        plan.tensors[key] = resample(source.permute(0, 3, 1, 2), new, "cubic").permute(0, 2, 3, 1)
        plan.adapted[key] = f"resized from grid {_times(old)} to {_times(new)}"


def _times(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def _grid_of(
    module: nn.Module, source: Mapping[str, Tensor], target: Mapping[str, tuple], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The source's grid as the mixer reads it off its tensors, or as `_square_grid` does."""
    shapes = _shapes(source)
    if shapes != dict(target) and hasattr(module, "grid_of_state"):
        return tuple(module.grid_of_state(source))
    return _square_grid(shapes, target, new)


def _square_grid(
    source: Mapping[str, tuple], target: Mapping[str, tuple], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The source's grid if its sides are equal, read off a dimension of as many entries as the grid has tokens."""
    if source == dict(target):
        return new
    tokens = math.prod(new)
    for key, shape in target.items():
        for size, old in zip(shape, source[key], strict=False):
            side = round(old ** (1 / len(new)))
            if size == tokens and old != tokens and side ** len(new) == old:
                return (side,) * len(new)
    return None


def first_conv(model: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """The convolution that reads the image and its name; None where the first one reads something else."""
    found = next(((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)
    return found if found is not None and found[1].in_channels == getattr(model, "in_chans", None) else None


def classifier_of(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The classifier and its name; None where the model has no place for one."""
    if not hasattr(model, "get_classifier"):
        return None
    classifier = model.get_classifier()
    return next(((name, module) for name, module in model.named_modules() if module is classifier), None)


def _class_layers(prefix: str, classifier: nn.Module) -> list[str]:
    """Names of the layers with one row a class: those the classifier lists as ``class_layers``, else its last one."""
    layers = getattr(classifier, "class_layers", None)
    if layers is None:
        layers = [name for name, module in classifier.named_modules() if isinstance(module, nn.Linear)][-1:]
    return [f"{prefix}.{layer}" if layer else prefix for layer in layers]


def shape_options(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """``num_classes`` and ``in_chans`` of a source in our names, as far as the model has them."""
    options = {}
    place, conv = classifier_of(model), first_conv(model)
    if place is not None and place[1].state_dict():
        rows = tensors.get(_class_layers(*place)[0] + ".weight")
        options["num_classes"] = 0 if rows is None else rows.shape[0]
    if conv is not None and f"{conv[0]}.weight" in tensors:
        options["in_chans"] = tensors[f"{conv[0]}.weight"].shape[1]
    return options


def fit_ties(model: nn.Module, plan: Plan) -> None:
    """Sort out tensors that are tied in the model and apart in the source, or the other way round.

    A model lists them in ``tied_keys``. A copy in the source is left out, and one with other values is kept for
    `Plan.untied`; an untied model takes the values of the tensor that its own is tied to in the source.
    """
    names = model.state_dict().keys()
    for key, origin in getattr(model, "tied_keys", {}).items():
        have, theirs = plan.tensors.get(key), plan.tensors.get(origin)
        if key in names and have is None and theirs is not None:
            plan.tensors[key] = theirs
            plan.adapted[key] = f"copied from {origin}, to which it is tied in the source"
        if key in names or have is None or theirs is None or origin not in names:
            continue
        if torch.equal(have, theirs):
            plan.drop([key], f"tied to {origin}")
        elif have.shape == theirs.shape and hasattr(model, "untie") and key.endswith(".weight"):
            plan.untied[key] = plan.tensors.pop(key)


def fit_parts(model: nn.Module, plan: Plan) -> None:
    """Leave out and leave fresh the parts that only one side has, of those that a model lists as ``optional_parts``."""
    names = model.state_dict().keys()
    for part in getattr(model, "optional_parts", ()):
        ours = {key for key in names if key.startswith(part + ".")}
        theirs = [key for key in plan.tensors if key.startswith(part + ".")]
        if theirs and not ours:
            plan.drop(theirs, f"the model has no part {part!r}")
        elif ours and not theirs:
            plan.fresh.update(dict.fromkeys(ours, f"the source has no part {part!r}"))


def fit_horizon(model: nn.Module, plan: Plan) -> None:
    """Take the first steps of a forecast that is longer in the source.

    Every step has rows of its own in the layers that a model names in ``horizon_parts``.
    """
    targets = model.state_dict()
    for part in getattr(model, "horizon_parts", ()):
        for key, tensor in plan.tensors.items():
            want = targets.get(key) if key.startswith(part + ".") else None
            if want is not None and tensor.shape[0] > want.shape[0] and tensor.shape[1:] == want.shape[1:]:
                plan.tensors[key] = tensor[: want.shape[0]]
                plan.adapted[key] = f"the first {want.shape[0]} of {tensor.shape[0]} steps"


def fit_input(model: nn.Module, plan: Plan) -> None:
    """Fit the first convolution to the model's input channels as timm does: from any number to any number."""
    from timm.models._manipulate import adapt_input_conv

    found = first_conv(model)
    weight = None if found is None else plan.tensors.get(f"{found[0]}.weight")
    if weight is None or weight.ndim != 4:
        return
    name, conv = found
    have, want = weight.shape[1], conv.in_channels
    if have == want or weight.shape[:1] + weight.shape[2:] != conv.weight.shape[:1] + conv.weight.shape[2:]:
        return
    plan.tensors[f"{name}.weight"] = adapt_input_conv(want, weight, base_chans=have)
    how = "summed" if want == 1 else "repeated and scaled"
    plan.adapted[f"{name}.weight"] = f"{have} to {want} input channels, {how}"


def fit_head(model: nn.Module, plan: Plan, headless: bool) -> None:
    """Map the classifier to the model's classes, or leave the model's fresh one.

    Args:
        headless: the source is known to have no classifier.
    """
    place = classifier_of(model)
    if place is None:
        return
    prefix, classifier = place
    source = {key: t for key, t in plan.tensors.items() if key.startswith(prefix + ".")}
    target = {f"{prefix}.{key}": tensor for key, tensor in classifier.state_dict().items()}
    if not target:
        plan.drop(source, "the model has no classifier (num_classes=0)")
        return
    if not source and headless:
        plan.fresh.update(dict.fromkeys(target, "the source has no classifier"))
        return
    final = [f"{layer}.{kind}" for layer in _class_layers(prefix, classifier) for kind in ("weight", "bias")]
    # whatever does not fit besides the number of classes is left for `account` to report
    if set(source) != set(target) or any(
        t.shape[key in final :] != target[key].shape[key in final :] for key, t in source.items()
    ):
        return
    have, want = source[final[0]].shape[0], target[final[0]].shape[0]
    if have == want or any(source[key].shape[0] != have for key in final):
        return
    if want == IMAGENET_1K and have in IMAGENET_SUBSETS:
        for key in final:
            plan.tensors[key] = _imagenet_1k_rows(source[key])
            plan.adapted[key] = f"{have} to {want} classes by name"
        return
    plan.drop(source, f"classifier of {have} classes, the model has {want}")
    plan.fresh.update(dict.fromkeys(target, f"the model has {want} classes, the source {have}"))


def _imagenet_1k_rows(rows: Tensor) -> Tensor:
    """Rows of the ImageNet-1k classes; a class that the larger set lacks (850) gets the mean of all rows."""
    from timm.data import ImageNetInfo

    index = {synset: i for i, synset in enumerate(ImageNetInfo(IMAGENET_SUBSETS[rows.shape[0]]).label_names())}
    small = ImageNetInfo("imagenet-1k").label_names()
    known = [i for i, synset in enumerate(small) if synset in index]
    picked = rows.float().mean(0, keepdim=True).to(rows.dtype).expand(len(small), *rows.shape[1:]).clone()
    picked[known] = rows[[index[small[i]] for i in known]]
    return picked


def leave_swapped(model: nn.Module, plan: Plan) -> None:
    """Leave mixers fresh whose tensors in the source are not theirs."""
    mixers = tuple(info.factory for info in TOKEN_MIXERS.infos().values())
    for name, module in model.named_modules():
        if type(module) not in mixers:
            continue
        source, target = _inside(plan.tensors, name), module.state_dict()
        if _shapes(source) == _shapes(target):
            continue
        kind = type(module).__name__
        plan.drop((f"{name}.{key}" for key in source), f"the mixer was swapped for {kind}")
        plan.fresh.update({f"{name}.{key}": f"{kind} replaces the source's mixer" for key in target})
        # one of the two mixers may bring its own norm, where the other has that of its branch
        branch = name.rpartition(".")[0]
        own, theirs = (_inside(tensors, f"{branch}.norm") for tensors in (model.state_dict(), plan.tensors))
        plan.drop((f"{branch}.norm.{key}" for key in theirs if key not in own), f"{kind} has no norm before it")
        # only a mixer with norms of its own excuses a source that has none before it
        if any("norm" in key for key in source):
            lacking = [f"{branch}.norm.{key}" for key in own if key not in theirs]
            plan.fresh.update(dict.fromkeys(lacking, "the source's mixer has no norm before it"))


def account(model: nn.Module, plan: Plan, unknown: Sequence[str], strict: bool) -> None:
    """Sort every tensor of both sides; not strict leaves missing ones fresh and unexpected ones out."""
    targets = model.state_dict()
    missing = [key for key in targets if key not in plan.tensors and key not in plan.fresh]
    unexpected = [key for key in plan.tensors if key not in targets]
    if strict:
        plan.missing, plan.unexpected = missing, [*unexpected, *unknown]
    else:
        plan.fresh.update(dict.fromkeys(missing, "missing in the source"))
        plan.ignored.update(dict.fromkeys(unknown, "unknown to the model"))
    if not strict:
        plan.drop(unexpected, "unknown to the model")
    for key, tensor in plan.tensors.items():
        want = targets.get(key)
        if want is None:
            continue
        if tensor.shape != want.shape:
            plan.misshapen.append(f"{key} is {tuple(tensor.shape)}, the model wants {tuple(want.shape)}")
        elif tensor.is_floating_point() != want.is_floating_point() or tensor.is_complex() != want.is_complex():
            plan.misshapen.append(f"{key} is {_dtype(tensor)}, the model wants {_dtype(want)}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys of tensors with NaN or infinite values."""
    checked = ((key, t) for key, t in tensors.items() if t.is_floating_point() and t.device.type != "meta")
    return [key for key, t in checked if not torch.isfinite(t).all()]


def grids_of(model: nn.Module) -> str:
    """Grids of the modules whose parameters depend on one, as JSON; see `fit_grid`."""
    modules = model.named_modules()
    return json.dumps({name: list(m.grid_size) for name, m in modules if hasattr(m, "resize_grid_state")})
