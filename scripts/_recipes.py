"""What every recipe of `mixzoo finetune` says, whatever the task; each task adds its own fields and presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Defaults of the options of the same names.

    Attributes:
        lr: for ``batch_size`` items an update; another batch scales it in proportion.
        schedule: name in `SCHEDULES`. warmup: its epochs of warm-up.
        patience: epochs without a gain of more than ``min_gain`` after which a run ends; None for never.
        evidence: command, result, hardware and time, as measured; empty if it was not.
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.0
    drop_path: float = 0.0
    ema: float = 0.0
    grad_clip: float = 0.0
    patience: int | None = None
    min_gain: float = 0.0
    evidence: str = ""


def table(rows: Mapping[tuple[str, str], Recipe]) -> str:
    """Presets of a task as lines of text, for `--help`."""
    lines = []
    for (name, start), row in rows.items():
        values = f"{row.epochs} epochs, batch {row.batch_size}, {row.optimizer}, lr {row.lr:g}, {row.schedule}"
        values += f", layer decay {row.layer_decay:g}" if row.layer_decay < 1 else ""
        values += f", patience {row.patience}" if row.patience else ""
        lines.append(f"  {name:<23}{start:<8} {values}")
        lines += [f"{'':34}{line}" for line in row.evidence.splitlines()]
    return "\n".join(lines)
