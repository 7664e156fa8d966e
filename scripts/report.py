"""Parameters, multiply-adds and published figures of models; no weights are needed.

    mixzoo report                                        every registered model
    mixzoo report "poolformer*" caformer_s18.sail_in1k_384
    mixzoo report "caformer*" --all-tags --format markdown --output table.md
    mixzoo report caformer_s18 --by module --depth 3
    mixzoo report metaformer_s12 --token-mixer pooling,pooling,attention,attention --img-size 256 320
    mixzoo report "fnet*" "ponet*" --seq-len 128

Parameters are counted with the frozen ones. GMACs are multiply-adds of matrix products and convolutions, transform
GMACs those of FFTs and the like, other Gops all further operations; `mixzoo.complexity` says how each is counted.

The columns dM and dG compare trainable parameters and MACs with the published figures, once ours are rounded to the
digits that were printed; "=" means the same digits. MACs are compared under the rule that the published figure was
counted by, which the note names where it is not that of the column GMACs.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import gc
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

import mixzoo
from mixzoo.mixers import parse_spec
from mixzoo.models import Complexity
from mixzoo.models._registry import MODELS, RELEASES, ModelSpec, Release, releases_of, resolve_name
from mixzoo.scripts._tables import FORMATS, RENDER, Column
from mixzoo.weights._save import write_bytes

SUFFIXES = {".md": "markdown", ".csv": "csv", ".json": "json"}
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
# what published figures may count beside matrix products, in words
COUNTED_TOO = {"norm": "norms", "transform": "transforms"}
DEFAULT_DEPTH = 2

Row = dict[str, Any]
# (H, W) of an image, or tokens of a text; None for the model's own
Size = tuple[int, int] | int | None


def millions(digits: int) -> Callable[[int], str]:
    return lambda n: f"{n / 1e6:.{digits}f}"


def billions(digits: int) -> Callable[[int], str]:
    return lambda n: f"{n / 1e9:.{digits}f}"


def _sign(difference: float) -> str:
    return f"{difference:+g}" if difference else "="


MODEL_COLUMNS = [
    Column("model", "model", left=True),
    Column("input", "input", left=True),
    Column("parameters", "params M", millions(2)),
    Column("frozen_parameters", "frozen M", millions(2)),
    Column("macs", "GMACs", billions(3)),
    Column("transform_macs", "transform GMACs", billions(3)),
    Column("other_ops", "other Gops", billions(3)),
    Column("activations", "acts M", millions(1)),
    Column("published_params_m", "published M"),
    Column("params_difference", "dM", _sign),
    Column("published_gmacs", "published G"),
    Column("macs_difference", "dG", _sign),
    Column("published_top1", "top-1"),
    Column("note", "note", left=True),
]
_COUNTS = [
    Column("macs", "MMACs", millions(3)),
    Column("transform_macs", "transform MMACs", millions(3)),
    Column("other_ops", "other Mops", millions(3)),
    Column("activations", "acts M", millions(3)),
]
_SHARE = Column("share", "MACs %", lambda share: f"{100 * share:.1f}")
PART_COLUMNS = {
    "module": [Column("module", "module", left=True), Column("parameters", "params M", millions(3)), *_COUNTS, _SHARE],
    "operator": [Column("operator", "operator", left=True), *_COUNTS, _SHARE],
}


# figures of a model


@functools.cache
def count(name: str, size: Size, token_mixer: str | None) -> Complexity:
    """Count a model or release by name, built without weights.

    Args:
        name: ``arch`` or ``arch.tag``.
        size: pixels or tokens; a model that does not take so many tokens is made to.
        token_mixer: swapped mixers as text, see `parse_spec`.
    """
    pixels = None if isinstance(size, int) else size
    options = {"img_size": pixels, "token_mixer": token_mixer and parse_spec(token_mixer)}
    with torch.device("meta"):
        model = mixzoo.create_model(name, **options)
        if isinstance(size, int) and not model.takes(size):
            model.set_input_size(size)
    return mixzoo.complexity(model, size)


def model_row(name: str, size: Size, token_mixer: str | None) -> Row:
    """The row of a model or release, beside what was published for the same input and mixers."""
    spec, release_name = resolve_name(name)
    release = RELEASES[release_name] if release_name else Release()
    if size is None and release_name and spec.modality == "image":
        size = release.input_size[1:]
    counted = _counted(name, spec, release, size, token_mixer)
    row = {
        "model": name,
        "input": "x".join(map(str, counted.input_shapes[0][1:])),
        "parameters": counted.parameters,
        "frozen_parameters": counted.frozen_parameters,
        "macs": counted.macs,
        "transform_macs": counted.transform_macs,
        "other_ops": counted.other_ops,
        "activations": counted.activations,
    }
    notes = [spec.note, release.note]
    if token_mixer is not None:
        notes.append(f"token mixers {token_mixer}")
    elif release_name and (other := _published_for(spec, release, size)):
        notes.append(f"published for {other}")
    else:
        row |= _published(release)
        notes += _compare(row, counted, release)
    notes += [f"not counted: {operator} ({calls} calls)" for operator, calls in counted.uncounted.items()]
    return row | {"note": "; ".join(filter(None, notes))}


def _published_for(spec: ModelSpec, release: Release, size: Size) -> str:
    """What a release was published for, if not for this size; a shorter text leaves the parameters as they are."""
    if spec.modality == "text":
        longest = spec.row["max_length"]
        return f"{longest} tokens" if size is not None and size > longest else ""
    published = release.input_size[1:]
    return "x".join(map(str, published)) if size not in (None, published) else ""


def _counted(name: str, spec: ModelSpec, release: Release, size: Size, token_mixer: str | None) -> Complexity:
    """`count`, once for the releases that differ in their weights alone."""
    same = (
        other
        for other, candidate in releases_of(spec.name).items()
        if (candidate.input_size, candidate.num_classes) == (release.input_size, release.num_classes)
    )
    return count(next(same, name), size, token_mixer)


def _published(release: Release) -> Row:
    return {
        "published_params_m": release.params_m,
        "published_gmacs": release.gmacs,
        "published_macs_rule": release.macs_rule if release.gmacs is not None else None,
        "published_top1": release.top1,
    }


def _digits(published: float) -> int:
    return len(str(published).partition(".")[2]) if isinstance(published, float) else 0


def printed(value: float, like: float) -> str:
    """``value`` rounded to the digits that the published number ``like`` has.

    >>> printed(1.8123, 1.8), printed(26.77, 27)
    ('1.8', '27')
    """
    return f"{value:.{_digits(like)}f}"


def _difference(ours: float, published: float) -> float:
    """Ours, rounded to the printed digits, minus the published figure."""
    return round(float(printed(ours, published)) - published, 9)


def _cut(ours: float, published: float) -> str:
    """What to say if the published figure is ours with its further digits cut off."""
    power = 10 ** _digits(published)
    return ", cut off where it was printed" if math.floor(ours * power) == round(published * power) else ""


def _compare(row: Row, counted: Complexity, release: Release) -> list[str]:
    """Fill in the differences; returns what the reader must know to understand them."""
    notes = []
    if release.params_m is not None:
        trainable = counted.trainable_parameters / 1e6
        row["params_difference"] = _difference(trainable, release.params_m)
        if row["params_difference"]:
            cut = _cut(trainable, release.params_m)
            notes.append(f"published parameters not reproduced: {trainable:.3f} M are trainable{cut}")
    if release.gmacs is not None:
        ours = counted.macs_by(release.macs_rule) / 1e9
        row["macs_difference"] = _difference(ours, release.gmacs)
        too = [COUNTED_TOO[column] for column in release.macs_rule.split("+") if column != "matmul"]
        if row["macs_difference"]:
            notes.append(_not_reproduced(counted, release))
        elif too:
            notes.append(f"published MACs include {' and '.join(too)}: {ours:.3f} G with them")
    return notes


def _not_reproduced(counted: Complexity, release: Release) -> str:
    """The figure under the stated rule, and the rules that would give the published one."""
    published, rule = release.gmacs, release.macs_rule
    ours = counted.macs_by(rule) / 1e9
    note = f"published MACs not reproduced: {ours:.3f} G by their rule, {rule}{_cut(ours, published)}"
    there = [column for column in COUNTED_TOO if counted.macs_by(column)]
    subsets = ("+".join(["matmul", *columns]) for n in range(len(there) + 1) for columns in combinations(there, n))
    fitting = [r for r in subsets if not _difference(counted.macs_by(r) / 1e9, published)]
    return f"{note}; they fit {' or '.join(fitting)}" if fitting else note


def part_rows(counted: Complexity, by: str, depth: int) -> list[Row]:
    """Rows of the modules down to ``depth`` names, or of the operators; the first row of modules is the model."""
    if by == "module":
        parts = {m: c for m, c in counted.by_module.items() if not m or m.count(".") < depth}
    else:
        parts = counted.by_operator
    return [
        {
            by: name or "(model)",
            "parameters": getattr(counts, "parameters", None),
            "macs": counts.macs,
            "transform_macs": counts.transform_macs,
            "other_ops": counts.other_ops,
            "activations": counts.activations,
            "share": counts.macs / counted.macs if counted.macs else 0.0,
        }
        for name, counts in parts.items()
    ]


# choice of models


def select(filters: Sequence[str], all_tags: bool) -> list[str]:
    """Names of models and releases that match any of the filters, in the order they are registered.

    A filter with a dot chooses releases, others choose models, each shown as its default release.

    Raises:
        ValueError: a filter that matches nothing, with the nearest names.
    """
    chosen: list[str] = []
    for pattern in filters or ["*"]:
        names: Iterable[str] = RELEASES if "." in pattern else MODELS
        found = fnmatch.filter(names, pattern)
        if not found and any(character in pattern for character in "*?["):
            raise ValueError(f"no model matches {pattern!r}; mixzoo.list_models() lists all")
        # an alias, or the error that names the nearest
        chosen += found or [resolve_name(pattern)[1] or pattern]
    if all_tags:
        chosen = [tag for name in chosen for tag in (releases_of(name) if "." not in name else None) or [name]]
    order = {name: i for i, name in enumerate([*RELEASES, *MODELS])}
    families = {name: i for i, name in enumerate(MODELS)}
    return sorted(dict.fromkeys(chosen), key=lambda name: (families[name.partition(".")[0]], order[name]))


# drawing


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw published top-1 over our GMACs, a colour for each family and a line for each kind of its releases."""
    # without pyplot, which would choose a window system
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        arch, _, tag = row["model"].partition(".")
        lines.setdefault((arch.partition("_")[0], tag, row["input"]), []).append(row)
    families = list(dict.fromkeys(family for family, _, _ in lines))
    sizes = list(dict.fromkeys(size for _, _, size in lines))
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.add_subplot()
    for (family, tag, size), group in lines.items():
        points = sorted((row["macs"] / 1e9, row["published_top1"], row["model"]) for row in group)
        number = families.index(family)
        alike = [t for f, t, s in lines if (f, s) == (family, size)]
        (line,) = axes.plot(
            [gmacs for gmacs, _, _ in points],
            [top1 for _, top1, _ in points],
            label=" ".join(filter(None, (family, tag, size if len(sizes) > 1 else ""))),
            color=f"C{number % 10}",
            marker="os^Dv"[sizes.index(size) % 5],
            linestyle=("-", "--", ":", "-.")[alike.index(tag) % 4],
            markersize=4,
            linewidth=0.8,
        )
        # names of neighbouring curves on opposite sides
        side = {"xytext": (4, -3), "va": "top"} if number % 2 else {"xytext": (-4, 3), "va": "bottom", "ha": "right"}
        for gmacs, top1, name in points:
            text = name.partition(".")[0].partition("_")[2]
            style = {"textcoords": "offset points", "fontsize": 7, "color": line.get_color()}
            axes.annotate(text, (gmacs, top1), **side, **style)
    axes.set(xscale="log", xlabel="GMACs (matrix products and convolutions)", ylabel="published ImageNet-1k top-1, %")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    write_bytes(path, lambda file: figure.savefig(file, dpi=150, format=path.suffix[1:]))


