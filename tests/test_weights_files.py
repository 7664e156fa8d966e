"""Opening files: every format that is read, and one clear error for each thing that is no checkpoint."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mixzoo
from mixzoo.weights import CheckpointError
from mixzoo.weights._files import read, sha256

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
SAVED_ARGS = {
    "args": argparse.Namespace(lr=1e-3, opt="adamw"),
    "epoch": 300,
    "metric": np.float64(0.5),
    "best": np.float32(0.5),
    "counts": collections.defaultdict(int, a=1),
    "output": pathlib.Path("a/b"),
    "history": [{"top1": 1.0}, (1, 2), {3}],
}


def same(contents) -> None:
    assert contents.tensors.keys() == STATE.keys()
    assert all(torch.equal(contents.tensors[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".bin", ".pt"])
@pytest.mark.parametrize("old_format", [False, True])
def test_torch_files(tmp_path, suffix, old_format):
    path = tmp_path / f"weights{suffix}"
    torch.save(STATE, path, _use_new_zipfile_serialization=not old_format)
    same(read(path))


def test_safetensors_and_npz_are_told_by_content(tmp_path):
    save_file(STATE, tmp_path / "a.bin", metadata={"k": "v"})
    np.savez(tmp_path / "b.npz", **{key: tensor.numpy() for key, tensor in STATE.items()})
    os.rename(tmp_path / "b.npz", tmp_path / "b.pth")
    same(read(tmp_path / "a.bin"))
    same(read(tmp_path / "b.pth"))
    assert read(tmp_path / "a.bin").metadata == {"k": "v"}


@pytest.mark.parametrize("nesting", ["model", "state_dict", "model_ema", "state_dict_ema", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_nestings_and_prefixes(tmp_path, nesting, prefix):
    path = tmp_path / "last.pth.tar"
    torch.save({nesting: {prefix + key: tensor for key, tensor in STATE.items()}, **SAVED_ARGS}, path)
    contents = read(path)
    same(contents)
    assert set(contents.ignored) == set(SAVED_ARGS)


def test_averaged_weights_are_preferred(tmp_path):
    other = {key: tensor + 1 for key, tensor in STATE.items()}
    for nesting in ("state_dict_ema", "model_ema"):
        torch.save({"state_dict": other, nesting: STATE, "model": other}, tmp_path / "a.pth")
        same(read(tmp_path / "a.pth"))
    torch.save({"state_dict": STATE, "state_dict_ema": None, "model": other}, tmp_path / "a.pth")
    same(read(tmp_path / "a.pth"))
    torch.save({"model": {"state_dict": STATE}}, tmp_path / "a.pth")
    same(read(tmp_path / "a.pth"))


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def torch_bytes(tmp_path) -> bytes:
    torch.save({"w": torch.randn(300, 300)}, tmp_path / "whole.pth")
    return (tmp_path / "whole.pth").read_bytes()


def safetensors_bytes(tmp_path) -> bytes:
    save_file({"w": torch.randn(300, 300)}, tmp_path / "whole.safetensors")
    return (tmp_path / "whole.safetensors").read_bytes()


BAD = {
    "empty": (lambda p: b"", "is empty"),
    "html": (lambda p: b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "xml": (lambda p: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    "lfs": (lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "truncated zip": (lambda p: torch_bytes(p)[:5000], "truncated"),
    "truncated in the directory": (lambda p: torch_bytes(p)[:-40], "truncated"),
    "damaged": (lambda p: b"\x80\x02garbage" + bytes(100), "truncated, damaged"),
    "text": (lambda p: b"404: Not Found", "not a checkpoint"),
    "truncated safetensors": (lambda p: safetensors_bytes(p)[:4000], "truncated"),
    "truncated header": (lambda p: struct.pack("<Q", 10_000) + b'{"w":', "truncated"),
    "truncated old format": (lambda p: pickle.dumps({"w": 1})[:-3], "truncated"),
    "no tensors": (lambda p: saved({"epoch": 3, "args": argparse.Namespace()}, p), "no tensors inside"),
    "empty dict": (lambda p: saved({}, p), "no tensors inside"),
    "one tensor": (lambda p: saved(torch.ones(3), p), "holds a Tensor"),
    "whole model": (lambda p: saved(torch.nn.Linear(2, 2), p), r"needs torch\.nn\.modules\.linear\.Linear"),
}


def saved(data, folder) -> bytes:
    torch.save(data, folder / "data.pth")
    return (folder / "data.pth").read_bytes()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_checkpoint(tmp_path, case, suffix):
    make, message = BAD[case]
    path = tmp_path / f"some-name{suffix}"
    path.write_bytes(make(tmp_path))
    model = mixzoo.create_model("poolformer_s12", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if suffix == ".safetensors" and case in ("damaged", "text", "truncated old format"):
        message = "not a safetensors file"
    with pytest.raises(CheckpointError, match=message) as caught:
        mixzoo.load_checkpoint(model, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path, old_format):
    path, folder = tmp_path / "bad.pth", tmp_path / "created"
    torch.save({"w": torch.ones(2), "x": Payload(folder)}, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError, match=r"mkdir.*may run code") as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert not folder.exists()
    path.write_bytes(pickle.dumps({"w": Payload(folder)}))
    with pytest.raises(CheckpointError, match=r"mkdir|not a checkpoint"):
        read(path)
    assert not folder.exists()


def test_npz_with_objects_is_refused(tmp_path):
    path, folder = tmp_path / "bad.npz", tmp_path / "created"
    np.savez(path, x=np.array([Payload(folder)], dtype=object))
    with pytest.raises(CheckpointError, match="Python objects"):
        read(path)
    assert not folder.exists()


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pth: no such checkpoint file"):
        read(tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read(tmp_path)
    model = mixzoo.create_model("poolformer_s12", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    with pytest.raises(FileNotFoundError, match=r"no such file, and no model named 'poolformer_s13'.*poolformer_s12"):
        mixzoo.load_checkpoint(model, "poolformer_s13")
    with pytest.raises(FileNotFoundError, match=r"weights\.pth"):
        mixzoo.load_checkpoint(model, "weights.pth")
    with pytest.raises(TypeError, match="source must be a path"):
        mixzoo.load_checkpoint(model, 3)


def test_two_keys_that_become_one(tmp_path):
    torch.save({"a": torch.ones(1), "module.a": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="two keys are the same"):
        read(tmp_path / "a.pth")


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
