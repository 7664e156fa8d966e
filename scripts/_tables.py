"""Tables of the command line: one list of rows, written as aligned text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMATS = ("text", "markdown", "csv", "json")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: key of the value in a row.
        title: heading in text and Markdown; CSV and JSON keep the key.
        show: value to text for people; None and missing values are shown as a dash.
        left: align to the left.
    """

    key: str
    title: str
    show: Callable[[Any], str] = str
    left: bool = False

    def cell(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.key)
        return "-" if value is None else self.show(value)


def text_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned plain text."""
    cells = [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for line in cells:
        padded = (
            cell.ljust(width) if column.left else cell.rjust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """A GitHub table."""
    lines = [[column.title for column in columns], [":--" if column.left else "--:" for column in columns]]
    lines += [[column.cell(row).replace("|", "\\|") for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def csv_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """Comma-separated values under the columns' keys, numbers unrounded."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [column.key for column in columns], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    return buffer.getvalue().rstrip("\n")


def json_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """A JSON list with one object per row."""
    return json.dumps([{column.key: row.get(column.key) for column in columns} for row in rows], indent=2)


RENDER = {"text": text_table, "markdown": markdown_table, "csv": csv_table, "json": json_table}
