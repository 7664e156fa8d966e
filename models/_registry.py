"""Registered models and releases, and `create_model`.

A model is a skeleton and a row of literal keywords; a release is a checkpoint its authors published, named
``arch.tag``. Families add theirs with `register_models` (in `mixzoo.models`) and `register_releases` (in
`mixzoo.weights`).
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelSpec:
    """A registered model.

    Attributes:
        name: the name it is created by.
        skeleton: class (or factory) called with the row.
        row: keywords of the variant; the caller's win.
        modality: "image", "text" or "series".
        classifier: name of the last linear layer, first_conv: of the first convolution; None if there is none.
        fixed_input_size: parameters depend on the input size.
        crop_pct, interpolation, input_size, mean, std, num_classes: of evaluation, where no release says it; see
            `Release`.
        reduction: stride of the last map. feature_levels: `features_only` gives the last n maps.
        timm: whether it enters timm's registry (a classifier of images does).
        note: one line for tables.
    """

    name: str
    skeleton: Callable[..., nn.Module]
    row: Mapping[str, Any]
    modality: str = "image"
    classifier: str | None = "head.fc"
    first_conv: str = "stem.conv"
    fixed_input_size: bool = False
    crop_pct: float = 0.9
    interpolation: str = "bicubic"
    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    num_classes: int = 1000
    reduction: int = 32
    feature_levels: int = 4
    timm: bool = True
    note: str = ""


@dataclass(frozen=True)
class Release:
    """A published checkpoint.

    Attributes:
        url, hf_hub_id: where the file is; empty for none. sha256: its hash, empty where unknown.
        licence: of the weights, as their hosts state it.
        input_size, crop_pct, crop_mode, mean, std, interpolation: preprocessing of the published evaluation, see timm;
            ``crop_mode="squash"`` resizes to the input size whatever the aspect ratio.
        num_classes: classes of its head.
        top1: published ImageNet-1k accuracy in percent; params_m, gmacs: published size, as printed.
        macs_rule: what the published multiply-adds count: "matmul" (matrix products and convolutions) or "matmul+norm"
            (norms too, at five operations an element).
        note: what a user should know. aliases: other names, such as the authors' own.
    """

    url: str = ""
    hf_hub_id: str = ""
    sha256: str = ""
    licence: str = ""
    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.9
    crop_mode: str = "center"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    num_classes: int = 1000
    top1: float | None = None
    params_m: float | None = None
    gmacs: float | None = None
    macs_rule: str = "matmul"
    note: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def has_weights(self) -> bool:
        return bool(self.url or self.hf_hub_id)


MODELS: dict[str, ModelSpec] = {}
RELEASES: dict[str, Release] = {}
_ALIASES: dict[str, str] = {}


def register_models(skeleton: Callable[..., nn.Module], rows: Mapping[str, Mapping[str, Any]], **common: Any) -> None:
    """Register one model for every row; ``common`` are further fields of `ModelSpec`.

    Raises:
        ValueError: a name is taken or holds a dot, which separates tags.
    """
    for name, row in rows.items():
        if name in MODELS or "." in name:
            raise ValueError(f"model name {name!r} is {'already registered' if name in MODELS else 'not allowed: dot'}")
        MODELS[name] = ModelSpec(name, skeleton, dict(row), **common)


def register_releases(releases: Mapping[str, Release]) -> None:
    """Register checkpoints by ``arch.tag``; the first one of an architecture is its default.

    Raises:
        ValueError: no such architecture, or the name or an alias is taken.
    """
    for name, release in releases.items():
        arch = name.partition(".")[0]
        if arch not in MODELS:
            raise ValueError(f"release {name!r} belongs to no registered model {arch!r}")
        if name in RELEASES:
            raise ValueError(f"release {name!r} is already registered")
        for alias in release.aliases:
            if _ALIASES.setdefault(alias, name) != name:
                raise ValueError(f"alias {alias!r} of release {name!r} already stands for {_ALIASES[alias]!r}")
        RELEASES[name] = release


def releases_of(arch: str) -> dict[str, Release]:
    """Releases of an architecture by full name, the default first."""
    return {name: release for name, release in RELEASES.items() if name.partition(".")[0] == arch}


def resolve_name(name: str) -> tuple[ModelSpec, str | None]:
    """The model and, if there is one, the release that ``arch``, ``arch.tag`` or an alias names.

    Raises:
        ValueError: an unknown name, with the nearest ones.
    """
    name = _ALIASES.get(name, name)
    arch, dot, _ = name.partition(".")
    if arch not in MODELS:
        close = difflib.get_close_matches(arch, [*MODELS, *_ALIASES], n=3)
        hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"no model named {name!r}.{hint} mixzoo.list_models() lists all")
    if dot and name not in RELEASES:
        tags = ", ".join(releases_of(arch)) or "none"
        raise ValueError(f"no release named {name!r}; releases of {arch!r}: {tags}")
    return MODELS[arch], name if dot else next(iter(releases_of(arch)), None)


def list_models(filter: str | Sequence[str] = "", modality: str | None = None, pretrained: bool = False) -> list[str]:
    """Names of registered models, sorted.

    Args:
        filter: a shell pattern or several; empty for all.
        modality: "image", "text" or "series"; None for all.
        pretrained: list releases whose weights can be had, as ``arch.tag``, instead of architectures.
    """
    patterns = [filter] if isinstance(filter, str) else list(filter)
    patterns = [p for p in patterns if p] or ["*"]
    names = [n for n, r in RELEASES.items() if r.has_weights] if pretrained else list(MODELS)
    names = [n for n in names if modality in (None, MODELS[n.partition(".")[0]].modality)]
    return sorted(n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns))


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    checkpoint: Any = None,
    token_mixer: Any = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a registered model.

    Args:
        name: ``arch``, ``arch.tag`` for the configuration of a release, or an alias of one.
        pretrained: download and load the release's weights.
        checkpoint: load these weights instead: a path, a release name, or a state dict (see `load_checkpoint`).
        token_mixer: swap the mixers: a name, ``(name, {options})``, or one of these per stage.
        num_classes, in_chans: of the model; weights adapt.
        img_size: pixels the model is built for, a side or (H, W); grid-dependent weights adapt.
        options: any argument of the model's skeleton, which wins over the variant's, and ``features_only``,
            ``out_indices`` and ``feature_cls`` as in timm.

    Raises:
        ValueError: unknown name or impossible value. TypeError: an argument the skeleton does not have.
        mixzoo.weights.CheckpointError: weights that do not fit.

    >>> model = mixzoo.create_model("caformer_s18", num_classes=10)
    >>> backbone = mixzoo.create_model("metaformer_s12", token_mixer="separable_conv", features_only=True)
    """
    from .timm_bridge import build

    spec, release = resolve_name(name)
    given = {"token_mixer": token_mixer, "num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    options |= {key: value for key, value in given.items() if value is not None}
    return build(spec, release, pretrained=pretrained, checkpoint=checkpoint, **options)
