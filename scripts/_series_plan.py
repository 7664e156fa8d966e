"""`mixzoo finetune --task forecast`: series to their future, from arguments to a plan; and its presets."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import mixzoo
from mixzoo.mixers._registry import parse_spec
from mixzoo.models._registry import resolve_name
from mixzoo.models.timm_bridge import skeleton_options

from ._forecasting import (
    ForecastData,
    Forecasting,
    anchors_of,
    channel_table,
    draw_forecasts,
    make_loaders,
    result_table,
    scores_of,
    verdict,
)
from ._plan import (
    Kind,
    Outcome,
    Plan,
    check_parts,
    describe_run,
    fill_recipe,
    find_recipe,
    is_own_file,
    loop_settings,
    parse_options,
    run_folder,
    setting_of,
    spread,
    start_of,
)
from ._series_data import Scaler, Series, check_lengths, read_series, split_rows, time_marks
from ._series_presets import PRESETS, ForecastRecipe, preset_for
from ._tables import Column, text_table

_HELP = """\
series (--task forecast)
  --data is a CSV file: a header, one line per time step, one column per channel; a column of dates is optional and
  gives time marks and the daily anchor. Missing values are refused with their line numbers.
  The first rows train, the next ones choose the epoch, the last ones are measured once (--split); channels are scaled
  by mean and standard deviation of the training rows, errors are on that scale, and every window counts. Each result
  stands beside forecasts that take seconds: the last value, the last day, and one matrix fitted in closed form.
  --freq says which marks the model gets if not those of the file's step (published runs on 15-minute data use h).
