"""Multivariate series to train on: CSV files, splits by time, scaling, windows without copies.

A file has one line per time step and one column per channel, with a header; a column of dates is optional. Splits are
stretches of time. Windows of the validation and test stretches may look back into the one before, so that their number
does not depend on the look-back: all forecasts of a stretch of R rows over H steps are R - H + 1 windows.

The protocol is the one of the published ETT tables: `split_rows`, `Scaler`; every window counts, also those of the last
batch.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

# headings of columns of dates, in lower case
_DATES = ("date", "datetime", "time", "timestamp", "ds")
_FORMATS = (
    "%Y/%m/%d %H:%M",
    "%Y/%m/%d %H:%M:%S",
    "%Y/%m/%d",
    "%m/%d/%Y %H:%M",
    "%m/%d/%Y",
    "%d.%m.%Y %H:%M",
    "%d.%m.%Y",
)
_MISSING = ("", "na", "n/a", "nan", "null", "none", "-")
# channels of the ETT files, whose splits are months of 30 days: arXiv:2012.07436
_ETT = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
_ETT_DAYS = (360, 120, 120)
_DAY = 86_400
_YEAR = 365.25 * _DAY
# longest step in seconds of every frequency
_FREQUENCIES = (("s", 59), ("t", 3_599), ("h", _DAY - 1), ("d", 7 * _DAY - 1), ("w", 27 * _DAY), ("m", 366 * _DAY))

# marks by frequency, each within +-0.5, coarser ones last
_MARKS: dict[str, Callable[[datetime], float]] = {
    "second": lambda t: t.second / 59 - 0.5,
    "minute": lambda t: t.minute / 59 - 0.5,
    "hour": lambda t: t.hour / 23 - 0.5,
    "weekday": lambda t: t.weekday() / 6 - 0.5,
    "day": lambda t: (t.day - 1) / 30 - 0.5,
    "day of the year": lambda t: (t.timetuple().tm_yday - 1) / 365 - 0.5,
    "week": lambda t: (t.isocalendar()[1] - 1) / 52 - 0.5,
    "month": lambda t: (t.month - 1) / 11 - 0.5,
}
MARKS_OF: dict[str, tuple[str, ...]] = {
    "s": ("second", "minute", "hour", "weekday", "day", "day of the year"),
    "t": ("minute", "hour", "weekday", "day", "day of the year"),
    "h": ("hour", "weekday", "day", "day of the year"),
    "d": ("weekday", "day", "day of the year"),
    "w": ("day", "week"),
    "m": ("month",),
}


@dataclass(frozen=True)
class Series:
    """A series in memory.

    Attributes:
        name: what to call it. columns: names of the channels.
        values: (T, C).
        dates: of every step, or None.
        step: seconds between two steps (their median), None without dates.
        note: a sentence for the user about what was found.
    """

    name: str
    columns: tuple[str, ...]
    values: np.ndarray
    dates: tuple[datetime, ...] | None = None
    step: int | None = None
    note: str = ""

    @property
    def freq(self) -> str | None:
        """Key of `MARKS_OF` for the step, None without dates."""
        if self.step is None:
            return None
        return next((name for name, longest in _FREQUENCIES if self.step <= longest), "m")

    @property
    def season(self) -> int | None:
        """Steps after which the values are likely to come again: a day, a week of days, else a year."""
        if self.step is None:
            return None
        if self.step < _DAY:
            return round(_DAY / self.step)
        return 7 if self.freq == "d" else round(_YEAR / self.step)


@dataclass(frozen=True)
class Splits:
    """Rows [start, stop) of the stretches, and in words where they come from."""

    train: tuple[int, int]
    val: tuple[int, int]
    test: tuple[int, int]
    rule: str


def read_series(path: str | Path, *, columns: Sequence[str] | None = None, date_column: str | None = None) -> Series:
    """Read a CSV file.

    Args:
        columns: the channels to take; None for every column but the dates and an unnamed index.
        date_column: heading of the dates; None for the first column that is called or looks like them, if there is one.

    Raises:
        ValueError: no such file or column, missing or unreadable values (with their line numbers), dates that do not
            increase.
    """
    path = Path(path)
    header, rows, lines = _read_csv(path)
    at = _date_column(path, header, rows, date_column)
    numbered = at != 0 and _counts_rows(header, rows)
    chosen = [i for i in range(numbered, len(header)) if i != at]
    if columns is not None:
        unknown = [name for name in columns if name not in header]
        if unknown:
            raise ValueError(f"--columns {unknown[0]}: {path} has {', '.join(header)}")
        chosen = [header.index(name) for name in columns]
    elif at is None and (clock := next((i for i in chosen if header[i].lower() in _DATES), None)) is not None:
        raise ValueError(
            f"--data {path}: {header[clock]} is {rows[0][clock]!r} in line {lines[0]}, no date such as "
            "2020-01-31 10:00; write dates, or name the channels by --columns"
        )
    if not chosen:
        raise ValueError(f"--data {path} has no column of values")
    values = _numbers(path, [header[i] for i in chosen], [[row[i] for i in chosen] for row in rows], lines)
    dates, step, note = None, None, "no column of dates: no time marks, no daily anchor"
    if at is not None:
        dates = _dates(path, header[at], [row[at] for row in rows], lines)
        step, note = _step(dates, lines)
    if numbered:
        note = "; ".join(filter(None, ("the unnamed column counts rows and is left out", note)))
    return Series(path.stem, tuple(header[i] for i in chosen), values, dates, step, note)


def _read_csv(path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows, and the line of the file every row ends in."""
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file; give a CSV file with a header and one line per time step")
    rows, lines = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--data {path} is no CSV file: {error}") from None
    if not rows:
        raise ValueError(f"--data {path} has no rows")
    if len(header) == 1 and (separator := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise ValueError(f"--data {path}: columns must be separated by commas, the first line has {separator!r}")
    if len(set(header)) < len(header):
        raise ValueError(f"--data {path}: a heading stands twice in {', '.join(header)}")
    ragged = [line for row, line in zip(rows, lines, strict=True) if len(row) != len(header)]
    if ragged:
        raise ValueError(f"--data {path}: the header has {len(header)} columns, {_where(ragged)} not")
    if all(_is_number(name) for name in header):
        raise ValueError(f"--data {path}: the first line must be a header, found numbers")
    return header, rows, lines


def _counts_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first column is an index without a heading, 0, 1, 2, ... or 1, 2, 3, ..., as pandas writes it."""
    return not header[0] and any(all(row[0] == str(i) for i, row in enumerate(rows, start)) for start in (0, 1))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _where(lines: Sequence[int], shown: int = 5) -> str:
    """Lines of a file in words."""
    more = f" and {len(lines) - shown} more" if len(lines) > shown else ""
    return f"line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:shown]))}{more}"


def _date_column(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], given: str | None) -> int | None:
    if given is not None:
        if given not in header:
            raise ValueError(f"--date-column {given}: {path} has {', '.join(header)}")
        return list(header).index(given)
    named = [i for i, name in enumerate(header) if name.lower() in _DATES]
    if named and _parser(rows[0][named[0]]):
        return named[0]
    return 0 if not _is_number(rows[0][0]) and _parser(rows[0][0]) else None


def _parser(text: str) -> Callable[[str], datetime] | None:
    """What reads dates of the form of ``text``."""
    candidates = [datetime.fromisoformat, *(lambda t, f=form: datetime.strptime(t, f) for form in _FORMATS)]
    for parse in candidates:
        try:
            parse(text.strip())
        except ValueError:
            continue
        return parse
    return None


def _numbers(path: Path, names: Sequence[str], cells: list[list[str]], lines: Sequence[int]) -> np.ndarray:
    """Cells as (T, C), all of them finite."""
    try:
        values = np.array(cells, dtype=np.float64)
    except ValueError:
        values = np.array([[_number(cell) for cell in row] for row in cells])
    bad = ~np.isfinite(values)
    if not bad.any():
        return values
    at, channel = (int(i) for i in np.argwhere(bad)[0])
    found = cells[at][channel].strip()
    kind = "is missing" if found.lower() in _MISSING else f"is {found!r}, no number"
    affected = [lines[row] for row in np.flatnonzero(bad.any(1))]
    raise ValueError(
        f"--data {path}: {names[channel]} {kind} in line {lines[at]}; {int(bad.sum()):,} of {bad.size:,} values cannot "
        f"be used, in {_where(affected)}: fill them in or leave these columns out by --columns"
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _dates(path: Path, name: str, cells: Sequence[str], lines: Sequence[int]) -> tuple[datetime, ...]:
    parse, dates = _parser(cells[0]), []
    for cell, line in zip(cells, lines, strict=True):
        try:
            if parse is None:
                raise ValueError
            dates.append(parse(cell.strip()).replace(tzinfo=None))
        except ValueError:
            raise ValueError(f"--data {path}: {name} is {cell!r} in line {line}, no date as in the others") from None
        if len(dates) > 1 and dates[-1] <= dates[-2]:
            raise ValueError(f"--data {path}: {name} in line {line} is not after the line before: {cell!r}")
    return tuple(dates)


def _step(dates: Sequence[datetime], lines: Sequence[int]) -> tuple[int, str]:
    """Median step in seconds, and a note if there are gaps."""
    if len(dates) < 2:
        return _DAY, ""
    steps = np.diff(np.array([int(t.timestamp()) for t in dates]))
    step = int(np.median(steps))
    # months differ by a tenth, and an hour may be lost to summer time
    gaps = [lines[i + 1] for i in np.flatnonzero(steps > 1.5 * step)]
    return step, f"gaps in the dates before {_where(gaps)}; rows are taken as if evenly spaced" if gaps else ""


def time_marks(dates: Sequence[datetime], freq: str) -> np.ndarray:
    """Marks (T, F) of the dates, float32, within +-0.5; F by ``freq``, see `MARKS_OF`."""
    marks = [_MARKS[name] for name in MARKS_OF[freq]]
    return np.array([[mark(t) for mark in marks] for t in dates], dtype=np.float32)


def split_rows(series: Series, rule: str = "auto") -> Splits:
    """Where the stretches begin and end.

    Args:
        rule: "ett": the first 12, 4 and 4 months of 30 days, later rows unused; "A:B:C": shares of the rows, the
            middle one getting what rounding leaves; "A,B,C": numbers of rows from the first on; "auto": "ett" for a
            file with the seven channels of ETT, else "7:1:2".

    Raises:
        ValueError: a rule that cannot be read, or that needs more rows.
    """
    total = len(series.values)
    if rule == "auto":
        rule = "ett" if set(series.columns) == set(_ETT) and series.step in (900, 3_600) else "7:1:2"
    if rule == "ett":
        if series.step is None or _DAY % series.step:
            raise ValueError("--split ett needs a column of dates with a step that divides a day")
        lengths = [days * _DAY // series.step for days in _ETT_DAYS]
        words = "12, 4 and 4 months of 30 days"
    elif "," in rule:
        lengths, words = [int(part) for part in _parts(rule, ",")], "as given"
    else:
        shares = [part / sum(_parts(rule, ":")) for part in _parts(rule, ":")]
        train, test = int(total * shares[0] + 1e-9), int(total * shares[2] + 1e-9)
        lengths, words = [train, total - train - test, test], f"{rule} of the rows"
    if sum(lengths) > total:
        raise ValueError(
            f"--split {rule} needs {' + '.join(map(str, lengths))} = {sum(lengths)} rows; there are {total}"
        )
    ends = np.cumsum(lengths).tolist()
    return Splits((0, ends[0]), (ends[0], ends[1]), (ends[1], ends[2]), words)


def _parts(rule: str, separator: str) -> list[float]:
    parts = rule.split(separator)
    if len(parts) != 3 or not all(_is_number(part) and 0 < float(part) < math.inf for part in parts):
        raise ValueError(f"--split {rule}: give auto, ett, shares such as 7:1:2, or rows such as 8640,2880,2880")
    return [float(part) for part in parts]


def check_lengths(splits: Splits, context: int, horizon: int) -> None:
    """Raise ValueError, with the arithmetic, unless every stretch has a window."""
    train, val, test = (stop - start for start, stop in (splits.train, splits.val, splits.test))
    if train < context + horizon:
        raise ValueError(
            f"the series is too short: a training window has {context} (--context-length) + {horizon} (--horizon) = "
            f"{context + horizon} rows, the training stretch {train} ({splits.rule})"
        )
    for name, rows in (("validation", val), ("test", test)):
        if rows < horizon:
            raise ValueError(
                f"the series is too short: the {name} stretch has {rows} rows ({splits.rule}), a forecast of it "
                f"{horizon} (--horizon)"
            )


@dataclass(frozen=True)
class Scaler:
    """Mean and population standard deviation (C,) of every channel; a constant channel is only shifted."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray) -> Scaler:
        std = values.std(0)
        return cls(values.mean(0), np.where(std > 0, std, 1.0))

    def scale(self, values: np.ndarray) -> np.ndarray:
        return (values - self.mean) / self.std

    def restore(self, scaled: np.ndarray) -> np.ndarray:
        return scaled * self.std + self.mean


class Windows(Dataset):
    """Windows over one stretch, as views of the series; batches are gathered in one go.

    Args:
        values: (T, C), scaled. marks: (T, F) or None.
        rows: [start, stop) that forecasts lie in. lookback: whether the context may begin before ``start``.

    A batch is a dict of ``past`` (B, L, C), ``future`` (B, H, C) and, with marks, ``past_time`` (B, L, F) and
    ``future_time`` (B, H, F).
    """

    def __init__(
        self,
        values: Tensor,
        marks: Tensor | None,
        rows: tuple[int, int],
        context: int,
        horizon: int,
        *,
        lookback: bool,
    ):
        self.context, self.horizon = context, horizon
        self.first = rows[0] - context if lookback else rows[0]
        self.count = rows[1] - self.first - context - horizon + 1
        if self.first < 0 or self.count < 1:
            raise ValueError(f"no window of {context} + {horizon} rows for the rows {rows} of {len(values)}")
        length = context + horizon
        self._values, self._marks = (None if x is None else _windows(x, length) for x in (values, marks))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        return {name: part[0] for name, part in self.__getitems__([item]).items()}

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> dict[str, Tensor]:
        # the training sampler draws a seed with every item; windows have no use for it
        index = torch.tensor([item[0] if isinstance(item, tuple) else item for item in items]) + self.first
        windows = self._values[index]  # (B, L + H, C)
        batch = {"past": windows[:, : self.context], "future": windows[:, self.context :]}
        if self._marks is not None:
            marks = self._marks[index]
            batch |= {"past_time": marks[:, : self.context], "future_time": marks[:, self.context :]}
        return batch


def _windows(rows: Tensor, length: int) -> Tensor:
    """All windows (T - length + 1, length, C) of ``rows`` (T, C), without a copy."""
    rows = rows.contiguous()
    steps, channels = rows.shape
    return rows.as_strided((steps - length + 1, length, channels), (channels, channels, 1))
