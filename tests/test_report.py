"""`mixzoo report`: the published figures it reproduces, its tables, and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import pytest

import mixzoo
from mixzoo.models._registry import MODELS, RELEASES
from mixzoo.scripts import report
from mixzoo.scripts._tables import text_table

# one for every set of figures: releases that differ in their weights alone are counted once
PUBLISHED = list(
    {
        (name.partition(".")[0], r.input_size, r.num_classes, r.params_m, r.gmacs, r.macs_rule): name
        for name, r in RELEASES.items()
        if r.params_m is not None or r.gmacs is not None
    }.values()
)
# families whose every published figure is reproduced
EXACT = ("poolformer", "poolformerv2", "identityformer", "randformer", "convformer", "caformer")
SMALL = "metaformer_id_s12"


def run(capsys: pytest.CaptureFixture, *argv: str) -> str:
    assert report.main(list(argv)) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        report.main(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def rows(capsys: pytest.CaptureFixture, *argv: str) -> list[dict]:
    return json.loads(run(capsys, *argv, "--format", "json"))


# published figures


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_are_reproduced_to_the_printed_digit_or_explained(name):
    row = report.model_row(name, None, None)
    assert "not counted" not in row["note"]
    for figure, difference in (("published_params_m", "params_difference"), ("published_gmacs", "macs_difference")):
        assert (row.get(difference) is None) == (row[figure] is None)
        assert not row.get(difference) or "not reproduced" in row["note"]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.partition("_")[0] in EXACT])
def test_metaformers_reproduce_every_published_figure(name):
    row = report.model_row(name, None, None)
    assert row["params_difference"] == 0
    assert row["macs_difference"] == 0
    assert row["input"] == "x".join(map(str, RELEASES[name].input_size))


@pytest.mark.parametrize(
    ("value", "like", "expected"),
    [(1.8123, 1.8, "1.8"), (26.77, 27, "27"), (5.0, 5.0, "5.0"), (11.62, 11.6, "11.6"), (0.996, 1.0, "1.0")],
)
def test_printed_digits(value, like, expected):
    assert report.printed(value, like) == expected


def published(monkeypatch: pytest.MonkeyPatch, **figures) -> dict:
    """The row of a model as if that had been published for it."""
    name = f"{SMALL}.sail_in1k"
    monkeypatch.setitem(RELEASES, name, dataclasses.replace(RELEASES[name], **figures))
    return report.model_row(SMALL, None, None)


def test_a_figure_with_norms_says_so(monkeypatch):
    row = published(monkeypatch, gmacs=1.823, macs_rule="matmul+norm")
    assert row["macs_difference"] == 0
    assert row["note"] == "published MACs include norms: 1.823 G with them"


def test_a_figure_that_is_not_reproduced_names_the_rules_that_fit(monkeypatch):
    row = published(monkeypatch, gmacs=1.823, macs_rule="matmul")
    assert row["macs_difference"] == pytest.approx(-0.011)
    assert row["note"] == "published MACs not reproduced: 1.812 G by their rule, matmul; they fit matmul+norm"


def test_a_figure_that_was_cut_off_says_so(monkeypatch):
    note = published(monkeypatch, params_m=11, gmacs=1.81, macs_rule="matmul+norm")["note"]
    assert note.startswith("published parameters not reproduced: 11.915 M are trainable, cut off where it was printed;")
    assert note.endswith("1.823 G by their rule, matmul+norm; they fit matmul")


def test_a_figure_that_nothing_fits(monkeypatch):
    row = published(monkeypatch, gmacs=2.5, macs_rule="matmul", params_m=13)
    assert (row["macs_difference"], row["params_difference"]) == (-0.7, -1)
    assert row["note"] == (
        "published parameters not reproduced: 11.915 M are trainable; "
        "published MACs not reproduced: 1.812 G by their rule, matmul"
    )


def test_published_parameters_are_the_trainable_ones():
    row = report.model_row("randformer_s12", None, None)
    assert row["parameters"] > 12e6 > row["parameters"] - row["frozen_parameters"]
    assert row["params_difference"] == 0


# choice


def test_models_come_in_the_order_of_the_registry():
    assert report.select([], all_tags=False) == list(MODELS)
    assert report.select(["caformer_s*"], all_tags=False) == ["caformer_s18", "caformer_s36"]
    assert report.select(["poolformer_s24", "poolformer_s1?", "poolformer_s24"], False) == [
        "poolformer_s12",
        "poolformer_s24",
    ]


def test_releases_are_chosen_by_a_dot_an_alias_or_all_tags():
    tags = [name for name in RELEASES if name.startswith("caformer_s18.")]
    assert report.select(["caformer_s18"], all_tags=True) == tags
    assert report.select(["caformer_s18.*"], all_tags=False) == tags
    assert report.select(["caformer_s18.sail_in1k_384"], all_tags=True) == ["caformer_s18.sail_in1k_384"]
    assert report.select(["caformer_s18_384"], all_tags=False) == ["caformer_s18.sail_in1k_384"]
    assert report.select(["metaformer_s12"], all_tags=True) == ["metaformer_s12"]


def test_releases_with_the_same_figures_are_traced_once(monkeypatch):
    report.count.cache_clear()
    calls = []
    real = mixzoo.complexity
    monkeypatch.setattr(mixzoo, "complexity", lambda *args: calls.append(args) or real(*args))
    names = report.select(["caformer_s18"], all_tags=True)
    inputs = [report.model_row(name, None, None)["input"] for name in names]
    assert inputs == ["3x224x224", "3x384x384", "3x224x224", "3x384x384", "3x224x224"]
    # 224, 384, and the classes of ImageNet-21k
    assert len(calls) == 3


# tables


def test_all_formats_hold_the_same_figures(capsys):
    (row,) = rows(capsys, SMALL)
    assert row["macs"] == 1_812_267_008
    (read,) = csv.DictReader(io.StringIO(run(capsys, SMALL, "--format", "csv")))
    assert read["macs"] == str(row["macs"])
    assert read["published_gmacs"] == ""
    heading, rule, *body = run(capsys, SMALL, "--format", "markdown").splitlines()
    assert heading.startswith("| model | input | params M |")
    assert set(rule) <= set("|:- ")
    assert body == [line for line in body if f"| {SMALL} | 3x224x224 | 11.92 | 0.00 | 1.812 | 0.000 |" in line]
    assert run(capsys, SMALL) == text_table(report.MODEL_COLUMNS, [row]) + "\n"


def test_output_takes_the_format_of_its_suffix_and_is_not_replaced_unasked(capsys, tmp_path):
    path = tmp_path / "report.csv"
    assert run(capsys, SMALL, "--output", str(path)) == ""
    text = path.read_text()
    assert text.startswith("model,input,parameters,")
    assert "exists; give --overwrite" in refused(capsys, SMALL, "--output", str(path), "--format", "json")
    assert path.read_text() == text
    run(capsys, SMALL, "--output", str(path), "--format", "json", "--overwrite")
    assert json.loads(path.read_text())[0]["model"] == SMALL
    assert list(tmp_path.iterdir()) == [path]


def test_other_sizes_and_mixers_stand_without_published_figures(capsys):
    (row,) = rows(capsys, "poolformer_s12", "--img-size", "96", "64")
    assert row["input"] == "3x96x64"
    assert row["published_gmacs"] is None
    assert row["note"] == "published for 224x224"
    (row,) = rows(capsys, "identityformer_s12", "--token-mixer", "identity,identity,identity,attention")
    assert row["published_top1"] is None
    assert row["note"] == "token mixers identity,identity,identity,attention"
    assert row["macs"] == rows(capsys, "identityformer_s12")[0]["macs"] + 2 * (4 * 49 * 512**2 + 2 * 49**2 * 512)


def test_texts_of_another_length(capsys):
    (own,), (short,), (long,) = (
        rows(capsys, "fnet_base", *argv) for argv in ([], ["--seq-len", "128"], ["--seq-len", "1024"])
    )
    assert [row["input"] for row in (own, short, long)] == ["512", "128", "1024"]
    assert short["parameters"] == own["parameters"] == long["parameters"] - 512 * 768
    assert short["params_difference"] == 0
    assert long["published_params_m"] is None
    assert long["note"] == "published for 512 tokens"
    # of an encoder, but for what comes once a text
    dense = 12 * 8 * 768**2 + 2 * 768**2 + 768 * 32000
    assert short["macs"] - 128 * dense == own["macs"] - 512 * dense == 768**2 + 768 * 2
    (bound,) = rows(capsys, "seqformer_s", "--token-mixer", "spatial_fc", "--seq-len", "64")
    assert bound["input"] == "64"


def test_random_mixers_of_another_size(capsys):
    (row,) = rows(capsys, "randformer_s12", "--img-size", "64")
    assert row["frozen_parameters"] == 6 * 16**2 + 2 * 4**2


def test_by_module(capsys):
    table = {row["module"]: row for row in rows(capsys, SMALL, "--by", "module")}
    assert {"(model)", "stem", "stages.3", "head.fc"} <= set(table)
    assert not any(name.count(".") > 1 for name in table)
    assert table["(model)"]["share"] == 1
    assert table["(model)"]["parameters"] == 11_915_176
    assert "stages.3" not in {row["module"] for row in rows(capsys, SMALL, "--by", "module", "--depth", "1")}
    deep = {row["module"]: row for row in rows(capsys, SMALL, "--by", "module", "--depth", "5")}
    assert deep["stages.0.blocks.0.channel"]["macs"] == 8 * 56**2 * 64**2


def test_by_operator(capsys):
    table = rows(capsys, SMALL, "--by", "operator")
    assert [row["operator"] for row in table[:2]] == ["linear", "convolution"]
    assert sum(row["share"] for row in table) == pytest.approx(1)
    assert "parameters" not in table[0]
    assert run(capsys, SMALL, "--by", "operator").splitlines()[2].startswith("linear ")


def test_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.svg"
    run(capsys, "poolformer_s12", SMALL, "metaformer_s12", "--plot", str(path))
    drawing = path.read_text()
    assert all(f"<!-- {label} -->" in drawing for label in ("poolformer", "metaformer", "s12", "id_s12"))
    assert list(tmp_path.iterdir()) == [path]
    assert "nothing to draw" in refused(capsys, "metaformer_s12", "--plot", str(tmp_path / "other.png"))


def test_plot_needs_matplotlib(capsys, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    assert "pip install 'mixzoo[plots]'" in refused(capsys, SMALL, "--plot", str(tmp_path / "plot.png"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no_such_model"], "no model named 'no_such_model'"),
        (["nothing*"], "no model matches 'nothing*'"),
        (["caformer_s18.no_tag"], "no release named 'caformer_s18.no_tag'"),
        (["poolformer*", "--by", "module"], "--by breaks one model down"),
        ([SMALL, "--depth", "3"], "--depth is for --by module"),
        ([SMALL, "--by", "operator", "--depth", "3"], "--depth is for --by module"),
        ([SMALL, "--img-size", "1", "2", "3"], "--img-size takes a side"),
        ([SMALL, "--img-size", "0"], "must be at least 1, not 0"),
        ([SMALL, "--img-size", "2"], "too small"),
        ([SMALL, "fnet_base", "--seq-len", "64"], f"--seq-len is for models of texts, which {SMALL} is not"),
        (["fnet_base", "--img-size", "64", "--seq-len", "64"], "give either --img-size"),
        ([SMALL, "--token-mixer", "no_such_mixer"], "no token mixer named 'no_such_mixer'"),
        ([SMALL, "--token-mixer", "[1"], "not valid JSON"),
        ([SMALL, "--plot", "plot.txt"], "--plot must end in"),
        ([SMALL, "--plot", "plot.png", "--by", "module"], "leave out --by"),
        ([SMALL, "--plot", "plot.png", "--img-size", "96"], "would not have"),
        ([SMALL, "--output", str(Path("no") / "such" / "folder.md")], "no folder"),
    ],
)
def test_bad_arguments_give_one_line(argv, message, capsys):
    assert message in refused(capsys, *argv)
