"""Open checkpoint files without running what is in them.

Formats are told by content, not by name: safetensors, torch's zip and older pickles (tensors and plain data only),
NumPy archives. What is not a checkpoint gives one error that names the file and says what it is instead.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# what `mixzoo.save` writes into the header of its files
FORMAT = "mixzoo"
# where training scripts put the weights, in timm's order of preference: averaged weights come first because they are
# the ones that were evaluated and published
NESTINGS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
# names of weights on the Hub, the safe format first
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# what DistributedDataParallel and torch.compile put before every key
PREFIXES = ("module.", "_orig_mod.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model. The model is as it was before."""


@dataclass(frozen=True)
class Contents:
    """What was read from a source.

    Attributes:
        name: the file, or what stands for it in messages.
        tensors: flat state dict, prefixes of wrappers removed.
        metadata: header of a safetensors file.
        ignored: entries beside the tensors and why they are left out.
    """

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)


def read(path: str | Path) -> Contents:
    """Read the tensors of a checkpoint file, or of the one in a folder as the Hub has it.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a checkpoint, is damaged, or would run code.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    if path.is_dir():
        path = _in_folder(path)
    kind = _kind(path)
    if kind == "safetensors":
        tensors, metadata = _read_safetensors(path)
        return unwrap(tensors, str(path), metadata)
    return unwrap(_read_npz(path) if kind == "npz" else _read_torch(path), str(path))


def _in_folder(folder: Path) -> Path:
    """The file with the weights in a folder as the Hub has it, the safe format first."""
    found = next((folder / name for name in HUB_FILES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder}: is a folder without {' or '.join(HUB_FILES)}; give the checkpoint file inside it"
        )
    return found


def unwrap(data: Any, name: str, metadata: dict[str, str] | None = None) -> Contents:
    """Find the state dict in what a file held, or in what the caller passed.

    Nestings are opened in the order of `NESTINGS`, and the prefixes of wrappers are removed from the keys.

    Raises:
        CheckpointError: there are no tensors.
    """
    ignored: dict[str, str] = {}
    while isinstance(data, Mapping):
        inner = next((k for k in NESTINGS if isinstance(data.get(k), Mapping) and data[k]), None)
        if inner is None:
            break
        ignored.update({str(k): f"beside the weights in {inner!r}" for k in data if k != inner})
        data = data[inner]
    if isinstance(data, Tensor) or not isinstance(data, Mapping):
        raise CheckpointError(f"{name}: holds a {type(data).__name__}, not a dict of tensors")
    tensors = {_strip(k): v.detach() for k, v in data.items() if isinstance(v, Tensor) and isinstance(k, str)}
    if not tensors:
        inside = ", ".join(map(str, list(data)[:8])) or "nothing"
        raise CheckpointError(f"{name}: there are no tensors inside, only {inside}")
    ignored.update({str(k): "not a tensor" for k, v in data.items() if not isinstance(v, Tensor)})
    if len(tensors) + sum(not isinstance(v, Tensor) for v in data.values()) != len(data):
        raise CheckpointError(f"{name}: two keys are the same once {' and '.join(PREFIXES)} are removed")
    return Contents(name, tensors, metadata or {}, ignored)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        total = hashlib.sha256()
        for chunk in iter(lambda: file.read(1 << 20), b""):
            total.update(chunk)
    return total.hexdigest()


def _strip(key: str) -> str:
    while key.startswith(PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _kind(path: Path) -> str:
    """ "safetensors", "npz" or "torch"; raises for the usual things that are no checkpoint."""
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes); the download did not finish")
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<script", b"<error")):
        raise CheckpointError(
            f"{path}: is a web page, not a checkpoint; the link led to a login, confirmation or error page. "
            "Open it in a text editor to see which, and download the file itself"
        )
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: is a git-lfs pointer of {size} bytes, not the weights; run `git lfs pull` in its repository"
        )
    if head[:4] == b"PK\x03\x04":
        return "npz" if _is_npz(path) else "torch"
    if len(head) > 9 and head[8:9] == b"{":
        (header,) = struct.unpack("<Q", head[:8])
        if header + 8 > size:
            raise CheckpointError(f"{path}: is truncated; its header alone needs {header + 8} bytes of {size}")
        return "safetensors"
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: is not a safetensors file; it begins with {head[:12]!r}")
    return "torch"


def _is_npz(path: Path) -> bool:
    if path.suffix == ".npz":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is truncated or damaged ({error})") from None


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: torch.from_numpy(archive[key]) for key in archive.files}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise CheckpointError(f"{path}: is truncated or damaged ({error})") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: holds Python objects instead of plain arrays ({error})") from None


def _safe_globals() -> list:
    """Classes that training scripts put beside the weights and that only hold data."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)
    return [
        argparse.Namespace,
        *(bool, int, float, str, dict, list, set, frozenset, tuple),
        # torch fills dicts only, and a path is wanted as text
        (_plain_dict, "collections.defaultdict"),
        (_joined_path, "pathlib.PosixPath"),
        (_joined_path, "pathlib.WindowsPath"),
        np.dtype,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        *(type(np.dtype(kind)) for kind in kinds),
    ]


def _plain_dict(*_factory: Any) -> dict:
    return {}


def _joined_path(*parts: str) -> str:
    return "/".join(parts)


def _read_torch(path: Path) -> Any:
    try:
        # by handle: given a name, torch would go by the suffix
        with open(path, "rb") as file, torch.serialization.safe_globals(_safe_globals()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch has no class of its own for these: a damaged file may raise almost anything
        refused = _refused(path, error)
        if refused:
            raise CheckpointError(
                f"{path}: needs {', '.join(refused)} to be loaded, which may run code, so it was not opened. "
                "If you trust its author, load it once with torch.load(path, weights_only=False) where nothing is at "
                "stake and save only the state dict"
            ) from None
        reason = re.split(r"WeightsUnpickler error:\s*", str(error).strip())[-1].split("\n")[0][:160]
        reason = reason or type(error).__name__
        raise CheckpointError(f"{path}: is truncated, damaged or not a checkpoint ({reason})") from None


def _refused(path: Path, error: Exception) -> list[str]:
    """Names of what the pickle would have called and torch refused."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(_safe_globals()):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the older format, which torch can only open
        names = []
    found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"class ([\w.]+)", str(error))
    if not names and found:
        names = [found.group(1)]
    return sorted(set(names))
