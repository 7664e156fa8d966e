"""Train a model on your images, texts or series: from scratch, from released weights, or on from a model of your own.

    mixzoo finetune poolformerv2_s12 --data digits
    mixzoo finetune caformer_s18 --pretrained --data photos
    mixzoo finetune fnet_base --data reviews.csv --tokenizer google/fnet-base
    mixzoo finetune timemixer --data ETTh1.csv --horizon 96
    mixzoo finetune runs/caformer_s18-photos/best.safetensors --data more_photos
    accelerate launch -m mixzoo.scripts.finetune convformer_s18 --data torch/cifar100 --download

The output folder receives best.safetensors (open it by mixzoo.load), last.pt (for --resume), log.csv and run.json.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, set_seed
from timm.optim import list_optimizers

import mixzoo

from ._forecasting import LOSSES
from ._image_plan import CLASSIFY
from ._plan import Kind, Outcome, Plan, check_arguments, modality_of
from ._recipes import table
from ._schedules import SCHEDULES
from ._series_data import MARKS_OF
from ._series_plan import FORECAST
from ._text_plan import TEXT
from ._training import Trainer, TrainingError

KINDS: dict[str, Kind] = {"classify": CLASSIFY, "text": TEXT, "forecast": FORECAST}

_INTERRUPTED = 130
_WITHOUT_SHARDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

_RATES_HELP = """\
learning rates
  --lr is the rate of the head; with a --layer-decay of d < 1 each group of layers below has d times the rate of the
  one above, so early layers of trained weights move least. --freeze trains the head alone, --unfreeze-after N lets the
  rest follow after N epochs. Without --lr the preset's rate is scaled with the batch size.

