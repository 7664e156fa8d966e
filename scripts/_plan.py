"""From arguments to everything a run needs, checked before anything is written: data, model, recipe, settings."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import mixzoo
from mixzoo.mixers._registry import parse_spec
from mixzoo.models._registry import RELEASES, ModelSpec, resolve_name
from mixzoo.models.timm_bridge import skeleton_options

from ._classification import Pixels
from ._data import ImageData, load_images
from ._presets import PRESETS, Recipe, preset_for
from ._runs import RunFolder
from ._training import LoopSettings

# inputs up to this side shrink to nothing behind a stem of stride 4
_SMALL_INPUT = 64
_SMALL_STEM = {"stem_kernel": 3, "stem_stride": 1, "stem_padding": 1}


@dataclass(frozen=True)
class Plan:
    """A run, ready to start.

    Attributes:
        start: "scratch" or "tuned" (from weights).
        batch_size: images of one process.
        described: all that decides the result, as JSON values; what `--resume` compares.
    """

    data: ImageData
    net: nn.Module
    preset: str
    start: str
    recipe: Recipe
    pixels: Pixels
    loop: LoopSettings
    folder: RunFolder
    described: dict[str, Any]


def is_own_file(model: str) -> bool:
    """Whether MODEL is a file that `mixzoo.save` wrote rather than a name."""
    return model.endswith(".safetensors")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for arguments that exclude or need each other, or lack a package."""
    model = args.model
    if is_own_file(model):
        if not Path(model).is_file():
            raise ValueError(f"MODEL {model}: no such file")
        clash = [
            option
            for option, value in (
                ("--checkpoint", args.checkpoint),
                ("--pretrained", args.pretrained),
                ("--token-mixer", args.token_mixer),
                ("--in-chans", args.in_chans),
                ("--set", args.set),
                ("--drop-path", args.drop_path),
            )
            if value
        ]
        if clash:
            raise ValueError(f"{', '.join(clash)} cannot be given with a MODEL file, which holds the model as it is")
    else:
        spec, _ = resolve_name(model)
        if spec.modality != "image":
            raise ValueError(f"MODEL {model} takes {spec.modality}, not images")
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise ValueError(f"--checkpoint {args.checkpoint}: no such file")
    if args.stem == "small" and start_of(args) == "tuned":
        raise ValueError("--stem small makes another first convolution than the one the weights have; leave it out")
    if args.unfreeze_after is not None and not args.freeze:
        raise ValueError("--unfreeze-after needs --freeze")
    if args.freeze and start_of(args) == "scratch":
        raise ValueError("--freeze needs weights: give --pretrained, --checkpoint FILE or a MODEL file")
    if args.resume and args.overwrite:
        raise ValueError("give --resume or --overwrite, not both")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'mixzoo[plots]'")


def start_of(args: argparse.Namespace) -> str:
    """ "tuned" if weights are given, else "scratch"."""
    return "tuned" if args.pretrained or args.checkpoint or is_own_file(args.model) else "scratch"


def make_plan(args: argparse.Namespace, processes: int, precision: str) -> Plan:
    """Open the data, build the model and settle every value; writes nothing.

    Raises:
        ValueError, TypeError: a value that cannot be; the message names the argument or the model's option.
    """
    data = load_images(args.data, data_dir=args.data_dir, download=args.download)
    start = start_of(args)
    preset = preset_for(args.data, data.size, data.channels) if args.preset == "auto" else args.preset
    recipe = _recipe(args, PRESETS[preset, start])
    classes = len(data.class_names)
    if args.num_classes is not None and args.num_classes < classes:
        raise ValueError(f"--num-classes {args.num_classes} is less than the {classes} classes of --data {args.data}")
    net = _build(args, recipe, data, start)
    net.class_names = data.class_names if net.num_classes == classes else None
    pixels = _pixels(net, data)
    total_batch = recipe.batch_size * processes * args.accumulate
    row = PRESETS[preset, start]
    lr = args.lr if args.lr is not None else row.lr * total_batch / row.batch_size
    loop = _loop(args, recipe, lr)
    name = Path(args.model).stem if is_own_file(args.model) else args.model
    described = {
        "model": args.model,
        "weights": args.checkpoint or bool(args.pretrained),
        "data": args.data,
        "classes": data.class_names,
        "preset": preset,
        "options": dict(net.config["options"]),
        "recipe": {key: value for key, value in asdict(recipe).items() if key != "evidence"},
        "pixels": asdict(pixels),
        "loop": asdict(loop),
        "processes": processes,
        "precision": precision,
    }
    folder = RunFolder(args.output or Path("runs") / f"{name}-{data.name}")
    return Plan(data, net, preset, start, recipe, pixels, loop, folder, described)


