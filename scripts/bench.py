"""Speed and memory of models, beside an opponent and beside a matrix product measured in the same run.

    mixzoo bench poolformer_s12 caformer_s18 --against timm
    mixzoo bench "poolformerv2_*" --train --batch-size 8 --against timm:resnet50 --format markdown
    mixzoo bench metaformer_s12 --token-mixer pooling,pooling,attention,attention --against poolformer_s12
    mixzoo bench lra_ponet_text --seq-len 512 --against lra_softmax_text

A model, its opponents and a 2048^3 matrix product take turns in every round. Figures are medians over rounds; `ratio`
is the opponent's time over the model's, above 1 where the model is faster, with its range over rounds; `memory` is the
opponent's peak over the model's. An opponent from timm runs in both memory formats, NCHW contiguous and channels_last;
the faster one counts in the closing geometric mean. Texts and series take the place of images in models of these; such
models are measured at their own lengths, texts also at others. GFLOP/s are 2 MACs an image over the time, three times
that for a training step; MACs are those of matrix products and convolutions. A ratio r against timm:resnet50 times a
published ratio q of another implementation's time to resnet50's gives the speed-up r q over that implementation.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixzoo.scripts import _measure, _tables
from mixzoo.scripts._bench_results import Comparison, Row, plot, render
from mixzoo.scripts._measure import FAILURES, TIMM_PREFIX, Contestant

DTYPES = ("float32", "bfloat16", "float16")
SUFFIXES = {".md": "markdown", ".csv": "csv", ".json": "json"}
MATMUL = "matmul"


def compare(contestant: Contestant, against: Sequence[str], args: argparse.Namespace) -> Comparison:
    """Measure one model and its opponents."""
    entries = [(None, contestant), *_opponents(contestant, against)]
    labels = [f"{opponent}/{c.name}/{c.memory_format}" for opponent, c in entries]
    step_kind = "training" if contestant.train else "inference"
    rows, steps, parts = {}, {}, []
    for label, (opponent, c) in zip(labels, entries, strict=True):
        row = rows[label] = Row(contestant.name, c.name, opponent, c.memory_format, c.batch_size, step_kind)
        try:
            if args.memory:
                _add_peak(row, c)
            model, x = _measure.build(c)
            row.size = "x".join(map(str, x.shape[1:]))
            row.gmacs, by_part = _gmacs(model, x)
            if args.stages and opponent is None:
                parts = _part_rows(c, model, x, by_part, args.rounds)
            steps[label] = _measure.make_step(model, x, train=c.train, compile=c.compile)
        except FAILURES as error:
            row.note = _measure.describe(error)
    if labels[0] in steps:
        steps[MATMUL] = _measure.matmul_step(contestant.device, contestant.dtype)
        _race(rows, steps, contestant.device, args)
    if "timm" in against and not any(row.opponent == "timm" for row in rows.values()):
        rows[labels[0]].add_note("not in timm")
    steps.clear()
    _measure.release(contestant.device)
    return Comparison(list(rows.values()), parts)


def _race(rows: dict[str, Row], steps: dict[str, _measure.Step], device: str, args: argparse.Namespace) -> None:
    times, failures = _measure.interleave(steps, device=device, rounds=args.rounds, budget_s=args.budget)
    first, *others = rows
    for label, failure in failures.items():
        if label in rows:
            rows[label].note = failure
    for label in set(rows) & set(times):
        rows[label].add_times(times[label], times.get(MATMUL, []))
    for label in others:
        if label in times and first in times:
            rows[label].add_ratios(rows[first], times[label], times[first])


def _opponents(contestant: Contestant, against: Sequence[str]) -> list[tuple[str, Contestant]]:
    """Pairs of what the user asked to compare with and the contestant it stands for."""
    base, found = replace(contestant, token_mixer=None), []
    for opponent in against:
        target = opponent
        if opponent == "timm":
            target = TIMM_PREFIX + contestant.name.split(".")[0]
            if contestant.is_timm or not _timm_owns(target.removeprefix(TIMM_PREFIX)):
                continue
        formats = (False, True) if target.startswith(TIMM_PREFIX) else (False,)
        found += [(opponent, replace(base, name=target, channels_last=last)) for last in formats]
    return found


def _timm_owns(arch: str) -> bool:
    """Whether timm itself has a model of that name; this library's models stand in timm's registry too."""
    import timm

    return timm.is_model(arch) and timm.models.model_entrypoint(arch).__module__.startswith("timm.")


def _add_peak(row: Row, contestant: Contestant) -> None:
    memory = _measure.peak_memory(contestant)
    if isinstance(memory, str):
        row.note = memory
    else:
        row.peak_mib = memory.mib


def _gmacs(model: nn.Module, x: Tensor) -> tuple[float, dict[str, float]]:
    """10^9 multiply-adds of matrix products and convolutions for one sample, in all and by module."""
    import mixzoo

    counted = mixzoo.complexity(model, inputs=(x[:1], *_measure.other_inputs(model, x[:1]).values()))
    return counted.macs / 1e9, {name: counts.macs / 1e9 for name, counts in counted.by_module.items()}


def _part_rows(
    contestant: Contestant, model: nn.Module, x: Tensor, gmacs: dict[str, float], rounds: int
) -> list[dict[str, Any]]:
    seconds = _measure.part_times(model, x, device=contestant.device, rounds=rounds)
    total = sum(seconds.values())
    return [
        {
            "model": contestant.name,
            "part": part,
            "ms": 1e3 * s,
            "share": s / total,
            "gmacs": gmacs.get(part),
            "gflops": 2 * gmacs[part] * contestant.batch_size / s if part in gmacs else None,
        }
        for part, s in seconds.items()
    ]


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on besides the models."""
    import timm

    device = torch.device(args.device)
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": args.device,
        "dtype": args.dtype,
        "step": "training" if args.train else "inference",
        "compiled": args.compile,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def select_models(patterns: Sequence[str]) -> list[str]:
    """Expand globs over the registered models and check plain names; order and first mention are kept.

    Raises:
        ValueError: a name or pattern that fits nothing.
    """
    import timm

    import mixzoo
    from mixzoo.models._registry import resolve_name

    names: list[str] = []
    for pattern in patterns:
        if pattern.startswith(TIMM_PREFIX):
            arch = pattern.removeprefix(TIMM_PREFIX).split(".")[0]
            if not timm.is_model(arch):
                close = difflib.get_close_matches(arch, timm.list_models(), n=3)
                raise ValueError(
                    f"timm has no model {arch!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")
                )
            names.append(pattern)
        elif any(wildcard in pattern for wildcard in "*?["):
            matches = mixzoo.list_models(pattern)
            if not matches:
                raise ValueError(f"no registered model fits {pattern!r}")
            names += matches
        else:
            resolve_name(pattern)
            names.append(pattern)
    return list(dict.fromkeys(names))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Arguments of ``mixzoo bench``."""
    parser = argparse.ArgumentParser(
        prog="mixzoo bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name, glob over registered names, or timm:NAME")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="OPPONENT",
        help="timm (its model of the same name), timm:NAME, or another model; may be repeated",
    )
    parser.add_argument(
        "--token-mixer", metavar="SPEC", help="swap the token mixers of MODEL: a name, one per stage, JSON"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and input (default: float32)")
    parser.add_argument("--compile", action="store_true", help="torch.compile every contestant")
    parser.add_argument("--train", action="store_true", help="forward and backward instead of inference")
    parser.add_argument("--batch-size", type=_positive, default=16, help="images a step (default: 16)")
    parser.add_argument(
        "--img-size",
        type=_positive,
        nargs="+",
        metavar=("H", "W"),
        help="default: the size the model was published for",
    )
    parser.add_argument(
        "--seq-len", type=_positive, metavar="N", help="tokens of a text (default: as many as the model takes)"
    )
    parser.add_argument("--rounds", type=_positive, default=7, help="(default: 7)")
    parser.add_argument(
        "--budget",
        type=float,
        default=120.0,
        metavar="S",
        help=f"seconds of rounds a model, {_measure.MIN_ROUNDS} rounds at least (default: 120)",
    )
    parser.add_argument("--threads", type=_positive, help="torch threads (default: torch's choice)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip peak memory")
    parser.add_argument("--stages", action="store_true", help="time of each part of MODEL within a forward pass")
    parser.add_argument("--format", choices=_tables.FORMATS, help="default: by the suffix of --output, else text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to standard output")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="time an image over MACs, needs mixzoo[plots]")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Everything that can be wrong with the arguments, before anything is measured.

    Raises:
        ValueError, TypeError: with one line for the user.
    """
    import mixzoo
    from mixzoo.mixers import parse_spec
    from mixzoo.models._registry import resolve_name

    args.models = select_models(args.models)
    args.against = list(dict.fromkeys(args.against))
    for opponent in args.against:
        if opponent != "timm":
            select_models([opponent])
    sized = [name for name in args.models if not name.startswith(TIMM_PREFIX)]
    for option, given, modality in (("--img-size", args.img_size, "image"), ("--seq-len", args.seq_len, "text")):
        other = next((name for name in sized if resolve_name(name)[0].modality != modality), None)
        if given is not None and other is not None:
            raise ValueError(f"{option} is for models of {modality}s, which {other} is not")
    if args.img_size is not None:
        if len(args.img_size) > 2:
            raise ValueError(f"--img-size takes H or H W, not {len(args.img_size)} numbers")
        args.img_size = (args.img_size[0], args.img_size[-1])
    if args.token_mixer is not None:
        args.token_mixer = parse_spec(args.token_mixer)
        for name in args.models:
            if not name.startswith(TIMM_PREFIX):
                mixzoo.create_model(name, token_mixer=args.token_mixer, device="meta")
    if args.stages and (args.train or args.compile):
        raise ValueError("--stages times an eager forward pass; leave out --train and --compile")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'mixzoo[plots]'")
    for path in filter(None, [args.output, args.plot]):
        if not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        _check(args)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    comparisons = []
    for position, name in enumerate(args.models, 1):
        print(f"[{position}/{len(args.models)}] {name}", file=sys.stderr, flush=True)
        contestant = Contestant(
            name,
            batch_size=args.batch_size,
            img_size=args.img_size or _measure.published_size(name),
            seq_len=args.seq_len,
            token_mixer=None if name.startswith(TIMM_PREFIX) else args.token_mixer,
            device=args.device,
            dtype=args.dtype,
            train=args.train,
            compile=args.compile,
            threads=args.threads,
        )
        comparisons.append(compare(contestant, args.against, args))
    form = args.format or SUFFIXES.get(args.output.suffix if args.output else "", "text")
    text = render(comparisons, environment(args), form)
    if args.output:
        args.output.write_text(text + "\n")
    else:
        print(text)
    rows = [row for comparison in comparisons for row in comparison.rows]
    if args.plot:
        plot(rows, args.plot)
    return 0 if any(row.ms is not None for row in rows) else 1
