"""`mixzoo onnx`: graphs in ONNX's own runtime against the models, without transforms and complex numbers."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

import mixzoo
from mixzoo.models import example_inputs
from mixzoo.scripts import onnx

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

for _name in ("torch.onnx", "onnxscript", "onnx_ir"):
    logging.getLogger(_name).setLevel(logging.ERROR)

# mixer, options, grid: one that the matrices of eager mode fit, one beyond them and odd
MIXERS = [
    ("fourier", {}, (6, 7)),
    ("fourier", {}, (9,)),
    ("global_filter", {}, (6, 7)),
    ("global_filter", {}, (33, 5)),
    ("aff", {}, (35, 4)),
    ("scattering", {}, (7, 6)),
    ("scattering", {"form": "channel_token"}, (6, 10)),
]


@pytest.mark.parametrize(("name", "options", "grid"), MIXERS)
def test_spectral_mixers(name, options, grid, tmp_path):
    torch.manual_seed(0)
    mixer = mixzoo.create_mixer(name, 16, rank=len(grid), grid_size=grid, **options).eval()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs, path = {"x": torch.randn(2, *grid, 16)}, tmp_path / "mixer.onnx"
    onnx.write_graph(mixer, inputs, path)
    assert onnx.difference(mixer, inputs, path) < 1e-5
    (given,) = onnxruntime.InferenceSession(path).get_inputs()
    assert given.type == "tensor(float)"


@pytest.mark.parametrize("name", ["gfnet_h_ti", "affnet_et", "svt_s_paper"])
def test_models_of_any_batch(name, small, tmp_path):
    model, path = small(name), tmp_path / "model.onnx"
    written = onnx.write_graph(model, example_inputs(model, 2), path, dynamic_batch=True)
    assert written["mb"] > 0
    for batch in (2, 3):
        assert onnx.difference(model, example_inputs(model, batch), path) < 1e-4


def test_command_writes_a_graph_and_tells_how_near_it_is(small, tmp_path, capsys):
    mixzoo.save(small("gfnet_ti"), tmp_path / "model.safetensors")
    path = tmp_path / "model.onnx"
    command = [str(tmp_path / "model.safetensors"), "--output", str(path), "--batch-size", "1", "--format", "json"]
    assert onnx.main(command) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["status"], row["input"]) == ("ok", "1x3x64x48")
    assert row["difference"] < 1e-4
    assert row["mb"] == pytest.approx(path.stat().st_size / 1e6)
    assert {"DFT", "STFT"}.isdisjoint(_operators(path))


def _operators(path: Path) -> set[str]:
    import onnx as package

    return {node.op_type for node in package.load(path).graph.node}


def test_a_failure_is_a_row(small, monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(onnx, "write_graph", fail)
    assert onnx.main(["isoformer_ti16", "--img-size", "32", "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["status"] == "failed: RuntimeError: no such operator"


def test_a_failure_leaves_the_file_that_was_there(monkeypatch, tmp_path, capsys):
    def fail(_model, _inputs, path, _dynamic):
        path.write_bytes(b"half")
        raise RuntimeError("disk full")

    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")
    monkeypatch.setattr(onnx, "write_graph", fail)
    assert onnx.main(["isoformer_ti16", "--img-size", "32", "--output", str(path), "--overwrite"]) == 1
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_model"], "no_such_model"),
        (["gfnet_*", "--output", "x.onnx"], "one model, not 7"),
        (["gfnet_ti", "--output", "x.pt"], "must end in .onnx"),
        (["gfnet_ti", "--output", "nowhere/x.onnx"], "nowhere does not exist"),
        (["gfnet_ti", "--batch-size", "0"], "--batch-size must be positive"),
        (["gfnet_ti", "--img-size", "1", "2", "3"], "not 3 numbers"),
    ],
)
def test_errors_before_any_work(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        onnx.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
