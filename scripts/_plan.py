"""From arguments to everything a run needs, checked before anything is written: what is the same for every task.

A task of the command line is a `Kind`: its options' checks, its presets and a function that makes a `Plan`. The loop,
the folder of the run and the command know nothing else of images, text or series.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from mixzoo.models._registry import resolve_name

from ._recipes import Recipe
from ._runs import RunFolder
from ._training import Loaders, LoopSettings, Task, Trainer


@dataclass(frozen=True)
class Outcome:
    """A finished run: the model of its best epoch, and what was measured of it on the last split."""

    trainer: Trainer
    best: nn.Module
    measured: Mapping[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """A run, ready to start.

    Attributes:
        start: "scratch" or "tuned" (from weights).
        lines: what to tell of data and input before the run, by heading.
        report: what to tell of the outcome.
        curves: (value of the log, label) of every picture of `--plot`.
        described: all that decides the result, as JSON values; what `--resume` compares.
        data: what a task wants to have again when several runs are told of together.
    """

    net: nn.Module
    task: Task
    loaders: Loaders
    loop: LoopSettings
    folder: RunFolder
    preset: str
    start: str
    lines: Mapping[str, str]
    report: Callable[[Outcome], str]
    curves: Sequence[tuple[str, str]]
    described: dict[str, Any]
    data: Any = None


@dataclass(frozen=True)
class Kind:
    """A task of the command line.

    Attributes:
        modality: of the models it trains. inputs: what these take, in words.
        options: names of the arguments that it has and not every other task.
        presets: recipes by (name, start).
        plan: ``(args, (processes, precision)) -> Plan``; raises ValueError or TypeError naming the argument.
        help: its part of ``--help``.
        pool: what to tell of several runs together, those of `--repeat` and `--folds`, from plans and outcomes.
    """

    modality: str
    inputs: str
    options: frozenset[str]
    presets: Mapping[tuple[str, str], Recipe]
    plan: Callable[[argparse.Namespace, tuple[int, str]], Plan]
    pool: Callable[[Sequence[Plan], Sequence[Outcome]], str]
    help: str = ""


def is_own_file(model: str) -> bool:
    """Whether MODEL is a file that `mixzoo.save` wrote rather than a name."""
    return model.endswith(".safetensors")


def modality_of(model: str) -> str:
    """What MODEL, a name or a file of ours, takes: "image", "text" or "series".

    Raises:
        ValueError: an unknown name, no such file, or a file that describes no model.
    """
    if not is_own_file(model):
        return resolve_name(model)[0].modality
    if not Path(model).is_file():
        raise ValueError(f"MODEL {model}: no such file")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(model, "pt") as file:
            config = json.loads((file.metadata() or {})["config"])
        return resolve_name(config["model"])[0].modality
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(
            f"MODEL {model} was not written by mixzoo.save; give a name and --checkpoint {model}"
        ) from None


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for arguments that exclude or need each other, or lack a package, whatever the task."""
    if is_own_file(args.model):
        names = ("checkpoint", "pretrained", "token_mixer", "in_chans", "set", "drop_path")
        clash = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
        if clash:
            raise ValueError(f"{', '.join(clash)} cannot be given with a MODEL file, which holds the model as it is")
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise ValueError(f"--checkpoint {args.checkpoint}: no such file")
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


R = TypeVar("R", bound=Recipe)


def fill_recipe(args: argparse.Namespace, row: R, own: Sequence[str] = ()) -> R:
    """The preset's row with what was given as options in place; ``own``: names of the task's own fields."""
    names = "epochs batch_size weight_decay layer_decay schedule warmup optimizer drop_path ema grad_clip patience"
    names = [*names.split(), *own]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    # a run shorter than the preset's keeps the share of its warm-up
    if "epochs" in given and "warmup" not in given:
        given["warmup"] = row.warmup * min(1.0, given["epochs"] / row.epochs)
    recipe = replace(row, **given)
    if recipe.warmup >= recipe.epochs:
        raise ValueError(f"--warmup {recipe.warmup:g} must be less than --epochs {recipe.epochs}")
    if args.unfreeze_after is not None and args.unfreeze_after >= recipe.epochs:
        raise ValueError(f"--unfreeze-after {args.unfreeze_after} must be less than --epochs {recipe.epochs}")
    return recipe


def loop_settings(args: argparse.Namespace, recipe: Recipe, row: Recipe, processes: int) -> LoopSettings:
    """Settings of the loop; without `--lr` the rate of the preset's ``row`` follows the batch of an update."""
    batch = recipe.batch_size * processes * args.accumulate
    return LoopSettings(
        epochs=recipe.epochs,
        lr=args.lr if args.lr is not None else row.lr * batch / row.batch_size,
        weight_decay=recipe.weight_decay,
        optimizer=recipe.optimizer,
        layer_decay=recipe.layer_decay,
        schedule=recipe.schedule,
        warmup_epochs=recipe.warmup,
        grad_clip=recipe.grad_clip,
        ema=recipe.ema,
        accumulate=args.accumulate,
        freeze=args.freeze,
        unfreeze_after=args.unfreeze_after,
        patience=recipe.patience,
        min_gain=recipe.min_gain,
        seed=args.seed,
        compile=args.compile,
    )


def describe_run(
    args: argparse.Namespace,
    net: nn.Module,
    preset: str,
    recipe: Recipe,
    loop: LoopSettings,
    machine: tuple[int, str],
) -> dict[str, Any]:
    """What decides the result, as far as it is the same for every task; ``machine``: processes and precision."""
    return {
        "model": args.model,
        "weights": args.checkpoint or bool(args.pretrained),
        "data": args.data,
        "preset": preset,
        "options": dict(net.config["options"]),
        "recipe": {key: value for key, value in asdict(recipe).items() if key != "evidence"},
        "loop": asdict(loop),
        "processes": machine[0],
        "precision": machine[1],
    }


def find_recipe(args: argparse.Namespace, presets: Mapping[tuple[str, str], R], auto: str) -> tuple[str, R]:
    """Name and row of the preset: what was asked for, or ``auto``; for weights what it has, else as from scratch."""
    preset = auto if args.preset == "auto" else args.preset
    return preset, presets.get((preset, start_of(args))) or presets[preset, "scratch"]


def check_parts(args: argparse.Namespace, net: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError for what needs parts that the model does not name: a head, groups of layers."""
    if args.freeze and (not hasattr(net, "get_classifier") or net.get_classifier() is None):
        raise ValueError(f"--freeze: {args.model} has no head to train alone")
    if recipe.layer_decay < 1 and not hasattr(net, "group_matcher"):
        raise ValueError(f"--layer-decay: {args.model} does not say which layers are above which")


def run_folder(args: argparse.Namespace, data_name: str) -> RunFolder:
    """The folder of the run: what was asked for, or runs/MODEL-DATA; one of several runs has a folder in there."""
    name = Path(args.model).stem if is_own_file(args.model) else args.model
    path = Path(args.output or Path("runs") / f"{name}-{data_name}")
    path = path / f"seed{args.seed}" if args.repeat else path
    return RunFolder(path if args.fold is None else path / f"fold{args.fold + 1}")


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation of several runs."""
    mean, count = sum(values) / len(values), len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / max(count - 1, 1)) ** 0.5
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


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
