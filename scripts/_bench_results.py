"""Results of `mixzoo bench`: the rows, their summary, and how they are written and drawn."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from mixzoo.scripts import _measure, _tables

# a backward pass is one product for the gradient of the input and one for that of the weight
STEP_PASSES = {"inference": 1, "training": 3}


@dataclass
class Row:
    """One contestant of one comparison; a figure that was not to be had is None, with the reason in ``note``.

    ``opponent`` is what the user asked to compare with, None in the row of the model itself. Ratios are the
    opponent's figure over the model's.
    """

    model: str
    measured: str
    opponent: str | None
    memory_format: str
    batch: int
    step: str = "inference"
    size: str | None = None
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    images_per_s: float | None = None
    peak_mib: float | None = None
    gmacs: float | None = None
    gflops: float | None = None
    matmul_gflops: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    memory_ratio: float | None = None
    rounds: int = 0
    note: str = ""

    def add_note(self, note: str) -> None:
        self.note = "; ".join(filter(None, [self.note, note]))

    def add_times(self, seconds: Sequence[float], matmul: Sequence[float]) -> None:
        """Fill in the speed from the seconds of a batch and of the yardstick in every round."""
        median = statistics.median(seconds)
        self.ms, self.ms_low, self.ms_high = 1e3 * median, 1e3 * min(seconds), 1e3 * max(seconds)
        self.images_per_s, self.rounds = self.batch / median, len(seconds)
        if matmul:
            self.matmul_gflops = 2e-9 * _measure.MATMUL_SIDE**3 / statistics.median(matmul)
        if self.gmacs:
            self.gflops = 2 * self.gmacs * self.batch * STEP_PASSES[self.step] / median

    def add_ratios(self, model: Row, seconds: Sequence[float], model_seconds: Sequence[float]) -> None:
        """Fill in the comparison with the row of the model, from the seconds of both in every round."""
        self.ratio = statistics.median(seconds) / statistics.median(model_seconds)
        by_round = [theirs / ours for theirs, ours in zip(seconds, model_seconds, strict=True)]
        self.ratio_low, self.ratio_high = min(by_round), max(by_round)
        if self.peak_mib and model.peak_mib:
            self.memory_ratio = self.peak_mib / model.peak_mib


@dataclass
class Comparison:
    """What was measured for one model: its own row, those of its opponents, and the times of its parts."""

    rows: list[Row]
    parts: list[dict[str, Any]] = field(default_factory=list)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _columns() -> list[_tables.Column]:
    number, left = partial(_tables.Column, show=_number), partial(_tables.Column, left=True)
    fixed = partial(_tables.Column, show="{:.2f}".format)
    return [
        left("model", "model"),
        left("measured", "measured"),
        left("memory_format", "format"),
        _tables.Column("batch", "batch"),
        left("size", "input"),
        number("ms", "ms/batch"),
        number("images_per_s", "images/s"),
        number("peak_mib", "peak MiB"),
        number("gmacs", "GMACs"),
        number("gflops", "GFLOP/s"),
        number("matmul_gflops", "matmul GFLOP/s"),
        fixed("ratio", "ratio"),
        fixed("ratio_low", "lowest"),
        fixed("ratio_high", "highest"),
        fixed("memory_ratio", "memory"),
        left("note", "note"),
    ]


_PART_COLUMNS = [
    _tables.Column("model", "model", left=True),
    _tables.Column("part", "part", left=True),
    _tables.Column("ms", "ms/batch", _number),
    _tables.Column("share", "share", "{:.0%}".format),
    _tables.Column("gmacs", "GMACs", _number),
    _tables.Column("gflops", "GFLOP/s", _number),
]


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """Of every opponent of every model the row in its faster memory format."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.opponent is not None and row.ratio is not None:
            key = (row.model, row.opponent)
            best[key] = min(best.get(key, row), row, key=lambda r: r.ms)
    return list(best.values())


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Geometric means over models, against each opponent in its better memory format."""
    best = best_rows(rows)
    summary = []
    for opponent in dict.fromkeys(row.opponent for row in best):
        group = [row for row in best if row.opponent == opponent]
        lowest = min(group, key=lambda row: row.ratio)
        memory = [row.memory_ratio for row in group if row.memory_ratio]
        summary.append(
            {
                "opponent": opponent,
                "models": len(group),
                "ratio": statistics.geometric_mean(row.ratio for row in group),
                "lowest_ratio": lowest.ratio,
                "lowest_model": lowest.model,
                "memory_ratio": statistics.geometric_mean(memory) if memory else None,
            }
        )
    return summary


def _summary_line(item: Mapping[str, Any]) -> str:
    line = f"against {item['opponent']}: geometric mean of {item['models']} ratios {item['ratio']:.2f}"
    line += f", lowest {item['lowest_ratio']:.2f} ({item['lowest_model']})"
    return line if item["memory_ratio"] is None else f"{line}; memory {item['memory_ratio']:.2f}"


def render(comparisons: Sequence[Comparison], about: Mapping[str, Any], form: str) -> str:
    """The whole result in one of `_tables.FORMATS`; CSV holds the rows alone."""
    rows = [row for comparison in comparisons for row in comparison.rows]
    parts = [part for comparison in comparisons for part in comparison.parts]
    flat = [asdict(row) for row in rows]
    if form == "json":
        result = {"environment": dict(about), "rows": flat, "parts": parts, "summary": summarise(rows)}
        return json.dumps(result, indent=2)
    if form == "csv":
        return _tables.csv_table([_tables.Column(f.name, f.name) for f in fields(Row)], flat)
    table = _tables.RENDER[form]
    blocks = [", ".join(f"{key} {value}" for key, value in about.items()), table(_columns(), flat)]
    if parts:
        blocks.append(table(_PART_COLUMNS, parts))
    return "\n\n".join([*blocks, *map(_summary_line, summarise(rows))])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw milliseconds an image over GMACs, with the line of the matrix product's speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    measured = [row for row in rows if row.ms is not None and row.gmacs]
    groups = {
        "models": ("o", [row for row in measured if row.opponent is None]),
        "opponents, in their faster memory format": ("s", best_rows(measured)),
    }
    for label, (marker, group) in groups.items():
        points = [(row.gmacs, row.ms / row.batch) for row in group]
        if not points:
            continue
        axes.scatter(*zip(*points, strict=True), marker=marker, label=label)
        for row, point in zip(group, points, strict=True):
            axes.annotate(row.measured, point, xytext=(4, 4), textcoords="offset points", fontsize=7)
    if measured:
        widest = max(row.gmacs for row in measured)
        slope = 2e3 * STEP_PASSES[measured[0].step] / statistics.median(row.matmul_gflops for row in measured)
        axes.plot([0, widest], [0, slope * widest], ":", color="grey", label="at the speed of a matrix product")
        axes.legend()
    axes.set(xlabel="GMACs an image", ylabel="ms an image", xlim=(0, None), ylim=(0, None))
    figure.savefig(path, dpi=150)
    plt.close(figure)