presets (any option wins over the preset; "scratch" without weights, "tuned" with)
"""


def _number(kind: Callable[[str], Any], low: float, high: float = math.inf, *, open_low: bool = False) -> Callable:
    """Type of an argument: a number in [low, high), or in (low, high)."""

    def parse(text: str) -> Any:
        bounds = f"{'more than' if open_low else 'at least'} {low:g}" + (
            "" if high == math.inf else f", below {high:g}"
        )
        message = f"must be {'a whole number' if kind is int else 'a number'}, {bounds}; got {text!r}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(message) from None
        if not low <= value < high or (open_low and value == low):
            raise argparse.ArgumentTypeError(message)
        return value

    return parse


_COUNT = _number(int, 1)


def build_parser() -> argparse.ArgumentParser:
    """All options of the command."""
    presets = "\n".join(table(kind.presets) for kind in KINDS.values())
    parser = argparse.ArgumentParser(
        prog="mixzoo finetune",
        description=__doc__,
        epilog="\n".join(kind.help for kind in KINDS.values()) + "\n" + _RATES_HELP + presets,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(parser)
    _add_image_options(parser)
    _add_text_options(parser)
    _add_series_options(parser)
    _add_recipe_options(parser)
    _add_run_options(parser)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument("model", metavar="MODEL", help="a name of the zoo, or a .safetensors file that mixzoo saved")
    group.add_argument("--task", choices=tuple(KINDS), help="what to learn; by default what the model is for")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="FILE", help="start from these weights; head and input adapt")
    weights.add_argument("--pretrained", action="store_true", help="start from the released weights (download)")
    group.add_argument("--data", metavar="DATA", help="what to train on, see below")
    group.add_argument(
        "--token-mixer", metavar="SPEC", help="swap the mixers: a name, names per stage a,b,c,d, or JSON"
    )
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another option of the model")
    group.add_argument("--num-classes", type=_COUNT, metavar="N", help="outputs, if more than the classes of the data")
    group.add_argument("--freeze", action="store_true", help="train the head alone")
    group.add_argument("--unfreeze-after", type=_COUNT, metavar="EPOCH", help="train everything after this epoch")


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    group.add_argument("--data-dir", metavar="DIR", help='files of torch/NAME ("data") or cache of hfds/NAME')
    group.add_argument("--download", action="store_true", help="fetch torch/NAME if it is not there")
    group.add_argument("--img-size", type=_COUNT, nargs="+", metavar="PIXELS", help="input size: H, or H W")
    group.add_argument("--stem", choices=("auto", "patch", "small"), help="first convolution, see below")
    group.add_argument("--in-chans", type=int, choices=(1, 3), help="channels; from scratch those of the data, else 3")


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument("--tokenizer", metavar="NAME", help="folder, tokenizer.json or hub name; bytes: built in")
    group.add_argument(
        "--max-length", "--seq-len", type=_number(int, 2), metavar="N", help="tokens; longer texts are cut"
    )
    group.add_argument("--text-column", metavar="NAMES", help="column of the text, or two for pairs: a,b")
    group.add_argument("--label-column", metavar="NAME", help="column of the class")
    group.add_argument("--val-data", metavar="FILE", help="chooses the epoch; else 20 %% of the data are held out")
    group.add_argument("--test-data", metavar="FILE", help="measured once, at the end")
    group.add_argument("--folds", type=_number(int, 2), metavar="K", help="cross-validation: K runs, each on the rest")
    group.add_argument("--group-by", metavar="COLUMN", help="rows of equal value stay on one side")
    group.add_argument("--sentences", action="store_true", help="are the segments of mixers that have these")
    group.add_argument("--pad", choices=("batch", "max"), help="to the longest of the batch, or to --max-length")
    group.add_argument("--metric", choices=("accuracy", "macro_f1"), help="what picks the best epoch")
    group.add_argument("--items", type=_COUNT, nargs=3, metavar="N", help="of listops: train, val, test")


def _add_series_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("series")
    group.add_argument("--horizon", type=_COUNT, metavar="H", help="steps to forecast")
    group.add_argument("--context-length", type=_COUNT, metavar="L", help="steps to look back")
    group.add_argument("--split", default="auto", metavar="RULE", help="auto, ett, A:B:C shares or A,B,C rows")
    group.add_argument("--columns", metavar="NAMES", help="channels to use, a,b,c; all by default")
    group.add_argument("--date-column", metavar="NAME", help="column of the dates, found by default")
    group.add_argument("--freq", choices=tuple(MARKS_OF), help="marks to make; by default those of the data's step")
    group.add_argument("--loss", choices=tuple(LOSSES), help="what training minimises")


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    share, positive, at_least_0 = _number(float, 0, 1), _number(float, 0, open_low=True), _number(float, 0)
    presets = tuple(dict.fromkeys(name for kind in KINDS.values() for name, _ in kind.presets))
    group = parser.add_argument_group("recipe (defaults: the preset's)")
    group.add_argument("--preset", choices=("auto", *presets), default="auto", help="auto: by data and model")
    group.add_argument("--epochs", type=_COUNT, metavar="N")
    group.add_argument("--batch-size", type=_COUNT, metavar="N", help="items of a step, per process")
    group.add_argument("--accumulate", type=_COUNT, default=1, metavar="N", help="steps of an update")
    group.add_argument("--lr", type=positive, help="peak learning rate")
    group.add_argument(
        "--schedule", choices=tuple(SCHEDULES), help="of the learning rate (cosine: to 1 %% of the peak)"
    )
    group.add_argument("--warmup", type=at_least_0, metavar="EPOCHS", help="epochs of warm-up")
    group.add_argument("--patience", type=_COUNT, metavar="N", help="stop after N epochs without a better one")
    group.add_argument("--layer-decay", type=_number(float, 0, 1.0000001, open_low=True), metavar="D", help="see below")
    group.add_argument("--optimizer", metavar="NAME", help="any of timm.optim.list_optimizers()")
    group.add_argument("--weight-decay", type=at_least_0, metavar="X")
    group.add_argument("--grad-clip", type=at_least_0, metavar="NORM", help="largest norm of the gradient; 0: no limit")
    group.add_argument("--drop-path", type=share, metavar="P", help="rate of dropped branches in the last block")
    group.add_argument("--mixup", type=at_least_0, metavar="ALPHA", help="of images; 0: off")
    group.add_argument("--cutmix", type=at_least_0, metavar="ALPHA", help="of images; 0: off")
    group.add_argument("--smoothing", type=share, metavar="P", help="label smoothing")
    group.add_argument("--ema", type=share, metavar="DECAY", help="average the weights, e.g. 0.999; 0: off")
    group.add_argument("--seed", type=_number(int, 0), default=0, metavar="N", help="of everything random (0)")
    group.add_argument("--repeat", type=_COUNT, metavar="N", help="N runs with seeds from --seed on, and their mean")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output", metavar="DIR", help="folder of the run, default runs/MODEL-DATA")
    group.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    group.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    group.add_argument("--workers", type=_number(int, 0), default=0, metavar="N", help="processes that load data (0)")
    group.add_argument("--precision", choices=("auto", "no", "bf16", "fp16"), default="auto", help="auto: bf16 on CUDA")
    group.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    group.add_argument("--compile", action="store_true", help="compile the model by torch.compile")
    group.add_argument("--plot", action="store_true", help="draw curves.png")
    group.add_argument("--per-class", action="store_true", help="report the result of every class or channel")


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The device, the processes and the precision of the run.

    Raises:
        ValueError: a precision the device lacks, or sharded training.
    """
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if not args.cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    if precision == "fp16" and (args.cpu or not torch.cuda.is_available()):
        raise ValueError("--precision fp16 needs a GPU; use bf16 or no")
    late_gradients = DistributedDataParallelKwargs(find_unused_parameters=args.unfreeze_after is not None)
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=args.cpu,
        gradient_accumulation_steps=args.accumulate,
        kwargs_handlers=[late_gradients],
    )
    if accelerator.distributed_type not in _WITHOUT_SHARDS:
        raise ValueError(f"{accelerator.distributed_type.value} is not supported: launch one process or data parallel")
    return accelerator