"""


def make_plan(args: argparse.Namespace, machine: tuple[int, str]) -> Plan:
    """Read the series, build the model and settle every value; writes nothing.

    Raises:
        ValueError, TypeError: a value that cannot be; the message names the argument or the model's option.
    """
    if args.data is None:
        raise ValueError("--task forecast needs --data FILE.csv")
    series = read_series(args.data, columns=_names(args.columns), date_column=args.date_column)
    start = start_of(args)
    preset, row = find_recipe(args, PRESETS, preset_for("" if is_own_file(args.model) else args.model, start))
    recipe = fill_recipe(args, row, ("loss",))
    net = _open_own(args, series) if is_own_file(args.model) else _build(args, recipe, series, start)
    check_parts(args, net, recipe)
    data = _cut(args, recipe, series, net)
    task = Forecasting(net.forward_inputs, loss=recipe.loss)
    _try_out(net, task, data, args.model)
    batches = {"batch_size": recipe.batch_size, "workers": args.workers, "seed": args.seed, "processes": machine[0]}
    loop = loop_settings(args, recipe, row, machine[0])
    return Plan(
        net=net,
        task=task,
        loaders=make_loaders(data, **batches),
        loop=loop,
        folder=run_folder(args, f"{series.name}-{data.horizon}"),
        preset=preset,
        start=start,
        lines=_lines(data, task),
        report=lambda outcome: _report(outcome, data, args),
        curves=(("mse", "mean squared error"),),
        described=describe_run(args, net, preset, recipe, loop, machine) | _described(data),
        data=data,
    )


def _described(data: ForecastData) -> dict[str, Any]:
    """What a forecast needs to know besides the model, and what the result depends on."""
    return {
        "columns": list(data.series.columns),
        "context_length": data.context,
        "horizon": data.horizon,
        "splits": {name: list(getattr(data.splits, name)) for name in ("train", "val", "test")},
        "scaler": {"mean": data.scaler.mean.tolist(), "std": data.scaler.std.tolist()},
        "marks": 0 if data.marks is None else data.marks.shape[1],
    }


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _build(args: argparse.Namespace, recipe: ForecastRecipe, series: Series, start: str) -> nn.Module:
    """The model for the channels of the series, with its weights."""
    spec, _ = resolve_name(args.model)
    known = skeleton_options(spec)
    given = parse_options(args.set)
    options = {"num_channels": len(series.columns)}
    context = args.context_length
    if start == "scratch":
        options |= {key: value for key, value in recipe.options.items() if key in known}
        context = context or recipe.context
    # what is not said is the model's own
    options |= {"context_length": context} if context else {}
    options |= {"prediction_length": args.horizon} if args.horizon else {}
    if recipe.drop_path:
        options["drop_path_rate"] = recipe.drop_path
    freq = _freq(args, recipe, series)
    if freq and "freq" in known:
        options["freq"] = freq
    _check_given(args, given)
    return mixzoo.create_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        token_mixer=parse_spec(args.token_mixer) if args.token_mixer else None,
        **options | given,
    )


def _check_given(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """`--set` may not say again, and otherwise, what options of the command say."""
    twice = {"context_length": "--context-length", "prediction_length": "--horizon", "num_channels": "--columns"}
    for key in twice.keys() & given.keys():
        raise ValueError(f"--set {key}: use {twice[key]}")


def _freq(args: argparse.Namespace, recipe: ForecastRecipe, series: Series) -> str | None:
    """Key of the marks to make."""
    if args.freq and not series.dates:
        raise ValueError(f"--freq {args.freq} needs a column of dates, which --data {args.data} has not")
    return args.freq or (recipe.freq if series.dates else None) or series.freq


def _open_own(args: argparse.Namespace, series: Series) -> nn.Module:
    """The model of a file of ours, for a series of its channels."""
    net = mixzoo.load(args.model)
    for option, given, has in (
        ("--horizon", args.horizon, net.prediction_length),
        ("--context-length", args.context_length, net.context_length),
        ("--columns", len(series.columns), net.num_channels),
    ):
        if given and given != has:
            raise ValueError(f"{option}: MODEL {args.model} was made for {has}, not {given}")
    return net


def _cut(args: argparse.Namespace, recipe: ForecastRecipe, series: Series, net: nn.Module) -> ForecastData:
    """The series, split and scaled for the model; marks if it takes them."""
    splits = split_rows(series, args.split)
    check_lengths(splits, net.context_length, net.prediction_length)
    scaler = Scaler.fit(series.values[slice(*splits.train)])
    marked = {"past_time_features", "future_time_features"} & set(net.forward_inputs)
    marks = time_marks(series.dates, _freq(args, recipe, series)) if marked and series.dates else None
    values = scaler.scale(series.values)
    return ForecastData(series, splits, scaler, values, marks, net.context_length, net.prediction_length)


def _try_out(net: nn.Module, task: Forecasting, data: ForecastData, model: str) -> None:
    """One window through the model, so that what it refuses, or does instead, is known before a run begins."""
    if setting_of(net, "task") not in (None, "forecast"):
        raise ValueError(f"MODEL {model} is made for {setting_of(net, 'task')}; give --set task=forecast")
    batch = data.windows(data.splits.train, lookback=False).__getitems__([0])
    with torch.no_grad():
        forecast = task.forecast(net.eval(), batch)
    if forecast.shape != batch["future"].shape:
        raise ValueError(
            f"MODEL {model} makes {tuple(forecast.shape)} of one window, a forecast is {tuple(batch['future'].shape)}: "
            "--task forecast needs a model that forecasts"
        )


def _lines(data: ForecastData, task: Forecasting) -> dict[str, str]:
    series, splits = data.series, data.splits
    stretches = {"train": splits.train, "val": splits.val, "test": splits.test}
    rows = [f"{name} {start}-{stop - 1}" for name, (start, stop) in stretches.items()]
    counts = [len(data.windows(stretch, lookback=name != "train")) for name, stretch in stretches.items()]
    unused = len(series.values) - splits.test[1]
    note = f"; {unused} later rows unused" if unused else ""
    marks = "no time marks" if data.marks is None or not task.inputs else f"{data.marks.shape[1]} time marks"
    return {
        "data": f"{series.name}: {len(series.columns)} channels, rows {', '.join(rows)} ({splits.rule}){note}"
        + (series.note and f"; {series.note}"),
        "input": f"{data.context} steps to {data.horizon}; windows train {counts[0]}, val {counts[1]}, test "
        f"{counts[2]}; {marks}; scaled by the training rows",
    }


def _report(outcome: Outcome, data: ForecastData, args: argparse.Namespace) -> str:
    """The result on the test stretch beside the anchors, and pictures of forecasts."""
    trainer, task = outcome.trainer, outcome.trainer.task
    result, anchors = task.summarize(outcome.measured), anchors_of(data)
    scores = scores_of(data, anchors)
    # without the release that a name stands for: these are weights of this run
    name = trainer.net.config["model"].partition(".")[0]
    lines = [
        f"test errors of {trainer.folder.best} on {len(outcome.measured['mse'])} windows of {data.horizon} steps, "
        f"scaled (epoch {trainer.best[1]}, the best one on val):",
        result_table(result, name, scores),
        verdict(result, scores),
    ]
    if args.per_class:
        lines.append(channel_table(outcome.measured, data.series.columns))
    if importlib.util.find_spec("matplotlib") is None:
        lines.append("no forecasts.png: pip install 'mixzoo[plots]'")
    else:
        path = trainer.folder.path / "forecasts.png"
        draw_forecasts(task, outcome.best, data, anchors, path)
        lines.append(f"forecasts: {path}")
    return "\n".join(lines)


def _pool(plans: Sequence[Plan], outcomes: Sequence[Outcome]) -> str:
    """Mean and standard deviation of the runs beside the anchors, which have none."""
    data = plans[0].data
    values = [plan.task.summarize(outcome.measured) for plan, outcome in zip(plans, outcomes, strict=True)]
    model = plans[0].net.config["model"].partition(".")[0]
    rows = [{"name": model, **{name: spread([v[name] for v in values], 4) for name in values[0]}}]
    for title, scores in scores_of(data, anchors_of(data)).items():
        rows.append({"name": title, **{name: f"{value:.4f}" for name, value in scores.items()}})
    columns = [Column("name", "forecast", left=True), Column("mse", "MSE"), Column("mae", "MAE")]
    return f"{len(plans)} runs on {data.series.name}, mean ± standard deviation:\n{text_table(columns, rows)}"


FORECAST = Kind(
    modality="series",
    inputs="series",
    options=frozenset(("horizon", "context_length", "split", "columns", "date_column", "freq", "loss", "per_class")),
    presets=PRESETS,
    plan=make_plan,
    pool=_pool,
    help=_HELP,
)