def _loop(args: argparse.Namespace, recipe: Recipe, lr: float) -> LoopSettings:
    return LoopSettings(
        epochs=recipe.epochs,
        lr=lr,
        weight_decay=recipe.weight_decay,
        optimizer=recipe.optimizer,
        layer_decay=recipe.layer_decay,
        warmup_epochs=recipe.warmup,
        grad_clip=recipe.grad_clip,
        ema=recipe.ema,
        accumulate=args.accumulate,
        freeze=args.freeze,
        unfreeze_after=args.unfreeze_after,
        seed=args.seed,
        compile=args.compile,
    )


def _recipe(args: argparse.Namespace, row: Recipe) -> Recipe:
    """The preset's row with what was given as options in place."""
    names = "epochs batch_size weight_decay layer_decay warmup optimizer drop_path mixup cutmix smoothing ema grad_clip"
    given = {name: getattr(args, name) for name in names.split() if getattr(args, name) is not None}
    if args.stem is not None:
        given["stem"] = args.stem
    # a run shorter than the preset's keeps the share of its warm-up
    if "epochs" in given and "warmup" not in given:
        given["warmup"] = row.warmup * min(1.0, given["epochs"] / row.epochs)
    recipe = replace(row, **given)
    if recipe.warmup >= recipe.epochs:
        raise ValueError(f"--warmup {recipe.warmup:g} must be less than --epochs {recipe.epochs}")
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size % 2:
        raise ValueError(f"--batch-size {recipe.batch_size} must be even: --mixup and --cutmix pair images")
    if args.unfreeze_after is not None and args.unfreeze_after >= recipe.epochs:
        raise ValueError(f"--unfreeze-after {args.unfreeze_after} must be less than --epochs {recipe.epochs}")
    return recipe


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs as a dict; values are JSON where they can be read as such, else text."""
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--set {pair}: give KEY=VALUE")
        try:
            options[key] = json.loads(text)
        except json.JSONDecodeError:
            options[key] = text
    return options


def _build(args: argparse.Namespace, recipe: Recipe, data: ImageData, start: str) -> nn.Module:
    """The model with its weights, for the data's classes; its `img_size` is the input size of the run."""
    classes = args.num_classes or len(data.class_names)
    size = (args.img_size[0], args.img_size[-1]) if args.img_size else None
    if is_own_file(args.model):
        return _open_own(args.model, classes, data, size)
    options = parse_options(args.set)
    if recipe.drop_path:
        options.setdefault("drop_path_rate", recipe.drop_path)
    spec, release = resolve_name(args.model)
    if start == "scratch":
        size = size or ((recipe.img_size, recipe.img_size) if recipe.img_size else data.size)
        options = _stem(spec, recipe.stem, size) | options
    elif size is None:
        size = RELEASES[release].input_size[1:] if release else (224, 224)
    net = mixzoo.create_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        token_mixer=parse_spec(args.token_mixer) if args.token_mixer else None,
        num_classes=classes,
        in_chans=args.in_chans or (data.channels if start == "scratch" else 3),
        img_size=size,
        **options,
    )
    net.check_input_size(net.img_size)
    return net


def _stem(spec: ModelSpec, stem: str, size: tuple[int, int]) -> dict[str, Any]:
    """Options of the model's constructor for the first convolution."""
    known = set(_SMALL_STEM) <= set(skeleton_options(spec))
    if stem == "small" and not known:
        raise ValueError(f"--stem small: {spec.name} has no {', '.join(_SMALL_STEM)}")
    small = stem == "small" or (stem == "auto" and known and max(size) <= _SMALL_INPUT)
    return dict(_SMALL_STEM) if small else {}


def _open_own(path: str, classes: int, data: ImageData, size: tuple[int, int] | None) -> nn.Module:
    """The model of a file of ours; a head for other classes than the data's is replaced."""
    net = mixzoo.load(path)
    if not hasattr(net, "get_classifier"):
        raise ValueError(f"MODEL {path} is no classifier")
    if size and size != tuple(net.img_size):
        net.set_input_size(size)
    if net.num_classes != classes or (net.class_names and net.class_names != data.class_names):
        net.reset_classifier(classes)
    return net


def _pixels(net: nn.Module, data: ImageData) -> Pixels:
    """Preprocessing: always the one the model is published with, so that a saved model needs no other."""
    cfg = net.pretrained_cfg
    channels, size = net.in_chans, tuple(net.img_size)
    if channels not in (1, 3):
        raise ValueError(f"MODEL takes {channels} channels; images have 1 or 3")

    def fit(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(values) if len(values) == channels else (round(sum(values) / len(values), 4),) * channels

    # small images are enlarged as a whole; of large ones the model's usual share is cropped
    enlarged = max(data.size) <= min(size)
    return Pixels(
        channels=channels,
        size=size,
        mean=fit(cfg["mean"]),
        std=fit(cfg["std"]),
        interpolation=cfg["interpolation"],
        crop_pct=1.0 if enlarged else cfg["crop_pct"],
    )