def kind_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Kind:
    """The task: what was asked for, or what the model is for.

    Raises:
        ValueError: a model for other inputs, a preset or an option of another task.
    """
    modality = modality_of(args.model)
    name = args.task or next(name for name, kind in KINDS.items() if kind.modality == modality)
    kind = KINDS[name]
    if kind.modality != modality:
        takes = next(other.inputs for other in KINDS.values() if other.modality == modality)
        raise ValueError(f"--task {name}: MODEL {args.model} takes {takes}, not {kind.inputs}")
    if args.preset != "auto" and args.preset not in {preset for preset, _ in kind.presets}:
        known = ", ".join(dict.fromkeys(preset for preset, _ in kind.presets))
        raise ValueError(f"--preset {args.preset} is not one of --task {name}: {known}")
    for option in frozenset().union(*(other.options for other in KINDS.values())) - kind.options:
        if getattr(args, option) != parser.get_default(option):
            raise ValueError(f"--{option.replace('_', '-')} is no option of --task {name}")
    return kind


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 (training failed), 2 (nothing started) or 130 (stopped by the user)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.img_size and len(args.img_size) > 2:
            raise ValueError(f"--img-size takes H, or H W; got {len(args.img_size)} values")
        if args.optimizer and args.optimizer not in list_optimizers():
            raise ValueError(f"--optimizer {args.optimizer}: timm has none of that name, e.g. adamw, lamb, sgd, nadamw")
        kind = kind_of(args, parser)
        check_arguments(args)
        accelerator = make_accelerator(args)
        parts = _parts(args)
        prepared = _prepare(parts[0], kind, accelerator, first=True)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    try:
        return _run_all(parts, argv, kind, accelerator, prepared)
    except (TrainingError, OSError) as error:
        print(f"mixzoo finetune: {(str(error).splitlines() or [type(error).__name__])[-1]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mixzoo finetune: stopped at once; last.pt is as the last epoch left it", file=sys.stderr)
        return _INTERRUPTED


