"""mixzoo finetune --task forecast: files, splits, scaling, windows, anchors, early stopping, resumption, reports."""

from __future__ import annotations

import csv
import json
import os
import signal
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mixzoo
from mixzoo.models._registry import MODELS, ModelSpec
from mixzoo.scripts import _training, finetune
from mixzoo.scripts._anchors import anchor_forecasts, apply_linear, linear_map, repeat_last, score
from mixzoo.scripts._series_data import (
    MARKS_OF,
    Scaler,
    Series,
    Windows,
    check_lengths,
    read_series,
    split_rows,
    time_marks,
)
from mixzoo.scripts._series_presets import preset_for

CHANNELS = 3
# a folder that holds ETTh1.csv and ETTh2.csv, or a folder ett with them
DATA = os.environ.get("MIXZOO_DATA", "")
# MSE, MAE of repeat last value, repeat last day, zeros, linear at look-back 96 and 512: horizon 96 and 720
ETT = {
    ("ETTh1", 96): ((1.2944, 0.7132), (0.5122, 0.4333), (1.1099, 0.7960), (0.3832, 0.3915), (0.3672, 0.3913)),
    ("ETTh1", 720): ((1.3351, 0.7550), (0.6554, 0.5141), (1.0972, 0.8017), (0.4616, 0.4556), (0.4233, 0.4447)),
    ("ETTh2", 96): ((0.4317, 0.4216), (0.3905, 0.3802), (3.1560, 1.3623), (0.2890, 0.3377), (0.2688, 0.3334)),
    ("ETTh2", 720): ((0.5945, 0.5190), (0.5255, 0.4739), (3.1127, 1.3448), (0.4157, 0.4355), (0.3784, 0.4208)),
}


class TinyForecaster(nn.Module):
    """A map over time with dropout, and a shift by the time marks: (B, L, C) -> (B, H, C)."""

    modality = "series"
    # files are written for models of the package alone
    __module__ = "mixzoo.models.tiny"

    def __init__(
        self,
        *,
        context_length: int = 24,
        prediction_length: int = 8,
        num_channels: int = CHANNELS,
        freq: str = "h",
        marked: bool = True,
        drop_rate: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.context_length, self.prediction_length, self.num_channels = context_length, prediction_length, num_channels
        self.class_names = None
        self.forward_inputs = ("past_time_features",) if marked else ()
        self.map = nn.Linear(context_length, prediction_length, device=device, dtype=dtype)
        self.marks = nn.Linear(len(MARKS_OF[freq]), 1, device=device, dtype=dtype) if marked else None
        self.drop = nn.Dropout(drop_rate)

    def forward(self, past_values, past_time_features=None):
        mean = past_values.mean(1, keepdim=True)
        y = self.map(self.drop(past_values - mean).transpose(1, 2)).transpose(1, 2) + mean  # (B, H, C)
        return y if past_time_features is None else y + self.marks(past_time_features).mean(1, keepdim=True)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(
        MODELS, "tiny_forecaster", ModelSpec("tiny_forecaster", TinyForecaster, {}, modality="series", classifier=None)
    )


def wave(rows: int, step: timedelta = timedelta(hours=1), seed: int = 0) -> tuple[list[datetime], np.ndarray]:
    """A noisy daily wave at three scales and levels."""
    rng = np.random.default_rng(seed)
    hours = np.arange(rows)
    day = np.sin(2 * np.pi * hours / 24)[:, None] * [1.0, 5.0, 0.2] + [0.0, 100.0, -3.0]
    values = day + rng.normal(size=(rows, CHANNELS)) * [0.2, 1.0, 0.04]
    return [datetime(2020, 1, 1) + i * step for i in range(rows)], values


def write_csv(path, dates, values, names=("a", "b", "c")) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(["date"] if dates else []), *names])
        for i, row in enumerate(values):
            writer.writerow([*([dates[i]] if dates else []), *(f"{x:.6f}" for x in row)])
    return path


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "waves.csv", *wave(600))


def run(*arguments, output) -> int:
    return finetune.main([str(a) for a in ("tiny_forecaster", *arguments, "--cpu", "--output", output)])


