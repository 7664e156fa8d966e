"""`mixzoo finetune --task classify`: images to classes, from arguments to a plan."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

import mixzoo
from mixzoo.mixers._registry import parse_spec
from mixzoo.models._registry import RELEASES, ModelSpec, resolve_name
from mixzoo.models.timm_bridge import skeleton_options

from ._classification import Classification, Pixels, make_loaders, per_class
from ._data import DIGITS, ImageData, load_images
from ._plan import (
    Kind,
    Outcome,
    Plan,
    describe_run,
    fill_recipe,
    find_recipe,
    is_own_file,
    loop_settings,
    parse_options,
    run_folder,
    spread,
    start_of,
)
from ._presets import PRESETS, ImageRecipe, preset_for
from ._training import Loaders

# inputs up to this side shrink to nothing behind a stem of stride 4
_SMALL_INPUT = 64
_SMALL_STEM = {"stem_kernel": 3, "stem_stride": 1, "stem_padding": 1}

_HELP = """\
images (--task classify)
  --data is one of
  digits       1,797 real handwritten digits of scikit-learn, nothing to download (the default)
  DIR          a folder in ImageFolder layout: DIR/train/<class>/*, DIR/val/<class>/* and/or DIR/test/<class>/*;
               with a train split only, or DIR/<class>/*, 20 % of every class are held out
  torch/NAME   a data set of torchvision (torch/cifar10) below --data-dir
  hfds/NAME    a data set of the Hugging Face hub
  If there are val and test, the best epoch is chosen on val and test is measured once, at the end.

small images
  From scratch the input size follows the data: images of up to 64 pixels are trained at their own size, digits (8x8)
  enlarged to 32x32, others at 224. A published stem divides the size by 4 and the stages by another 8, so --stem auto
  puts a 3x3 convolution of stride 1 (--stem small) in its place for inputs of up to 64 pixels; the digits preset keeps
  the published stem, which is quicker and enough there. Digits, and small grey images of any source, are shifted and
  turned a little, never mirrored or cropped.
  With weights the stem stays and images are enlarged to the size the weights were trained at, unless --img-size says
  otherwise.
"""


def make_plan(args: argparse.Namespace, machine: tuple[int, str]) -> Plan:
    """Open the data, build the model and settle every value; writes nothing.

    Raises:
        ValueError, TypeError: a value that cannot be; the message names the argument or the model's option.
    """
    start, source = start_of(args), args.data or DIGITS
    if args.stem == "small" and start == "tuned":
        raise ValueError("--stem small makes another first convolution than the one the weights have; leave it out")
    data = load_images(source, data_dir=args.data_dir, download=args.download)
    preset, row = find_recipe(args, PRESETS, preset_for(source, data.size, data.channels))
    recipe = fill_recipe(args, row, ("stem", "mixup", "cutmix", "smoothing"))
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size % 2:
        raise ValueError(f"--batch-size {recipe.batch_size} must be even: --mixup and --cutmix pair images")
    classes = len(data.class_names)
    if args.num_classes is not None and args.num_classes < classes:
        raise ValueError(f"--num-classes {args.num_classes} is less than the {classes} classes of --data {source}")
    net = _build(args, recipe, data, start)
    net.class_names = data.class_names if net.num_classes == classes else None
    pixels, loop = _pixels(net, data), loop_settings(args, recipe, row, machine[0])
    described = describe_run(args, net, preset, recipe, loop, machine)
    return Plan(
        net=net,
        task=Classification(
            net.num_classes,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
            smoothing=recipe.smoothing,
            aux_weight=getattr(net, "aux_weight", 0.0),
        ),
        loaders=_loaders(args, data, pixels, recipe, machine[0]),
        loop=loop,
        folder=run_folder(args, data.name),
        preset=preset,
        start=start,
        lines=_lines(data, pixels),
        report=lambda outcome: _report(outcome, data, args.per_class),
        curves=(("loss", "loss"), ("top1", "top-1 accuracy / %")),
        described=described | {"data": source, "classes": data.class_names, "pixels": asdict(pixels)},
    )


def _loaders(args: argparse.Namespace, data: ImageData, pixels: Pixels, recipe: ImageRecipe, processes: int) -> Loaders:
    return make_loaders(
        data,
        pixels,
        recipe.augmentation,
        batch_size=recipe.batch_size,
        workers=args.workers,
        seed=args.seed,
        processes=processes,
    )


def _lines(data: ImageData, pixels: Pixels) -> dict[str, str]:
    splits = [f"train {len(data.train)}", f"{data.val_name} {len(data.val)}"]
    splits += [f"test {len(data.test)}"] if data.test is not None else []
    return {
        "data": f"{data.name}: {len(data.class_names)} classes, {', '.join(splits)}" + (data.note and f"; {data.note}"),
        "input": f"{pixels.channels} x {pixels.size[0]} x {pixels.size[1]} from {data.size[0]} x {data.size[1]}",
    }


def _report(outcome: Outcome, data: ImageData, classes: bool) -> str:
    """Accuracy of the saved model, and of every class if asked for."""
    trainer, task = outcome.trainer, outcome.trainer.task
    name = data.val_name if data.test is None else "test"
    chosen = f"epoch {trainer.best[1]}, the best one on {data.val_name}"
    if data.test is None:
        chosen += f", the same images; the last epoch has {trainer.history[-1]['val_top1']:.2f} %"
    lines = [f"{name} accuracy of {trainer.folder.best}: {task.describe(task.summarize(outcome.measured))}"]
    lines += [f"({chosen})"]
    return "\n".join(lines + (_classes(outcome.measured, data.class_names) if classes else []))


def _classes(measured: Mapping[str, Tensor], names: list[str]) -> list[str]:
    rows = per_class(measured, names)
    width = max(len(name) for name, _, _ in rows)
    return [f"  {name:<{width}}  {accuracy:6.2f} %  of {count}" for name, count, accuracy in rows]


def _build(args: argparse.Namespace, recipe: ImageRecipe, data: ImageData, start: str) -> nn.Module:
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


def _pool(plans: Sequence[Plan], outcomes: Sequence[Outcome]) -> str:
    """Mean and standard deviation of the runs."""
    values = [plan.task.summarize(outcome.measured) for plan, outcome in zip(plans, outcomes, strict=True)]
    scores = ", ".join(f"{name} {spread([v[name] for v in values], 2)}" for name in values[0])
    return f"{len(plans)} runs, mean ± standard deviation: {scores}"


CLASSIFY = Kind(
    modality="image",
    inputs="images",
    options=frozenset(
        (
            "data_dir",
            "download",
            "img_size",
            "stem",
            "in_chans",
            "num_classes",
            "mixup",
            "cutmix",
            "smoothing",
            "per_class",
        )
    ),
    presets=PRESETS,
    plan=make_plan,
    pool=_pool,
    help=_HELP,
)
