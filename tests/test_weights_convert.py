"""``mixzoo convert``: to our files and back, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import mixzoo
from mixzoo import weights
from mixzoo.scripts.convert import main
from mixzoo.weights._files import sha256


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The smallest model in its authors' layout, with 12 classes."""
    torch.manual_seed(0)
    state = weights.export(mixzoo.create_model("poolformer_s12", num_classes=12).state_dict(), "sail")
    path = tmp_path_factory.mktemp("released") / "poolformer_s12.pth.tar"
    torch.save({"state_dict": state, "epoch": 3}, path)
    return path, state


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in argv])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_there_and_back_again(released, tmp_path, capsys):
    path, state = released
    ours = tmp_path / "ours.safetensors"
    assert main([str(path), str(ours), "--model", "poolformer_s12"]) == 0
    out = capsys.readouterr().out
    assert "layout sail" in out
    assert sha256(ours) in out
    model = mixzoo.load(ours)
    assert model.num_classes == 12
    assert model.config["weights"] == {"source": path.name, "sha256": sha256(path)}
    for name in ("back.pth", "back.safetensors"):
        assert main([str(ours), str(tmp_path / name), "--to", "sail"]) == 0
        back = load_file(tmp_path / name) if name.endswith("safetensors") else torch.load(tmp_path / name)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)
    assert main([str(ours), str(tmp_path / "hf.bin"), "--to", "huggingface"]) == 0
    assert "poolformer.encoder.block.0.0.before_norm.weight" in torch.load(tmp_path / "hf.bin")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "back.pth",
        "back.safetensors",
        "hf.bin",
        "ours.safetensors",
    ]


def test_options(released, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {i}\n" for i in range(5)), encoding="utf-8")
    out = tmp_path / "a.safetensors"
    options = ["--num-classes", 5, "--in-chans", 1, "--img-size", 96, 64, "--class-names", names]
    assert main([str(arg) for arg in (released[0], out, "--model", "poolformer_s12", *options)]) == 0
    model = mixzoo.load(out)
    assert (model.num_classes, model.in_chans, model.img_size) == (5, 1, (96, 64))
    assert model.class_names[4] == "class 4"
    assert "fresh: head.fc" in capsys.readouterr().out


def test_nothing_is_replaced_unasked(released, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"precious")
    assert "give --overwrite" in refused(capsys, released[0], out, "--model", "poolformer_s12")
    assert out.read_bytes() == b"precious"
    assert main([str(released[0]), str(out), "--model", "poolformer_s12", "--overwrite"]) == 0
    assert mixzoo.load(out).num_classes == 12


def test_errors_are_one_line_and_write_nothing(released, tmp_path, capsys):
    source, out = released[0], tmp_path / "a.safetensors"
    html = tmp_path / "html.pth"
    html.write_text("<html>")
    cases = [
        ((), "give SOURCE and OUT"),
        ((source, out), "give --model"),
        ((source, tmp_path / "a.pth", "--model", "poolformer_s12"), "OUT must end in .safetensors"),
        ((source, tmp_path / "a.txt", "--to", "sail"), "OUT must end in"),
        ((source, tmp_path / "no" / "a.safetensors", "--model", "poolformer_s12"), "does not exist"),
        ((source, out, "--model", "poolformer_s13"), "no model named 'poolformer_s13'"),
        ((source, out, "--model", "caformer_s18"), "does not fit caformer_s18"),
        ((html, out, "--model", "poolformer_s12"), "web page"),
        ((tmp_path / "no.pth", out, "--model", "poolformer_s12"), "no such checkpoint file"),
        ((source, out, "--model", "poolformer_s12", "--to", "keras"), "--to must be one of"),
        ((source, tmp_path / "a.pth", "--model", "poolformer_s12", "--to", "mmdetection"), "have no name"),
        ((source, out, "--model", "poolformer_s12", "--class-names", html), "1 lines for 12 classes"),
        ((source, out, "--model", "poolformer_s12", "--img-size", 1, 2, 3), "takes a side"),
    ]
    for argv, message in cases:
        assert message in refused(capsys, *argv)
    assert [file.name for file in tmp_path.iterdir()] == ["html.pth"]


def test_list_layouts(capsys):
    assert main(["--list-layouts"]) == 0
    out = capsys.readouterr().out
    assert "huggingface" in out
    assert "sail-sg/metaformer" in out
