"""The one place that knows timm's factory: building, feature extraction, and entering timm's registry.

Every image classifier of the zoo enters under its own name, or as ``mixzoo_<name>`` where timm has that name. Weights
always go through `mixzoo.weights`, also when timm's factory asks for them: timm's own loading turns non-strict as soon
as the number of classes differs.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch.nn as nn
from timm.models._builder import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import generate_default_cfgs, register_model

from ._registry import MODELS, ModelSpec, Release, releases_of

default_cfgs: dict[str, Any] = {}
_NAMES: dict[str, str] = {}

# keywords of a call that are not part of a model's configuration
_NOT_CONFIG = ("features_only", "out_indices", "feature_cls", "device", "dtype", "cache_dir")


def _pretrained_cfg(spec: ModelSpec, release: Release) -> dict[str, Any]:
    """timm's description of a release of a model."""
    side = release.input_size[1:]
    return {
        "url": release.url or None,
        "hf_hub_id": release.hf_hub_id or None,
        "input_size": release.input_size,
        "pool_size": tuple(s // spec.reduction for s in side),
        "fixed_input_size": spec.fixed_input_size,
        "interpolation": release.interpolation,
        "crop_pct": release.crop_pct,
        "crop_mode": release.crop_mode,
        "mean": release.mean,
        "std": release.std,
        # -1 keeps timm from passing classes to a model without a head
        "num_classes": release.num_classes if spec.classifier else -1,
        "first_conv": spec.first_conv,
        "classifier": spec.classifier,
        "license": release.licence or None,
        "description": release.note or None,
    }


def _cfgs(spec: ModelSpec) -> dict[str, dict[str, Any]]:
    """timm's descriptions of all releases of a model by tag, or one without weights and tag."""
    evaluation = ("crop_pct", "interpolation", "input_size", "mean", "std", "num_classes")
    releases = releases_of(spec.name) or {spec.name: Release(**{key: getattr(spec, key) for key in evaluation})}
    return {name.partition(".")[2]: _pretrained_cfg(spec, release) for name, release in releases.items()}


def timm_name(name: str) -> str:
    """The name of a registered model in timm's registry.

    Raises:
        KeyError: the model is not a classifier of images and so is not in it.
    """
    return _NAMES[name]


def register_all() -> None:
    """Enter every image classifier that is not in timm's registry yet; timm's own entries stay as they are."""
    for spec in MODELS.values():
        if spec.name in _NAMES or spec.modality != "image" or not spec.timm:
            continue
        name = f"mixzoo_{spec.name}" if timm.is_model(spec.name) else spec.name
        tagged = {f"{name}.{tag}" if tag else name: cfg for tag, cfg in _cfgs(spec).items()}
        default_cfgs.update(generate_default_cfgs(tagged))
        register_model(_entrypoint(spec, name))
        _NAMES[spec.name] = name


def _entrypoint(spec: ModelSpec, name: str):
    def entrypoint(pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, **options) -> nn.Module:
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        return _build(spec, cfg, _weights_of(spec, cfg) if pretrained else None, options)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"`mixzoo.create_model({spec.name!r})` for timm's factory."
    return entrypoint


def _weights_of(spec: ModelSpec, cfg: PretrainedCfg) -> Any:
    """What `load_checkpoint` should read for a timm configuration: a path, a state dict or a release name."""
    if cfg.source in ("hf-hub", "local-dir"):
        from timm.models._hub import load_state_dict_from_hf, load_state_dict_from_path

        if cfg.source == "hf-hub":
            return load_state_dict_from_hf(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors")
        return load_state_dict_from_path(cfg.file)
    if cfg.state_dict or cfg.file:
        return cfg.state_dict or cfg.file
    release = f"{spec.name}.{cfg.tag}" if cfg.tag else spec.name
    known = releases_of(spec.name).get(release, Release())
    if not known.has_weights:
        note = f": {known.note}" if known.note else ""
        raise RuntimeError(f"no pretrained weights can be downloaded for {release!r}{note}")
    return release


def _construct(spec: ModelSpec, config: dict[str, Any], weights: Any, **arguments: Any) -> nn.Module:
    """Make the model and load its weights, if any."""
    model = spec.skeleton(**{**spec.row, **arguments})
    model.config = config
    if weights is not None:
        from ..weights import load_checkpoint

        load_checkpoint(model, weights)
    return model


def _config(spec: ModelSpec, name: str, options: dict[str, Any], extra: Sequence[str] = ()) -> dict[str, Any]:
    """What rebuilds the model; raises for options that neither its skeleton nor ``extra`` has."""
    unknown = sorted(set(options) - set(skeleton_options(spec)) - set(extra))
    if unknown:
        accepted = ", ".join(skeleton_options(spec))
        raise TypeError(f"{spec.name} has no argument {unknown[0]!r}; accepted: {accepted}")
    return {"model": name, "options": {k: v for k, v in options.items() if k not in _NOT_CONFIG}}


def _build(spec: ModelSpec, cfg: PretrainedCfg, weights: Any, options: dict[str, Any]) -> nn.Module:
    """Construct, load, and let timm wrap the model for features."""
    name = f"{spec.name}.{cfg.tag}" if cfg.tag else spec.name
    config = _config(spec, name, options, (*_NOT_CONFIG, "checkpoint_path"))
    return build_model_with_cfg(
        partial(_construct, spec, config, weights),
        spec.name,
        pretrained=False,
        pretrained_cfg=dataclasses.replace(cfg, state_dict=None).to_dict(),
        feature_cfg={"feature_cls": "getter", "out_indices": spec.feature_levels},
        **options,
    )


def skeleton_options(spec: ModelSpec) -> Sequence[str]:
    """Names of the arguments of a model's skeleton."""
    return tuple(inspect.signature(spec.skeleton).parameters)


def build(spec: ModelSpec, release: str | None, *, pretrained: bool, checkpoint: Any, **options: Any) -> nn.Module:
    """`create_model` with the name resolved."""
    if pretrained and checkpoint is not None:
        raise ValueError("give pretrained=True or checkpoint=, not both")
    if spec.modality != "image":
        # timm's factory knows images alone
        if pretrained and release is None:
            raise ValueError(f"no weights were released for {spec.name!r}")
        config = _config(spec, release or spec.name, options)
        return _construct(spec, config, release if pretrained else checkpoint, **options)
    tag = release.partition(".")[2] if release else ""
    cfg = PretrainedCfg(**_cfgs(spec)[tag], architecture=_NAMES.get(spec.name, spec.name), tag=tag or None)
    weights = _weights_of(spec, cfg) if pretrained else checkpoint
    return _build(spec, cfg, weights, options)