def log_of(output) -> list[dict[str, float]]:
    with (output / "log.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_reads_dates_columns_and_marks(waves, tmp_path):
    series = read_series(waves)
    assert (series.columns, series.freq, series.step, series.season) == (("a", "b", "c"), "h", 3600, 24)
    assert series.values.shape == (600, CHANNELS)
    marks = time_marks(series.dates, "h")
    # 2020-01-01 is a Wednesday and day 1 of month and year
    np.testing.assert_allclose(marks[0], [-0.5, 2 / 6 - 0.5, -0.5, -0.5], atol=1e-6)
    np.testing.assert_allclose(marks[47], [0.5, 3 / 6 - 0.5, 1 / 30 - 0.5, 1 / 365 - 0.5], atol=1e-6)
    some = read_series(waves, columns=["c", "a"])
    np.testing.assert_array_equal(some.values, series.values[:, [2, 0]])
    plain = read_series(write_csv(tmp_path / "plain.csv", None, wave(50)[1]))
    assert (plain.dates, plain.freq, plain.season) == (None, None, None)
    dates, values = wave(50)
    odd = read_series(write_csv(tmp_path / "odd.csv", [f"{d:%Y/%m/%d %H:%M}" for d in dates], values))
    assert odd.dates == tuple(dates)
    del dates[20:25]
    assert "gaps in the dates before line 22" in read_series(write_csv(tmp_path / "gaps.csv", dates, values[:45])).note


@pytest.mark.parametrize(
    ("step", "freq", "season"),
    [
        (1, "s", 86400),
        (60, "t", 1440),
        (900, "t", 96),
        (3600, "h", 24),
        (86400, "d", 7),
        (604800, "w", 52),
        (2678400, "m", 12),
    ],
)
def test_frequency_follows_the_step(step, freq, season):
    dates = tuple(datetime(2020, 1, 1) + i * timedelta(seconds=step) for i in range(5))
    series = Series("s", ("a",), np.zeros((5, 1)), dates, step)
    assert (series.freq, series.season) == (freq, season)
    marks = time_marks(dates, freq)
    assert marks.shape == (5, len(MARKS_OF[freq]))
    assert np.abs(marks).max() <= 0.5


BAD_CELLS = [
    ("", "b is missing in line 12; 2 of 150 values cannot be used, in lines 12, 31"),
    ("NaN", "b is missing in line 12"),
    ("inf", "b is 'inf', no number in line 12"),
    ("x7", "b is 'x7', no number in line 12"),
]


@pytest.mark.parametrize(("cell", "said"), BAD_CELLS)
def test_values_that_are_missing_are_named_by_line(tmp_path, cell, said):
    path = write_csv(tmp_path / "holes.csv", *wave(50))
    lines = path.read_text().splitlines()
    for line in (12, 31):
        parts = lines[line - 1].split(",")
        lines[line - 1] = ",".join([*parts[:2], cell, *parts[3:]])
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"holes\.csv: b") as error:
        read_series(path)
    assert said in str(error.value)
    assert read_series(path, columns=["a", "c"]).values.shape == (50, 2)


