"""``mixzoo report``: size and cost of models beside the published figures.

    mixzoo report "poolformer*" "caformer_s18"
    mixzoo report caformer_s18 --by operator
    mixzoo report --format markdown --output report.md --plot accuracy.png

Multiply-adds (MACs) are of matrix products and convolutions for one image; transforms (FFT, wavelets, scans), norms and
other operations stand in columns of their own. Nothing is dropped: an operator without a rule is named in the notes.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mixzoo import complexity, create_model, list_models
from mixzoo.mixers import parse_spec
from mixzoo.models import Complexity
from mixzoo.models._registry import MODELS, Release, releases_of, resolve_name

from ._tables import FORMATS, RENDER, Column


def _figure(digits: int) -> Any:
    return lambda value: f"{value:.{digits}f}"


COLUMNS = [
    Column("model", "model", left=True),
    Column("input", "input"),
    Column("params_m", "params M", _figure(2)),
    Column("frozen_m", "frozen M", _figure(2)),
    Column("gmacs", "GMACs", _figure(3)),
    Column("transform_gmacs", "transform GMACs", _figure(3)),
    Column("norm_gops", "norm Gops", _figure(3)),
    Column("other_gops", "other Gops", _figure(3)),
    Column("activations_m", "activations M", _figure(1)),
    Column("published_params_m", "published params M", "{:g}".format),
    Column("published_gmacs", "published GMACs", "{:g}".format),
    Column("published_top1", "top-1 %", _figure(1)),
    Column("difference", "difference", "{:+.1%}".format),
    Column("note", "note", left=True),
]


def _same_as_printed(value: float, published: float) -> bool:
    """Whether ``value`` rounds, or cuts, to the published figure at the digits it is printed with."""
    digits = len(f"{published:g}".partition(".")[2])
    unit = 10.0**-digits
    return abs(value - published) <= unit / 2 + 1e-9 or math.isclose(math.floor(value / unit) * unit, published)


def compare(counted: Complexity, release: Release) -> tuple[float | None, list[str]]:
    """Relative difference to the published multiply-adds, by the rule they were counted with, and notes."""
    notes = [release.note] if release.note else []
    images = counted.input_shapes[0][0]
    trained = (counted.parameters - counted.frozen) / 1e6
    if release.params_m is not None and not _same_as_printed(trained, release.params_m):
        notes.append(f"{trained:.2f} M trained parameters, published {release.params_m:g}")
    if release.gmacs is None:
        return None, notes
    if counted.input_shapes[0][2:] != release.input_size[1:]:
        return None, [*notes, f"published at {release.input_size[1]} x {release.input_size[2]}"]
    columns = {"matmul": counted.macs, "matmul+norm": counted.macs + counted.norm_ops}
    gmacs = columns[release.macs_rule] / images / 1e9
    if release.macs_rule == "matmul+norm":
        notes.append(f"published with norms: {gmacs:.3f} with ours")
    if not _same_as_printed(gmacs, release.gmacs):
        others = [rule for rule, macs in columns.items() if _same_as_printed(macs / images / 1e9, release.gmacs)]
        reason = f"the published figure fits the rule {others[0]!r}" if others else "no rule of ours gives it"
        notes.append(f"{gmacs:.3f} G by the rule {release.macs_rule!r}, published {release.gmacs:g}: {reason}")
    return gmacs / release.gmacs - 1, notes


def count_model(name: str, img_size: Sequence[int] | None = None, token_mixer: Any = None) -> tuple[dict, Complexity]:
    """One row of the report, and the counts behind it.

    Args:
        name: ``arch`` (with its default release), ``arch.tag``, or an alias.
        img_size: (H, W) in pixels; by default the size of the release.
        token_mixer: swapped mixers, which leave no published figures to compare with.
    """
    spec, tagged = resolve_name(name)
    release = releases_of(spec.name)[tagged] if tagged else Release()
    size = tuple(img_size or release.input_size[1:])
    with torch.device("meta"):
        model = create_model(tagged or name, token_mixer=token_mixer, img_size=size)
    counted = complexity(model, size)
    swapped = token_mixer is not None
    difference, notes = (None, ["swapped mixers"]) if swapped else compare(counted, release)
    if spec.note:
        notes.append(spec.note)
    if counted.uncounted:
        notes.append("NOT COUNTED: " + ", ".join(f"{op} x{calls}" for op, calls in counted.uncounted.items()))
    row = {
        "model": name,
        "input": "x".join(map(str, size)),
        "params_m": counted.parameters / 1e6,
        "frozen_m": counted.frozen / 1e6 if counted.frozen else None,
        "gmacs": counted.macs / 1e9,
        "transform_gmacs": counted.transform_macs / 1e9 if counted.transform_macs else None,
        "norm_gops": counted.norm_ops / 1e9,
        "other_gops": counted.other_ops / 1e9,
        "activations_m": counted.activations / 1e6,
        "published_params_m": None if swapped else release.params_m,
        "published_gmacs": None if swapped else release.gmacs,
        "published_top1": None if swapped else release.top1,
        "difference": difference,
        "note": "; ".join(notes),
    }
    return row, counted


def select(filters: Sequence[str], all_tags: bool) -> list[str]:
    """Names of image models that the filters match: architectures, or every release of them.

    Raises:
        ValueError: a filter matches nothing.
    """
    names: dict[str, None] = {}
    for pattern in filters or ["*"]:
        matched = list_models(pattern, modality="image")
        if not matched:
            spec, tagged = resolve_name(pattern)  # raises, with the nearest names
            matched = [tagged if "." in pattern or pattern not in MODELS else spec.name]
        for name in matched:
            names.update(dict.fromkeys((all_tags and list(releases_of(name))) or [name]))
    return list(names)


def _breakdown(counted: Complexity, by: str, depth: int) -> tuple[list[Column], list[dict]]:
    """Rows of ``--by module`` or ``--by operator``, with the shares of all multiply-adds."""
    table: Mapping[str, Mapping[str, int]] = counted.by_operator if by == "operator" else counted.by_module
    columns = [
        Column("name", by, left=True),
        Column("gmacs", "GMACs", _figure(4)),
        Column("share", "share", "{:.1%}".format),
        Column("transform_gmacs", "transform GMACs", _figure(4)),
        Column("norm_gops", "norm Gops", _figure(4)),
        Column("other_gops", "other Gops", _figure(4)),
        Column("activations_m", "activations M", _figure(2)),
    ]
    rows = [
        {
            "name": name or "(model)",
            "gmacs": counts["matmul"] / 1e9,
            "share": counts["matmul"] / max(counted.macs, 1),
            "transform_gmacs": counts["transform"] / 1e9,
            "norm_gops": counts["norm"] / 1e9,
            "other_gops": counts["other"] / 1e9,
            "activations_m": counts["activations"] / 1e6,
        }
        for name, counts in table.items()
        if by == "operator" or not name or name.count(".") < depth
    ]
    rows += [{"name": f"NOT COUNTED {operator} x{calls}"} for operator, calls in counted.uncounted.items()]
    return columns, rows


def plot(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Published top-1 accuracy against counted multiply-adds, one colour a family, as a PNG.

    Raises:
        ValueError: no row has a published accuracy. ImportError: matplotlib is missing.
    """
    rows = [row for row in rows if row["published_top1"] is not None]
    if not rows:
        raise ValueError("--plot: none of these models has a published accuracy")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install 'mixzoo[plots]'") from None

    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["model"].rpartition("_")[0], []).append(row)
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.add_subplot()
    for family, members in families.items():
        members = sorted(members, key=lambda row: row["gmacs"])
        axes.plot([r["gmacs"] for r in members], [r["published_top1"] for r in members], "o-", label=family, lw=1)
        for row in members:
            label = row["model"].partition(".")[0].rpartition("_")[2]
            axes.annotate(label, (row["gmacs"], row["published_top1"]), (4, -9), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="multiply-adds, G (matrix products and convolutions)", ylabel="ImageNet-1k top-1, %")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    with _replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


