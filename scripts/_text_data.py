"""Labelled texts to train on: CSV, TSV or JSON lines, one file or several, split, or folded for cross-validation.

    FILE     .csv, .tsv (both with a header) or .jsonl: a column of texts, or two for pairs, and one of labels
    DIR      train.*, and val.* (dev.*, valid.*, validation.*) and/or test.* in one of these forms

Rows that say the same twice are dropped from a split. Where texts of the training split stand in another one too, that
is told: scores on them reward memory.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_SPLITS = {"train": ("train", "training"), "val": ("dev", "val", "valid", "validation"), "test": ("test", "testing")}
_ENDINGS = (".csv", ".tsv", ".jsonl")
_TEXT_COLUMNS = ("text", "sentence", "content", "review", "document", "article", "body", "tweet")
_PAIR_COLUMNS = (
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)
_LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment", "stars", "y")
# as for images: one split for all runs that are not folds
_SPLIT_SEED = 0
_HELD_OUT = 0.2
# share of the rest that chooses the epoch, where every text is tested in one fold
_HELD_OUT_OF_FOLD = 0.15


@dataclass(frozen=True)
class Texts:
    """Texts, each a tuple of one or two, and numbers of their classes."""

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TextData:
    """Splits of labelled texts.

    Attributes:
        name: what to call it. class_names: name of every label.
        val_name: what the source calls ``val``. test: measured once at the end, or None.
        note: sentences for the user about what was found.
    """

    name: str
    train: Texts
    val: Texts
    val_name: str
    test: Texts | None
    class_names: list[str]
    note: str = ""


@dataclass(frozen=True)
class _Row:
    texts: tuple[str, ...]
    label: str
    group: str


@dataclass(frozen=True)
class Columns:
    """Which columns to read; None for what is found: names in use, see the lists of this module."""

    text: Sequence[str] | None = None
    label: str | None = None
    group: str | None = None


def load_texts(
    source: str,
    *,
    columns: Columns = Columns(),
    val: str | None = None,
    test: str | None = None,
    fold: tuple[int, int] | None = None,
    seed: int = 0,
) -> TextData:
    """Read ``source``, a file or a folder, and split it.

    Args:
        val, test: files of these splits.
        fold: (k, K): test on the k-th of K parts of all rows of all files, train on the others. Which part a row is in
            depends on ``seed``.

    Raises:
        ValueError: nothing usable there; the message names the file, the column or the line.
    """
    files = _files(source, val, test)
    rows = {split: _read(path, columns) for split, path in files.items()}
    names = _class_names([row.label for part in rows.values() for row in part], source)
    notes, val_name, name = [], "val", Path(source).resolve().stem
    rows = {split: _distinct(part, split, notes) for split, part in rows.items()}
    if fold is not None:
        rows = _fold([row for part in rows.values() for row in part], *fold, seed, notes)
    else:
        _tell_leaks(rows, notes)
        if "val" not in rows and "test" in rows:
            rows["val"], val_name = rows.pop("test"), "test"
        if "val" not in rows:
            rows["train"], rows["val"] = _hold_out(rows["train"], _HELD_OUT, _SPLIT_SEED)
            val_name = "held-out"
            notes.append(f"no other split: {len(rows['val'])} texts ({_HELD_OUT:.0%} of each class) are held out")
    numbers = {label: number for number, label in enumerate(names)}
    made = {
        split: Texts(tuple(row.texts for row in part), tuple(numbers[row.label] for row in part))
        for split, part in rows.items()
    }
    return TextData(name, made["train"], made["val"], val_name, made.get("test"), names, "; ".join(notes))


def _files(source: str, val: str | None, test: str | None) -> dict[str, Path]:
    """Files by split."""
    path = Path(source)
    if path.is_dir():
        found = {
            split: [f for f in sorted(path.iterdir()) if f.stem.lower() in stems and f.suffix.lower() in _ENDINGS]
            for split, stems in _SPLITS.items()
        }
        files = {split: paths[0] for split, paths in found.items() if paths}
        if "train" not in files:
            raise ValueError(f"--data {source}: there is no train.csv, train.tsv or train.jsonl")
    else:
        files = {"train": path}
    files |= {split: Path(given) for split, given in (("val", val), ("test", test)) if given}
    for split, file in files.items():
        if not file.is_file():
            option = "--data" if split == "train" else f"--{split}-data"
            raise ValueError(f"{option} {file}: no such file; give a .csv, .tsv or .jsonl file, a folder, or listops")
    return files


def _read(path: Path, columns: Columns) -> list[_Row]:
    """Rows of a file; every one has its texts and its label."""
    records, lines = _records(path)
    if not records:
        raise ValueError(f"--data {path} has no rows")
    header = list(records[0])
    text = _text_columns(path, header, columns.text)
    label = _column(path, header, columns.label, _LABEL_COLUMNS, "--label-column")
    if columns.group is not None and columns.group not in header:
        raise ValueError(f"--group-by {columns.group}: {path} has {', '.join(header)}")
    wanted = [*text, label, *([columns.group] if columns.group else [])]
    rows = []
    for record, line in zip(records, lines, strict=True):
        missing = [name for name in wanted if record.get(name) is None or str(record[name]).strip() == ""]
        if missing:
            raise ValueError(f"--data {path}: {missing[0]} is missing in line {line}")
        texts = tuple(str(record[name]) for name in text)
        # without a column of groups each text is one by itself
        rows.append(
            _Row(texts, _label(record[label]), str(record[columns.group]) if columns.group else "\0".join(texts))
        )
    return rows


def _label(value: Any) -> str:
    """true and "true" are one class, so are 1 and "1"."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _records(path: Path) -> tuple[list[Mapping[str, Any]], list[int]]:
    """Rows by heading, and the line of the file every one ends in."""
    if path.suffix.lower() not in _ENDINGS:
        raise ValueError(f"--data {path}: give a .csv, .tsv or .jsonl file")
    records, lines = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".jsonl":
                for line, text in enumerate(file, start=1):
                    if text.strip():
                        records.append(_json(path, text, line))
                        lines.append(line)
                return records, lines
            csv.field_size_limit(1 << 30)  # documents are longer than the 128 KiB of the default
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            for record in reader:
                records.append(record)
                lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--data {path} cannot be read: {error}") from None
    return records, lines


