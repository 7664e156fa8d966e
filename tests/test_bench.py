"""`mixzoo bench`: what it measures and prints. Times themselves are never asserted."""

from __future__ import annotations

import csv
import json
import re
import sys
import time

import pytest
import torch
from torch import nn

from mixzoo.scripts import _measure, bench
from mixzoo.scripts._bench_results import Row, best_rows, summarise

QUICK = ["--img-size", "32", "--batch-size", "2", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    monkeypatch.setattr(_measure, "MIN_TURN_S", 0.0)
    monkeypatch.setattr(_measure, "MATMUL_SIDE", 64)


def run(capsys, *arguments: str) -> dict:
    """The JSON that a bench of these arguments prints."""
    assert bench.main([*arguments, *QUICK, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        bench.main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_one_model(capsys):
    result = run(capsys, "poolformer_s12", "--no-memory")
    (row,) = result["rows"]
    assert (row["model"], row["measured"], row["opponent"]) == ("poolformer_s12", "poolformer_s12", None)
    assert (row["batch"], row["size"], row["rounds"], row["note"]) == (2, "3x32x32", 1, "")
    assert row["ms_low"] <= row["ms"] <= row["ms_high"]
    assert row["images_per_s"] == pytest.approx(2e3 / row["ms"])
    assert row["gflops"] == pytest.approx(2 * 2 * row["gmacs"] / (row["ms"] / 1e3))
    assert row["matmul_gflops"] > 0
    assert row["peak_mib"] is row["ratio"] is None
    assert result["environment"]["threads"] == 1
    assert result["summary"] == []


def test_against_timm_takes_both_memory_formats(capsys):
    result = run(capsys, "poolformer_s12", "--against", "timm", "--no-memory")
    ours, *theirs = result["rows"]
    assert ours["opponent"] is None
    assert [row["measured"] for row in theirs] == ["timm:poolformer_s12"] * 2
    assert [row["memory_format"] for row in theirs] == ["contiguous", "channels_last"]
    for row in theirs:
        assert row["ratio"] == pytest.approx(row["ms"] / ours["ms"])
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["gmacs"] == pytest.approx(ours["gmacs"], rel=0.01)
    (summary,) = result["summary"]
    assert (summary["opponent"], summary["models"]) == ("timm", 1)
    assert summary["ratio"] == pytest.approx(min(row["ratio"] for row in theirs))


def test_models_that_timm_lacks_are_listed_as_such(capsys):
    # identityformer is in timm's registry too, but it is ours
    result = run(capsys, "identityformer_s12", "--against", "timm", "--no-memory")
    (row,) = result["rows"]
    assert row["note"] == "not in timm"
    assert row["ms"] > 0


def test_training_against_other_models(capsys):
    result = run(
        capsys, "metaformer_s12", "--token-mixer", "identity", "--train", "--no-memory",
        "--against", "poolformer_s12", "--against", "timm:resnet18",
    )  # fmt: skip
    ours, swapped, *theirs = result["rows"]
    assert (ours["step"], swapped["opponent"]) == ("training", "poolformer_s12")
    assert {row["opponent"] for row in theirs} == {"timm:resnet18"}
    assert ours["gflops"] == pytest.approx(3 * 2 * 2 * ours["gmacs"] / (ours["ms"] / 1e3))
    assert [item["opponent"] for item in result["summary"]] == ["poolformer_s12", "timm:resnet18"]


def test_peak_memory_comes_from_a_fresh_process():
    contestant = _measure.Contestant("poolformer_s12", batch_size=8, img_size=(64, 64), train=True, threads=1)
    memory = _measure.peak_memory(contestant)
    assert memory.method in {"resident set", "ru_maxrss"}
    # the gradients alone are the size of the parameters
    assert 4 * 11.9e6 / 2**20 < memory.mib < 2000


def test_peak_memory_says_why_there_is_none(monkeypatch):
    monkeypatch.setattr(_measure, "_command", lambda _: [sys.executable, "-c", "import sys; sys.exit('out of memory')"])
    assert _measure.peak_memory(_measure.Contestant("poolformer_s12")) == "out of memory"


def test_growth_of_the_resident_set_is_that_of_the_step():
    def step() -> None:
        block = bytearray(b"1") * (64 * 2**20)
        # a busy machine may not look at the memory at once
        time.sleep(0.3)
        del block

    # a system short of memory takes cold pages of this large process back meanwhile, and growth comes out too small
    assert max(_measure.resident_growth(step).mib for _ in range(3)) == pytest.approx(64, abs=8)


def test_failures_become_notes(capsys):
    assert bench.main(["poolformer_s12", *QUICK, "--img-size", "2", "--no-memory", "--format", "json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["ms"] is None
    assert row["note"].startswith("failed: ValueError: img_size")


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("bad shape\nmore"), "failed: RuntimeError: bad shape"),
    ],
)
def test_errors_in_a_race_leave_the_others_running(error, note):
    def fails() -> None:
        raise error

    steps = {"good": lambda: None, "bad": fails}
    times, failures = _measure.interleave(steps, device="cpu", rounds=2, budget_s=1.0)
    assert failures == {"bad": note}
    assert len(times["good"]) == 2


def test_rounds_take_turns_and_end_with_the_budget():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times, _ = _measure.interleave(steps, device="cpu", rounds=9, budget_s=0.0)
    assert {len(seconds) for seconds in times.values()} == {_measure.MIN_ROUNDS}
    assert calls == [*"aabbcc", *"abc", *"bca", *"cab"]


def test_part_times_name_the_parts_in_order():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    times = _measure.part_times(model, torch.zeros(2, 4), device="cpu", rounds=1)
    assert list(times) == ["0", "1.0", "1.1"]
    assert not model[0]._forward_hooks


def test_stages_stand_beside_their_multiply_adds(capsys):
    parts = run(capsys, "poolformer_s12", "--stages", "--no-memory")["parts"]
    assert [part["part"] for part in parts] == ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head"]
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    assert all(part["gmacs"] > 0 for part in parts)


def test_formats_and_files(capsys, tmp_path):
    arguments = ["poolformer_s12", *QUICK, "--no-memory"]
    for name, check in (
        ("out.csv", lambda text: next(csv.DictReader(text.splitlines()))["model"] == "poolformer_s12"),
        ("out.md", lambda text: re.search(r"^\| poolformer_s12 +\|", text, re.MULTILINE)),
        ("out.json", lambda text: json.loads(text)["rows"][0]["model"] == "poolformer_s12"),
        ("out.txt", lambda text: "matmul GFLOP/s" in text),
    ):
        assert bench.main([*arguments, "--output", str(tmp_path / name)]) == 0
        assert check((tmp_path / name).read_text())
    assert capsys.readouterr().out == ""


def test_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    run(capsys, "poolformer_s12", "--no-memory", "--plot", str(tmp_path / "speed.png"))
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("poolformer_s12", (224, 224)),
        ("metaformer_s12", (224, 224)),
        ("caformer_s18.sail_in1k_384", (384, 384)),
        ("timm:resnet18.a1_in1k", (224, 224)),
    ],
)
def test_published_size(name, size):
    assert _measure.published_size(name) == size