class _replacing:
    """A temporary file beside ``path`` that takes its place when the block ends well, and goes otherwise."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.temporary.chmod(0o644)
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="mixzoo report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("filters", nargs="*", metavar="FILTER", help="names or shell patterns (default: all models)")
    parser.add_argument("--all-tags", action="store_true", help="every release at its own input size")
    parser.add_argument("--by", choices=("module", "operator"), help="break one model down")
    parser.add_argument("--depth", type=int, default=2, help="of --by module: names with fewer dots (default: 2)")
    parser.add_argument(
        "--img-size", type=int, nargs="+", metavar="PIXELS", help="side, or H W (default: the release's)"
    )
    parser.add_argument("--token-mixer", metavar="SPEC", help="swap the mixers: a name, one per stage, or JSON")
    parser.add_argument("--format", choices=FORMATS, default="text", help="(default: text)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the terminal")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="accuracy against multiply-adds")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


def _validate(args: argparse.Namespace) -> list[str]:
    """The names to report; raises ValueError for arguments that cannot work, before anything is counted."""
    names = select(args.filters, args.all_tags)
    if args.by and len(names) != 1:
        raise ValueError(f"--by takes one model, the filters match {len(names)}")
    if args.img_size is not None:
        if len(args.img_size) > 2 or min(args.img_size) < 1:
            raise ValueError(f"--img-size takes a side or H W in pixels, not {args.img_size}")
        args.img_size = (args.img_size * 2)[:2] if len(args.img_size) == 1 else args.img_size
    args.token_mixer = parse_spec(args.token_mixer) if args.token_mixer else None
    for path in filter(None, (args.output, args.plot)):
        if path.exists() and not args.overwrite:
            raise ValueError(f"{path} exists; give --overwrite to replace it")
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
    return names


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        names = _validate(args)
        rows, counted = [], None
        for name in tqdm(names, desc="counting", unit="model", disable=len(names) < 4, file=sys.stderr, leave=False):
            row, counted = count_model(name, args.img_size, args.token_mixer)
            rows.append(row)
        columns = [c for c in COLUMNS if c.left or any(row[c.key] is not None for row in rows)]
        table = _breakdown(counted, args.by, args.depth) if args.by else (columns, rows)
        text = RENDER[args.format](*table)
        if args.plot:
            plot(rows, args.plot)
        if args.output:
            with _replacing(args.output) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        else:
            print(text)
    except (ValueError, TypeError, ImportError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
