"""The folder of one training run: what it holds, who may write there, and how a run survives being stopped.

    run.json           the settings of the run; a resumed run must have the same
    log.csv            one row an epoch
    best.safetensors   weights of the best epoch with the model's config and class names, for `mixzoo.load`
    last.pt            everything that is needed to go on (plain containers and tensors)
    curves.png         loss and accuracy, on request
    forecasts.png      forecasts of a series

Every file is written beside its place and moved there, so a reader or a killed run never sees half a file.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_NAMES = ("run.json", "log.csv", "best.safetensors", "last.pt", "curves.png", "forecasts.png")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path in the same folder, then move what it wrote to ``path``."""
    # the suffix stays last: writers choose the format by it
    temporary = path.with_name(f".tmp{os.getpid()}-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings with ``group.key`` for those in groups."""
    flat = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


class RunFolder:
    """Files of one run below ``path``; nothing is created before `claim`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def log(self) -> Path:
        return self.path / "log.csv"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def settings(self) -> Path:
        return self.path / "run.json"

    def check(self, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Raise ValueError unless a run with these settings may start, or go on, here. Writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--output {self.path} is a file; give a folder")
        if resume:
            self._check_resumable(settings)
            return
        present = [name for name in _NAMES if (self.path / name).exists()]
        if present and not overwrite:
            raise ValueError(
                f"--output {self.path} holds another run ({', '.join(present)}): go on with it by --resume, "
                "replace it by --overwrite, or give another --output"
            )

    def _check_resumable(self, settings: Mapping[str, Any]) -> None:
        if not self.last.is_file() or not self.settings.is_file():
            raise ValueError(f"--resume: {self.path} holds no last.pt and run.json to go on from")
        try:
            before = json.loads(self.settings.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"--resume: {self.settings} is not valid JSON: {error}") from None
        before, now = _flat(before), _flat(json.loads(json.dumps(settings)))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            what = ", ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
            raise ValueError(f"--resume goes on with the same run, but in {self.path} {what}")

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder ready for a new run: remove an earlier run's files (no others) and write the settings."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in _NAMES:
            (self.path / name).unlink(missing_ok=True)
        text = json.dumps(settings, indent=2) + "\n"
        write_atomically(self.settings, lambda path: path.write_text(text))

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Replace last.pt."""
        write_atomically(self.last, lambda path: torch.save(dict(state), path))

    def read_state(self) -> dict[str, Any]:
        """Content of last.pt, tensors on the CPU."""
        try:
            return torch.load(self.last, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types for a damaged file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"--resume: {self.last} cannot be read: {reason}") from None

    def write_log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace log.csv by these rows, all with the keys of the first one."""

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.log, write)


class StopRequest:
    """Context in which Ctrl-C and SIGTERM ask for a stop at the next safe place; a second Ctrl-C stops at once.

    >>> with StopRequest() as stop:
    ...     bool(stop)
    False
    """

    def __init__(self):
        self._asked = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self._asked

    def _handle(self, signum: int, frame: object) -> None:
        # launchers send SIGTERM after the terminal's SIGINT: only the user's own second Ctrl-C is impatience
        if self._asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def leave_signals_to_parent(worker_id: int) -> None:
    """For processes that load data: Ctrl-C reaches them too, and would end them while the parent still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