def test_select_models():
    assert bench.select_models(["caformer_s18", "timm:resnet18", "poolformer_s1*"]) == [
        "caformer_s18",
        "timm:resnet18",
        "poolformer_s12",
        "poolformer_s12_feat",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["poolformer_s13"], r"'poolformer_s13'.*'poolformer_s12'"),
        (["poolformer_s12.no_such_tag"], r"no release named 'poolformer_s12.no_such_tag'"),
        (["no_such_*"], r"'no_such_\*'"),
        (["timm:resnet19"], r"timm has no model 'resnet19'; did you mean"),
        (["poolformer_s12", "--against", "timn"], r"'timn'"),
        (["poolformer_s12", "--img-size", "1", "2", "3"], r"--img-size"),
        (["poolformer_s12", "--seq-len", "64"], r"--seq-len is for models of texts, which poolformer_s12 is not"),
        (["lra_fnet_text", "--img-size", "64"], r"--img-size is for models of images, which lra_fnet_text is not"),
        (["poolformer_s12", "--batch-size", "0"], r"--batch-size"),
        (["poolformer_s12", "--token-mixer", "[1"], r"not valid JSON"),
        (["poolformer_s12", "--token-mixer", "poolin"], r"'poolin'.*'pooling'"),
        (["poolformer_s12", "--stages", "--train"], r"--stages"),
        (["poolformer_s12", "--output", "no/such/folder/out.md"], r"no/such/folder"),
        (["poolformer_s12", "--device", "no_such_device"], r"--device no_such_device"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(capsys, arguments, message):
    assert re.search(message, refusal(capsys, *arguments))


def test_summary_takes_the_better_format_of_each_opponent():
    def row(model, opponent, memory_format, ms, ratio, memory=None) -> Row:
        return Row(model, model, opponent, memory_format, 1, ms=ms, ratio=ratio, memory_ratio=memory)

    rows = [
        row("a", None, "contiguous", 10, None),
        row("a", "timm", "contiguous", 40, 4.0, 2.0),
        row("a", "timm", "channels_last", 20, 2.0, 3.0),
        row("b", "timm", "contiguous", 8, 8.0),
        row("b", "timm:x", "contiguous", 3, 3.0),
    ]
    assert [r.ms for r in best_rows(rows)] == [20, 8, 3]
    first, second = summarise(rows)
    assert first == {
        "opponent": "timm",
        "models": 2,
        "ratio": pytest.approx(4.0),
        "lowest_ratio": 2.0,
        "lowest_model": "a",
        "memory_ratio": pytest.approx(3.0),
    }
    assert second["opponent"] == "timm:x"


@pytest.mark.parametrize("name", ["timemixer_m4_yearly_12_6", "lra_fnet_listops"])
@pytest.mark.parametrize("train", [False, True])
def test_texts_and_series_are_measured_too(name, train):
    model, x = _measure.build(_measure.Contestant(name, batch_size=2, train=train, threads=1))
    assert x.shape[0] == 2
    _measure.make_step(model, x, train=train)()


@pytest.mark.parametrize(("mixer", "length"), [(None, 64), (None, 3000), ("spatial_fc", 64)])
def test_texts_are_as_long_as_asked_for(mixer, length):
    contestant = _measure.Contestant("lra_fnet_listops", batch_size=2, token_mixer=mixer, seq_len=length, threads=1)
    model, x = _measure.build(contestant)
    assert x.shape == (2, length)
    _measure.make_step(model, x, train=False)()


def test_series_are_measured_with_their_time_marks():
    model, x = _measure.build(_measure.Contestant("timemixer_etth1_96_96", batch_size=2, threads=1))
    seen = []
    model.marks.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    _measure.make_step(model, x, train=False)()
    assert seen[0] == (96, 2, 4)