def _parts(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of every run: one, or one for each seed and fold."""
    seeds = range(args.seed, args.seed + (args.repeat or 1))
    folds = range(args.folds) if args.folds else (None,)
    return [argparse.Namespace(**vars(args) | {"seed": seed, "fold": fold}) for seed in seeds for fold in folds]


def _prepare(
    args: argparse.Namespace, kind: Kind, accelerator: Accelerator, *, first: bool
) -> tuple[Plan, Mapping[str, Any] | None]:
    """The plan of a run and the state to go on from."""
    set_seed(args.seed)
    # the first process downloads what the others then find
    with accelerator.main_process_first():
        plan = kind.plan(args, (accelerator.num_processes, accelerator.mixed_precision))
    # of several runs those that were not begun start now
    resume = args.resume and (first or plan.folder.last.is_file())
    plan.folder.check(plan.described, resume=resume, overwrite=args.overwrite)
    return plan, plan.folder.read_state() if resume else None


def _next(args: argparse.Namespace, kind: Kind, accelerator: Accelerator) -> tuple[Plan, Any]:
    """`_prepare` when runs have been going on."""
    try:
        return _prepare(args, kind, accelerator, first=False)
    except ValueError as error:
        raise TrainingError(str(error)) from None


def _run_all(
    parts: Sequence[argparse.Namespace],
    argv: Sequence[str],
    kind: Kind,
    accelerator: Accelerator,
    first: tuple[Plan, Any],
) -> int:
    """The run, or several and then what they give together."""
    plans, outcomes = [], []
    for number, args in enumerate(parts):
        plan, state = first if number == 0 else _next(args, kind, accelerator)
        outcome = _run(args, argv, plan, accelerator, state)
        if outcome is None:
            return _INTERRUPTED
        plans.append(plan)
        outcomes.append(outcome)
        accelerator.free_memory()
    if len(parts) > 1 and accelerator.is_main_process:
        print(f"\n{kind.pool(plans, outcomes)}")
    return 0


def _run(
    args: argparse.Namespace, argv: Sequence[str], plan: Plan, accelerator: Accelerator, state: Mapping[str, Any] | None
) -> Outcome | None:
    """Train, measure and report; None if the user stopped it."""
    trainer = Trainer(plan.task, plan.loaders, plan.net, plan.loop, accelerator, plan.folder)
    if state is not None:
        trainer.load_state_dict(state)
    accelerator.print(_describe(plan, accelerator, trainer))
    accelerator.wait_for_everyone()
    if state is None and accelerator.is_main_process:
        plan.folder.claim(plan.described)
    accelerator.wait_for_everyone()
    started = time.perf_counter()
    if not trainer.fit():
        kept = [argument for argument in argv if argument not in ("--resume", "--overwrite")]
        again = shlex.join(["mixzoo", "finetune", *kept, "--resume"])
        where = f"epoch {trainer.epoch + 1}, step {trainer.step} of {trainer.steps_per_epoch}"
        accelerator.print(f"stopped in {where}; saved {plan.folder.last}\ngo on with: {again}")
        return None
    return _report(args, plan, accelerator, trainer, time.perf_counter() - started)


def _describe(plan: Plan, accelerator: Accelerator, trainer: Trainer) -> str:
    """What is about to be trained, in a few lines."""
    net, loop = plan.net, plan.loop
    parameters = sum(p.numel() for p in net.parameters())
    fixed = parameters - sum(p.numel() for p in trainer.trainable)
    model = [f"{parameters / 1e6:.2f} M parameters" if parameters >= 1e6 else f"{parameters:,} parameters"]
    model += [f"{fixed / 1e6:.2f} M of them fixed"] if fixed else []
    model += (
        [f"training {sum(p.numel() for p in net.get_classifier().parameters()):,} of the head"] if loop.freeze else []
    )
    lines = {
        "model": f"{plan.described['model']}, {'weights given' if plan.start == 'tuned' else 'from scratch'}, "
        + ", ".join(model),
        **plan.lines,
        "recipe": f"preset {plan.preset} ({plan.start}): {loop.epochs} epochs of {trainer.steps_per_epoch} steps of "
        f"{plan.loaders.batch_size} {plan.task.items}, {loop.optimizer}, lr {loop.lr:.2g}, seed {loop.seed}",
        "device": f"{accelerator.device}, {accelerator.num_processes} process(es), "
        f"precision {accelerator.mixed_precision}",
        "output": str(plan.folder.path),
    }
    return "\n".join(f"{title:<8}{text}" for title, text in lines.items())


def _report(
    args: argparse.Namespace, plan: Plan, accelerator: Accelerator, trainer: Trainer, seconds: float
) -> Outcome:
    """Measure the file that was saved and tell the result."""
    best = mixzoo.load(plan.folder.best).to(accelerator.device)
    outcome = Outcome(trainer, best, trainer.measure(best, trainer.test_loader or trainer.val_loader))
    if accelerator.is_main_process:
        print(f"\n{plan.report(outcome)}")
        items = plan.task.items
        rate = trainer.history[-1][f"{items}_per_second"]
        print(f"{seconds:.0f} s in this session, {rate:.0f} {items}/s in training; log: {plan.folder.log}")
        if args.plot:
            draw_curves(trainer.history, plan.curves, plan.folder.curves)
            print(f"curves: {plan.folder.curves}")
        print(f"use it: mixzoo.load({str(plan.folder.best)!r})")
    return outcome


def draw_curves(history: Sequence[Mapping[str, float]], curves: Sequence[tuple[str, str]], path: Path) -> None:
    """The named values of the log over the epochs, one picture for each, as an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(curves), 3.5), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axis, (name, label) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        for split in ("train", "val"):
            if f"{split}_{name}" in history[0]:
                axis.plot(epochs, [row[f"{split}_{name}"] for row in history], marker=".", label=split)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
