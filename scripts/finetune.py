"""Train an image classifier on your data: from scratch, from released weights, or on from a model of your own.

    mixzoo finetune poolformerv2_s12 --data digits
    mixzoo finetune caformer_s18 --pretrained --data photos
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
from torch import Tensor

import mixzoo

from . import _presets
from ._classification import Classification, make_loaders, per_class
from ._data import DIGITS
from ._plan import Plan, check_arguments, make_plan
from ._training import Trainer, TrainingError

_INTERRUPTED = 130
_WITHOUT_SHARDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

_DATA_HELP = """\
DATA
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


def build_parser() -> argparse.ArgumentParser:
    """All options of the command."""
    parser = argparse.ArgumentParser(
        prog="mixzoo finetune",
        description=__doc__,
        epilog=_DATA_HELP + _presets.table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(parser)
    _add_recipe_options(parser)
    _add_run_options(parser)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    count = _number(int, 1)
    group = parser.add_argument_group("model and data")
    group.add_argument("model", metavar="MODEL", help="a name of the zoo, or a .safetensors file that mixzoo saved")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="FILE", help="start from these weights; head and input adapt")
    weights.add_argument("--pretrained", action="store_true", help="start from the released weights (download)")
    group.add_argument("--data", default=DIGITS, metavar="DATA", help="what to train on, see below")
    group.add_argument("--data-dir", metavar="DIR", help='files of torch/NAME ("data") or cache of hfds/NAME')
    group.add_argument("--download", action="store_true", help="fetch torch/NAME if it is not there")
    group.add_argument(
        "--token-mixer", metavar="SPEC", help="swap the mixers: a name, names per stage a,b,c,d, or JSON"
    )
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another option of the model")
    group.add_argument("--img-size", type=count, nargs="+", metavar="PIXELS", help="input size: H, or H W")
    group.add_argument("--stem", choices=("auto", "patch", "small"), help="first convolution, see below")
    group.add_argument("--in-chans", type=int, choices=(1, 3), help="channels; from scratch those of the data, else 3")
    group.add_argument("--num-classes", type=count, metavar="N", help="outputs, if more than the classes of the data")
    group.add_argument("--freeze", action="store_true", help="train the head alone")
    group.add_argument("--unfreeze-after", type=count, metavar="EPOCH", help="train everything after this epoch")


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    share, positive, at_least_0 = _number(float, 0, 1), _number(float, 0, open_low=True), _number(float, 0)
    group = parser.add_argument_group("recipe (defaults: the preset's)")
    group.add_argument("--preset", choices=("auto", *_presets.NAMES), default="auto", help="auto: by the data")
    group.add_argument("--epochs", type=_number(int, 1), metavar="N")
    group.add_argument("--batch-size", type=_number(int, 1), metavar="N", help="images of a step, per process")
    group.add_argument("--accumulate", type=_number(int, 1), default=1, metavar="N", help="steps of an update")
    group.add_argument("--lr", type=positive, help="peak learning rate; a cosine takes it to 1 %% of that")
    group.add_argument("--warmup", type=at_least_0, metavar="EPOCHS", help="epochs of linear warm-up")
    group.add_argument("--layer-decay", type=_number(float, 0, 1.0000001, open_low=True), metavar="D", help="see below")
    group.add_argument("--optimizer", metavar="NAME", help="any of timm.optim.list_optimizers()")
    group.add_argument("--weight-decay", type=at_least_0, metavar="X")
    group.add_argument("--grad-clip", type=at_least_0, metavar="NORM", help="largest norm of the gradient; 0: no limit")
    group.add_argument("--drop-path", type=share, metavar="P", help="rate of dropped branches in the last block")
    group.add_argument("--mixup", type=at_least_0, metavar="ALPHA", help="0: off")
    group.add_argument("--cutmix", type=at_least_0, metavar="ALPHA", help="0: off")
    group.add_argument("--smoothing", type=share, metavar="P", help="label smoothing")
    group.add_argument("--ema", type=share, metavar="DECAY", help="average the weights, e.g. 0.999; 0: off")
    group.add_argument("--seed", type=_number(int, 0), default=0, metavar="N", help="of everything random (0)")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output", metavar="DIR", help="folder of the run, default runs/MODEL-DATA")
    group.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    group.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    group.add_argument("--workers", type=_number(int, 0), default=0, metavar="N", help="processes that load images (0)")
    group.add_argument("--precision", choices=("auto", "no", "bf16", "fp16"), default="auto", help="auto: bf16 on CUDA")
    group.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    group.add_argument("--compile", action="store_true", help="compile the model by torch.compile")
    group.add_argument("--plot", action="store_true", help="draw curves.png")
    group.add_argument("--per-class", action="store_true", help="report the accuracy of every class")


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
        check_arguments(args)
        accelerator = make_accelerator(args)
        set_seed(args.seed)
        # the first process downloads what the others then find
        with accelerator.main_process_first():
            plan = make_plan(args, accelerator.num_processes, accelerator.mixed_precision)
        plan.folder.check(plan.described, resume=args.resume, overwrite=args.overwrite)
        state = plan.folder.read_state() if args.resume else None
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    try:
        return _run(args, argv, plan, accelerator, state)
    except (TrainingError, OSError) as error:
        print(f"mixzoo finetune: {(str(error).splitlines() or [type(error).__name__])[-1]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mixzoo finetune: stopped at once; last.pt is as the last epoch left it", file=sys.stderr)
        return _INTERRUPTED