def test_files_that_are_no_series_are_refused(tmp_path):
    dates, values = wave(20)
    dates[7] = dates[6]
    with pytest.raises(ValueError, match="date in line 9 is not after the line before"):
        read_series(write_csv(tmp_path / "same.csv", dates, values))
    (tmp_path / "bare.csv").write_text("1,2\n3,4\n")
    with pytest.raises(ValueError, match="must be a header"):
        read_series(tmp_path / "bare.csv")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(ValueError, match="2 columns, line 3 not"):
        read_series(tmp_path / "ragged.csv")
    (tmp_path / "empty.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="no rows"):
        read_series(tmp_path / "empty.csv")
    (tmp_path / "semicolons.csv").write_text("a;b\n1;2\n")
    with pytest.raises(ValueError, match="separated by commas, the first line has ';'"):
        read_series(tmp_path / "semicolons.csv")
    (tmp_path / "clock.csv").write_text("timestamp,a\n1577836800,1\n1577840400,2\n")
    with pytest.raises(ValueError, match=r"timestamp is '1577836800' in line 2, no date.*--columns"):
        read_series(tmp_path / "clock.csv")
    assert read_series(tmp_path / "clock.csv", columns=["a"]).values.tolist() == [[1], [2]]


def test_an_index_without_a_heading_is_no_channel(tmp_path):
    (tmp_path / "frame.csv").write_text(",a\n0,5\n1,6\n2,7\n")
    series = read_series(tmp_path / "frame.csv")
    assert (series.columns, series.values.tolist()) == (("a",), [[5], [6], [7]])
    assert "counts rows" in series.note
    (tmp_path / "dated.csv").write_text(",a\n2020-01-01 00:00,5\n2020-01-01 01:00,6\n")
    assert (read_series(tmp_path / "dated.csv").columns, read_series(tmp_path / "dated.csv").freq) == (("a",), "h")
    (tmp_path / "both.csv").write_text(",date,a\n0,2020-01-01,5\n1,2020-01-02,6\n")
    assert (read_series(tmp_path / "both.csv").columns, read_series(tmp_path / "both.csv").freq) == (("a",), "d")
    (tmp_path / "values.csv").write_text(",a\n3,5\n1,6\n")
    assert read_series(tmp_path / "values.csv").columns == ("", "a")


def test_splits_are_those_of_the_protocol():
    _, values = wave(100)
    names = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
    hourly = Series("x", names, np.zeros((17_420, 7)), (), 3600)
    splits = split_rows(hourly)
    assert (splits.train, splits.val, splits.test) == ((0, 8640), (8640, 11520), (11520, 14400))
    quarters = split_rows(Series("x", names, np.zeros((69_680, 7)), (), 900))
    assert quarters.test == (46_080, 57_600)
    plain = Series("x", ("a", "b", "c"), values)
    assert vars(split_rows(plain)) | {"rule": 0} == {"train": (0, 70), "val": (70, 80), "test": (80, 100), "rule": 0}
    assert split_rows(plain, "50,20,10").test == (70, 80)
    for rule, said in (
        ("50,20,40", "50 \\+ 20 \\+ 40 = 110 rows; there are 100"),
        ("7:3", "give auto"),
        ("ett", "date"),
    ):
        with pytest.raises(ValueError, match=said):
            split_rows(plain, rule)
    with pytest.raises(
        ValueError, match=r"60 \(--context-length\) \+ 12 \(--horizon\) = 72 rows, the training stretch 70"
    ):
        check_lengths(split_rows(plain), 60, 12)
    with pytest.raises(ValueError, match="validation stretch has 10 rows"):
        check_lengths(split_rows(plain), 20, 12)


def test_windows_are_the_slices_and_look_back():
    values = torch.arange(40.0).reshape(20, 2)
    marks = torch.arange(20.0)[:, None]
    train = Windows(values, marks, (0, 12), 4, 2, lookback=False)
    test = Windows(values, None, (12, 20), 4, 2, lookback=True)
    assert (len(train), len(test)) == (12 - 6 + 1, 8 - 2 + 1)
    batch = train.__getitems__([0, (6, 99)])
    assert torch.equal(batch["past"], torch.stack([values[0:4], values[6:10]]))
    assert torch.equal(batch["future"], torch.stack([values[4:6], values[10:12]]))
    assert torch.equal(batch["future_time"], torch.stack([marks[4:6], marks[10:12]]))
    assert torch.equal(test[0]["past"], values[8:12])
    assert torch.equal(test[6]["future"], values[18:20])
    assert train._values.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


def test_scaler_knows_the_training_rows_alone():
    values = wave(100)[1]
    scaler = Scaler.fit(values[:70])
    scaled = scaler.scale(values)
    np.testing.assert_allclose(scaled[:70].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled[:70].std(0), 1)
    np.testing.assert_allclose(scaler.restore(scaled), values)
    assert (Scaler.fit(np.ones((5, 1))).scale(np.ones((5, 1))) == 0).all()


def test_anchors_equal_their_definition():
    values = Scaler.fit(wave(200)[1]).scale(wave(200)[1])
    train, test, context, horizon = (0, 140), (160, 200), 30, 6
    anchors = anchor_forecasts(values, train, context, horizon, 24)
    x, y = [], []
    for start in range(140 - 36 + 1):
        for c in range(CHANNELS):
            window = values[start : start + 36, c]
            x.append(window[:30] - window[:30].mean())
            y.append(window[30:] - window[:30].mean())
    x, y = np.array(x), np.array(y)
    gram = x.T @ x
    matrix = np.linalg.inv(gram + 1e-3 * np.trace(gram) / 30 * np.eye(30)) @ x.T @ y
    np.testing.assert_allclose(linear_map(values, train, context, horizon), matrix, atol=1e-10)
    for name, forecast in (
        ("repeat last 24 steps", lambda past: past[-24:][:6]),
        ("repeat last value", lambda past: np.tile(past[-1:], (6, 1))),
        ("mean of the training rows", lambda past: np.zeros((6, CHANNELS))),
        ("linear, closed form, look-back 30", lambda past: matrix.T @ (past - past.mean(0)) + past.mean(0)),
    ):
        errors = [forecast(values[t - 30 : t]) - values[t : t + 6] for t in range(160, 200 - 6 + 1)]
        found = score(anchors.pop(name), values, test, context, horizon)
        assert found["mse"] == pytest.approx(np.mean(np.square(errors)))
        assert found["mae"] == pytest.approx(np.mean(np.abs(errors)))
    assert not anchors
    assert repeat_last(5, 2)(np.arange(6.0)[None]).tolist() == [[4, 5, 4, 5, 4]]
    constant = np.ones((60, 1))
    assert score(apply_linear(linear_map(constant, (0, 40), 8, 4)), constant, (40, 60), 8, 4)["mse"] == 0
    assert set(anchor_forecasts(values, train, 12, 6, 24)) & {"repeat last 24 steps"} == set()


@pytest.mark.parametrize(("name", "horizon"), ETT, ids=str)
def test_published_anchors_of_ett(name, horizon):
    """The deterministic ones, to four digits: they change with any mistake in splits, scaling, shift or last batch."""
    found = [path for folder in ("", "ett") if DATA and (path := Path(DATA, folder, f"{name}.csv")).is_file()]
    if not found:
        pytest.skip("MIXZOO_DATA names no folder with ETTh1.csv and ETTh2.csv")
    series = read_series(found[0])
    splits = split_rows(series)
    values = Scaler.fit(series.values[slice(*splits.train)]).scale(series.values)
    found = {}
    for context in (96, 512):
        for title, forecast in anchor_forecasts(values, splits.train, context, horizon, series.season).items():
            found[title] = score(forecast, values, splits.test, context, horizon)
    titles = ("repeat last value", "repeat last 24 steps", "mean of the training rows")
    titles += tuple(f"linear, closed form, look-back {context}" for context in (96, 512))
    for title, (mse, mae) in zip(titles, ETT[name, horizon], strict=True):
        assert round(found[title]["mse"], 4) == mse, title
        assert round(found[title]["mae"], 4) == mae, title
    # a model that repeats the last value is measured the same by the command's own loaders
    windows = Windows(torch.from_numpy(values.astype(np.float32)), None, splits.test, 96, horizon, lookback=True)
    assert len(windows) == 2880 - horizon + 1
    batch = windows.__getitems__(list(range(len(windows))))
    error = (batch["past"][:, -1:] - batch["future"]).double()
    assert round(error.square().mean().item(), 4) == ETT[name, horizon][0][0]


COMMON = ("--horizon", 8, "--context-length", 48, "--epochs", 3, "--batch-size", 32, "--lr", 3e-3)


@pytest.fixture(scope="module")
def straight(waves, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "straight"
    spec = ModelSpec("tiny_forecaster", TinyForecaster, {}, modality="series", classifier=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny_forecaster", spec)
        assert run("--data", waves, *COMMON, "--plot", "--per-class", output=output) == 0
    return output


def test_learns_and_tells_the_anchors(straight, waves, capsys):
    rows = log_of(straight)
    assert rows[-1]["val_mse"] < rows[0]["val_mse"]
    assert rows[0]["train_mse"] == rows[0]["train_loss"]
    settings = json.loads((straight / "run.json").read_text())
    assert (settings["horizon"], settings["context_length"], settings["marks"]) == (8, 48, 4)
    series = read_series(waves)
    np.testing.assert_allclose(settings["scaler"]["mean"], series.values[:420].mean(0))
    for name in ("forecasts.png", "curves.png", "best.safetensors"):
        assert (straight / name).stat().st_size > 500
    assert run("--data", waves, *COMMON, "--plot", "--per-class", "--resume", output=straight) == 0
    shown = capsys.readouterr().out
    for text in ("linear, closed form, look-back 48", "repeat last 24 steps", "repeat last value", "tiny_forecaster"):
        assert text in shown


def test_the_saved_model_has_the_printed_error_over_every_window(straight, waves, capsys):
    assert run("--data", waves, *COMMON, "--plot", "--per-class", "--resume", output=straight) == 0
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("tiny_forecaster"))
    series, model = read_series(waves), mixzoo.load(straight / "best.safetensors").eval()
    scaled = Scaler.fit(series.values[:420]).scale(series.values)
    marks, values = torch.tensor(time_marks(series.dates, "h")), torch.tensor(scaled, dtype=torch.float32)
    errors = []
    with torch.no_grad():
        for t in range(480, 600 - 8 + 1):
            forecast = model(values[None, t - 48 : t], past_time_features=marks[None, t - 48 : t])
            errors.append((forecast - values[t : t + 8]).numpy())
    assert len(errors) == 113
    assert float(line.split()[1]) == pytest.approx(np.mean(np.square(errors)), abs=6e-5)
    assert float(line.split()[2]) == pytest.approx(np.mean(np.abs(errors)), abs=6e-5)


def test_resumed_run_equals_an_uninterrupted_one(straight, waves, tmp_path, monkeypatch):
    step, count = _training.Trainer._train_step, 0

    def interrupted_step(trainer, batch):
        nonlocal count
        step(trainer, batch)
        count += 1
        if count == 15:
            os.kill(os.getpid(), signal.SIGINT)

    command = ("--data", waves, *COMMON)
    with monkeypatch.context() as patch:
        patch.setattr(_training.Trainer, "_train_step", interrupted_step)
        assert run(*command, output=tmp_path) == 130
    assert run(*command, "--resume", output=tmp_path) == 0
    for name in ("last.pt",):
        expected, got = (torch.load(folder / name, weights_only=True) for folder in (straight, tmp_path))
        for key in expected["model"]:
            assert torch.equal(expected["model"][key], got["model"][key])
    timeless = [[(k, v) for k, v in row.items() if "second" not in k] for row in log_of(straight)]
    assert [[(k, v) for k, v in row.items() if "second" not in k] for row in log_of(tmp_path)] == timeless


def test_stops_early_and_stays_stopped(waves, tmp_path, capsys):
    command = ("--data", waves, "--horizon", 8, "--epochs", 30, "--lr", 1.0, "--patience", 2, "--optimizer", "sgd")
    assert run(*command, output=tmp_path) == 0
    rows = log_of(tmp_path)
    best = min(rows, key=lambda row: row["val_mse"])["epoch"]
    assert len(rows) == best + 2 < 30
    before = (tmp_path / "last.pt").read_bytes()
    assert run(*command, "--resume", output=tmp_path) == 0
    assert (tmp_path / "last.pt").read_bytes() == before


def test_series_without_dates_and_model_without_marks(tmp_path, capsys):
    path = write_csv(tmp_path / "plain.csv", None, wave(300)[1])
    assert (
        run("--data", path, "--set", "marked=false", "--epochs", 1, "--split", "200,50,50", output=tmp_path / "a") == 0
    )
    shown = capsys.readouterr().out
    assert "no time marks" in shown
    assert "repeat last 24" not in shown
    # a model that takes marks goes without them
    assert run("--data", path, "--epochs", 1, output=tmp_path / "b") == 0


def test_own_model_goes_on(straight, waves, tmp_path, capsys):
    model = straight / "best.safetensors"
    assert finetune.main([str(a) for a in (model, "--data", waves, "--epochs", 1, "--cpu", "--output", tmp_path)]) == 0
    assert log_of(tmp_path)[0]["val_mse"] < log_of(straight)[0]["val_mse"]
    with pytest.raises(SystemExit):
        finetune.main([str(a) for a in (model, "--data", waves, "--horizon", 9, "--cpu", "--output", tmp_path / "x")])
    assert "was made for 8, not 9" in capsys.readouterr().err


def test_fifteen_minutes_have_five_marks_unless_told_otherwise(tmp_path):
    path = write_csv(tmp_path / "quarters.csv", *wave(300, timedelta(minutes=15)))
    for index, (extra, marks) in enumerate((((), 5), (("--freq", "h"), 4))):
        output = tmp_path / str(index)
        assert run("--data", path, "--epochs", 1, *extra, output=output) == 0
        assert json.loads((output / "run.json").read_text())["marks"] == marks


BAD = [
    ((), "needs --data"),
    (("--data", "missing.csv"), "missing.csv"),
    (("--data", "WAVES", "--context-length", "500"), "500 (--context-length) + 8 (--horizon) = 508 rows"),
    (("--data", "WAVES", "--columns", "a,z"), "--columns z"),
    (("--data", "WAVES", "--date-column", "when"), "--date-column when"),
    (("--data", "WAVES", "--split", "1:2"), "--split 1:2"),
    (("--data", "WAVES", "--mixup", "0.8"), "--mixup is no option of --task forecast"),
    (("--data", "WAVES", "--folds", "3"), "--folds is no option of --task forecast"),
    (("--data", "WAVES", "--preset", "cifar"), "--preset cifar"),
    (("--data", "WAVES", "--task", "text"), "takes series, not text"),
    (("--data", "WAVES", "--set", "prediction_length=3"), "use --horizon"),
    (("--data", "WAVES", "--set", "no_such=3"), "no_such"),
    (("--data", "WAVES", "--layer-decay", "0.5"), "--layer-decay"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[" ".join(a[-2:]) for a, _ in BAD])
def test_bad_arguments_are_named_and_create_nothing(arguments, named, waves, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(*(str(waves) if a == "WAVES" else a for a in arguments), output=tmp_path / "run")
    assert stop.value.code == 2
    assert named in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_several_seeds_are_told_of_together(waves, tmp_path, capsys):
    command = ("--data", waves, *COMMON[:4], "--epochs", 1, "--repeat", 3, "--seed", 4)
    assert run(*command, output=tmp_path) == 0
    shown = capsys.readouterr().out.rpartition("3 runs on waves")[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed4", "seed5", "seed6"]
    values = []
    for path in sorted(tmp_path.iterdir()):
        assert run(*COMMON[:4], "--epochs", 1, "--data", waves, "--seed", path.name[-1], output=tmp_path / "one") == 0
        line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("tiny_forecaster"))
        values.append(float(line.split()[1]))
        for file in (tmp_path / "one").iterdir():
            file.unlink()
    mean, deviation = (float(text) for text in shown.split("tiny_forecaster")[1].split()[0:3:2])
    assert mean == pytest.approx(np.mean(values), abs=1e-4)
    assert deviation == pytest.approx(np.std(values, ddof=1), abs=1e-4)


def test_presets_follow_the_model():
    assert preset_for("timemixer", "scratch") == "timemixer"
    assert preset_for("timemixer_etth2_96_96", "scratch") == "timemixer-etth2"
    assert preset_for("patchtsmixer", "scratch") == "patchtsmixer"
    assert preset_for("patchtsmixer_etth1_p8_512_96", "scratch") == "patchtsmixer-notebook"
    assert preset_for("tiny_forecaster", "scratch") == "series"
    assert preset_for("", "tuned") == "series"


def test_models_that_do_not_forecast_are_refused(waves, tmp_path, capsys):
    class Twice(TinyForecaster):
        def forward(self, past_values, past_time_features=None):
            return past_values

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny_forecaster", ModelSpec("tiny_forecaster", Twice, {}, modality="series"))
        with pytest.raises(SystemExit):
            run("--data", waves, output=tmp_path / "run")
    assert "(1, 24, 3) of one window, a forecast is (1, 8, 3)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        finetune.main(f"timemixer_imputation_96 --data {waves} --horizon 8 --output {tmp_path / 'run'}".split())
    assert "is made for imputation" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


ZOO = {
    "timemixer": ("dim=4", "hidden=4", "depth=1", "levels=1", "kernel=5", "embed=timeF"),
    # a name that stands for a release, whose weights these are not
    "patchtsmixer_etth1_512_96": ("dim=4", "depth=1", "patch_length=8", "patch_stride=8", "drop_rate=0"),
}


@pytest.mark.parametrize("name", ZOO)
def test_a_model_of_the_zoo_learns_and_is_saved(name, waves, tmp_path, capsys):
    narrow = (part for option in ZOO[name] for part in ("--set", option))
    sizes = ("--data", waves, "--horizon", 8, "--context-length", 24, "--epochs", 3, "--lr", 3e-3, "--cpu")
    assert finetune.main([str(a) for a in (name, *sizes, *narrow, "--output", tmp_path)]) == 0
    rows = log_of(tmp_path)
    assert rows[-1]["val_mse"] < rows[0]["val_mse"]
    assert name in [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()]
    model = mixzoo.load(tmp_path / "best.safetensors").eval()
    assert ("past_time_features" in model.forward_inputs) == (name == "timemixer")
    assert model(torch.zeros(2, 24, CHANNELS)).shape == (2, 8, CHANNELS)
    assert json.loads((tmp_path / "run.json").read_text())["preset"] == preset_for(name, "scratch")