# command line


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Arguments of ``mixzoo report``."""
    parser = argparse.ArgumentParser(
        prog="mixzoo report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("filters", nargs="*", metavar="FILTER", help="name or shell pattern; with a dot, of releases")
    parser.add_argument("--all-tags", action="store_true", help="every release of a model, not the default one alone")
    parser.add_argument("--img-size", type=_positive, nargs="+", metavar=("H", "W"), help="default: as released")
    parser.add_argument("--seq-len", type=_positive, metavar="N", help="tokens of a text (default: the longest)")
    parser.add_argument("--token-mixer", metavar="SPEC", help="swap the mixers: a name, one per stage a,b,c,d, or JSON")
    parser.add_argument("--by", choices=tuple(PART_COLUMNS), help="break one model down by module or by operator")
    parser.add_argument("--depth", type=_positive, metavar="N", help=f"names of a module (default: {DEFAULT_DEPTH})")
    parser.add_argument("--format", choices=FORMATS, help="default: by the suffix of --output, else text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to standard output")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw published top-1 over GMACs (png, svg, pdf); mixzoo[plots]"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Everything that can be wrong with the arguments, before anything is counted.

    Raises:
        ValueError: with one line for the user.
    """
    args.names = select(args.filters, args.all_tags)
    if args.by and len(args.names) != 1:
        raise ValueError(f"--by breaks one model down, but {len(args.names)} are chosen: {', '.join(args.names[:5])}")
    if args.depth and args.by != "module":
        raise ValueError("--depth is for --by module")
    if args.img_size and len(args.img_size) > 2:
        raise ValueError(f"--img-size takes a side, or height and width, not {len(args.img_size)} numbers")
    if args.img_size:
        args.img_size = (args.img_size[0], args.img_size[-1])
    if args.img_size and args.seq_len:
        raise ValueError("give either --img-size, of images, or --seq-len, of texts")
    other = next((name for name in args.names if resolve_name(name)[0].modality != "text"), None)
    if args.seq_len and other is not None:
        raise ValueError(f"--seq-len is for models of texts, which {other} is not")
    args.size = args.seq_len or args.img_size
    if args.plot and args.by:
        raise ValueError("--plot compares models; leave out --by")
    if args.plot and (args.img_size or args.token_mixer):
        raise ValueError("--plot draws published accuracies, which --img-size and --token-mixer would not have")
    if args.plot and args.plot.suffix not in PLOT_SUFFIXES:
        raise ValueError(f"--plot must end in {' or '.join(PLOT_SUFFIXES)}, not {args.plot.name!r}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'mixzoo[plots]'")
    for path in filter(None, (args.output, args.plot)):
        if not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
        if path.exists() and not args.overwrite:
            raise ValueError(f"{path} exists; give --overwrite to replace it")


def _model_rows(args: argparse.Namespace) -> list[Row]:
    from tqdm import tqdm

    # tracing allocates much, and every collection would walk over all that the imports left
    gc.freeze()
    try:
        with tqdm(args.names, unit="model", file=sys.stderr, delay=2, leave=False, disable=None) as progress:
            return [model_row(name, args.size, args.token_mixer) for name in progress]
    finally:
        gc.unfreeze()


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        _check(args)
        if args.by:
            counted = count(args.names[0], args.size, args.token_mixer)
            columns, rows = PART_COLUMNS[args.by], part_rows(counted, args.by, args.depth or DEFAULT_DEPTH)
        else:
            columns, rows = MODEL_COLUMNS, _model_rows(args)
        known = [row for row in rows if row.get("published_top1") is not None]
        if args.plot and not known:
            raise ValueError("--plot has nothing to draw: no accuracy is published for these models")
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    text = RENDER[args.format or SUFFIXES.get(args.output.suffix if args.output else "", "text")](columns, rows) + "\n"
    if args.output:
        write_bytes(args.output, lambda file: file.write(text.encode()))
    else:
        sys.stdout.write(text)
    if args.plot:
        plot(known, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