def _run(
    args: argparse.Namespace, argv: Sequence[str], plan: Plan, accelerator: Accelerator, state: Mapping[str, Any] | None
) -> int:
    recipe = plan.recipe
    task = Classification(plan.net.num_classes, mixup=recipe.mixup, cutmix=recipe.cutmix, smoothing=recipe.smoothing)
    loaders = make_loaders(
        plan.data,
        plan.pixels,
        recipe.augmentation,
        batch_size=recipe.batch_size,
        workers=args.workers,
        seed=args.seed,
        processes=accelerator.num_processes,
    )
    trainer = Trainer(task, loaders, plan.net, plan.loop, accelerator, plan.folder)
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
        return _INTERRUPTED
    _report(args, plan, accelerator, trainer, time.perf_counter() - started)
    return 0


def _describe(plan: Plan, accelerator: Accelerator, trainer: Trainer) -> str:
    """What is about to be trained, in a few lines."""
    net, data, loop, pixels = plan.net, plan.data, plan.loop, plan.pixels
    parameters = sum(p.numel() for p in net.parameters())
    fixed = parameters - sum(p.numel() for p in trainer.trainable)
    model = [f"{parameters / 1e6:.2f} M parameters"]
    model += [f"{fixed / 1e6:.2f} M of them fixed"] if fixed else []
    model += [f"training {sum(p.numel() for p in net.get_classifier().parameters()):,} of the head"] * loop.freeze
    splits = [f"train {len(data.train)}", f"{data.val_name} {len(data.val)}"]
    splits += [f"test {len(data.test)}"] if data.test is not None else []
    lines = {
        "model": f"{plan.described['model']}, {'weights given' if plan.start == 'tuned' else 'from scratch'}, "
        + ", ".join(model),
        "data": f"{data.name}: {len(data.class_names)} classes, {', '.join(splits)}" + (data.note and f"; {data.note}"),
        "input": f"{pixels.channels} x {pixels.size[0]} x {pixels.size[1]} from {data.size[0]} x {data.size[1]}",
        "recipe": f"preset {plan.preset} ({plan.start}): {loop.epochs} epochs of {trainer.steps_per_epoch} steps of "
        f"{plan.recipe.batch_size} images, {loop.optimizer}, lr {loop.lr:.2g}",
        "device": f"{accelerator.device}, {accelerator.num_processes} process(es), "
        f"precision {accelerator.mixed_precision}",
        "output": str(plan.folder.path),
    }
    return "\n".join(f"{title:<8}{text}" for title, text in lines.items())


def _report(args: argparse.Namespace, plan: Plan, accelerator: Accelerator, trainer: Trainer, seconds: float) -> None:
    """Measure the file that was saved and tell the result."""
    data, task = plan.data, trainer.task
    best = mixzoo.load(plan.folder.best).to(accelerator.device)
    loader = trainer.test_loader if data.test is not None else trainer.val_loader
    measured = trainer.measure(best, loader)
    if not accelerator.is_main_process:
        return
    name = data.val_name if data.test is None else "test"
    print(f"\n{name} accuracy of {plan.folder.best}: {task.describe(task.summarize(measured))}")
    chosen = f"epoch {trainer.best[1]}, the best one on {data.val_name}"
    if data.test is None:
        chosen += f", the same images; the last epoch has {trainer.history[-1]['val_top1']:.2f} %"
    print(f"({chosen})")
    if args.per_class:
        _print_classes(measured, data.class_names)
    rate = trainer.history[-1]["images_per_second"]
    print(f"{seconds:.0f} s in this session, {rate:.0f} images/s in training; log: {plan.folder.log}")
    if args.plot:
        draw_curves(trainer.history, plan.folder.curves)
        print(f"curves: {plan.folder.curves}")
    print(f"use it: mixzoo.load({str(plan.folder.best)!r})")


def _print_classes(measured: Mapping[str, Tensor], names: list[str]) -> None:
    rows = per_class(measured, names)
    width = max(len(name) for name, _, _ in rows)
    print("\n".join(f"  {name:<{width}}  {accuracy:6.2f} %  of {count}" for name, count, accuracy in rows))


def draw_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss and accuracy over the epochs as an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axis, name, label in zip(figure.subplots(1, 2), ("loss", "top1"), ("loss", "top-1 accuracy / %"), strict=True):
        for split in ("train", "val"):
            axis.plot(epochs, [row[f"{split}_{name}"] for row in history], marker=".", label=split)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