def _json(path: Path, text: str, line: int) -> Mapping[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--data {path}: line {line} is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"--data {path}: line {line} is no JSON object")
    return record


def _text_columns(path: Path, header: Sequence[str], given: Sequence[str] | None) -> list[str]:
    if given is not None:
        unknown = [name for name in given if name not in header]
        if unknown or len(given) > 2:
            raise ValueError(f"--text-column {','.join(given)}: give one or two of {', '.join(header)}")
        return list(given)
    lower = {name.lower(): name for name in header}
    for pair in _PAIR_COLUMNS:
        if all(name in lower for name in pair):
            return [lower[name] for name in pair]
    return [_column(path, header, None, _TEXT_COLUMNS, "--text-column")]


def _column(path: Path, header: Sequence[str], given: str | None, usual: Sequence[str], option: str) -> str:
    if given is not None:
        if given not in header:
            raise ValueError(f"{option} {given}: {path} has {', '.join(header)}")
        return given
    found = [name for wanted in usual for name in header if name.lower() == wanted]
    if not found:
        raise ValueError(
            f"--data {path} has no column {', '.join(usual[:3])}, ...: say which by {option} of {', '.join(header)}"
        )
    return found[0]


def _class_names(labels: Sequence[str], source: str) -> list[str]:
    """Names in order: of their values if they are whole numbers, else of the alphabet."""
    names = set(labels)
    if len(names) < 2:
        raise ValueError(f"--data {source}: one class only ({next(iter(names))}); classification needs two")
    if all(name.lstrip("-").isdecimal() for name in names):
        return sorted(names, key=int)
    if len(names) > 1000:
        raise ValueError(f"--data {source}: {len(names)} classes; is --label-column the column of the classes?")
    return sorted(names)


def _distinct(rows: Sequence[_Row], where: str, notes: list[str]) -> list[_Row]:
    distinct = list(dict.fromkeys(rows))
    if len(distinct) < len(rows):
        notes.append(f"{len(rows) - len(distinct)} repeated rows of {where} dropped")
    return distinct


def _tell_leaks(rows: Mapping[str, Sequence[_Row]], notes: list[str]) -> None:
    """Note how much of the later splits stands in earlier ones."""
    known, before = {row.group for row in rows["train"]}, "train"
    for split in ("val", "test"):
        groups = [row.group for row in rows.get(split, ())]
        leaked = sum(group in known for group in groups)
        if leaked:
            notes.append(f"LEAK: {leaked} of {len(groups)} of {split} are in {before} too, see --folds")
        known, before = known.union(groups), f"{before} or {split}"


def _hold_out(rows: Sequence[_Row], fraction: float, seed: int) -> tuple[list[_Row], list[_Row]]:
    """Rows to train on and rows held out: ``fraction`` of every class, groups whole."""
    parts = max(2, round(1 / fraction))
    part_of = _parts(rows, parts, seed)
    kept = [row for row in rows if part_of[row.group] != 0]
    held = [row for row in rows if part_of[row.group] == 0]
    if not held or not kept:
        raise ValueError(f"--data: {len(rows)} texts are too few to hold some out; give --val-data")
    return kept, held


def _parts(rows: Sequence[_Row], parts: int, seed: int) -> dict[str, int]:
    """Part 0 .. ``parts`` - 1 of every group, the classes spread evenly."""
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[str]] = {}
    first = {}
    for row in rows:
        if first.setdefault(row.group, row.label) == row.label:
            by_label.setdefault(row.label, []).append(row.group)
    part_of, turn = {}, 0
    for label in sorted(by_label):
        groups = list(dict.fromkeys(by_label[label]))
        for index in rng.permutation(len(groups)):
            part_of.setdefault(groups[index], turn % parts)
            turn += 1
    return part_of


def _fold(rows: Sequence[_Row], index: int, folds: int, seed: int, notes: list[str]) -> dict[str, list[_Row]]:
    """Splits of one fold."""
    rows = _distinct(rows, "all files together", notes)
    part_of = _parts(rows, folds, seed)
    if len(part_of) < 2 * folds:
        raise ValueError(f"--folds {folds}: {len(part_of)} different texts are too few")
    rest = [row for row in rows if part_of[row.group] != index]
    train, val = _hold_out(rest, _HELD_OUT_OF_FOLD, seed)
    notes.append(f"fold {index + 1} of {folds} of {len(part_of)} different texts")
    return {"train": train, "val": val, "test": [row for row in rows if part_of[row.group] == index]}


def label_counts(data: Texts, class_names: Sequence[str]) -> str:
    """How many texts of each class, the commonest first."""
    counts = Counter(data.labels).most_common(4)
    more = ", ..." if len(class_names) > 4 else ""
    return ", ".join(f"{class_names[label]} {count}" for label, count in counts) + more
