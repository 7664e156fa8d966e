"""`mixzoo finetune --task text`: texts to classes, from arguments to a plan; its presets; folds together."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
from torch import nn

import mixzoo
from mixzoo.mixers._registry import parse_spec
from mixzoo.models._registry import resolve_name
from mixzoo.models.timm_bridge import skeleton_options

from . import _listops
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
from ._recipes import Recipe
from ._tables import Column, text_table
from ._text_data import Columns, TextData, label_counts, load_texts
from ._text_task import (
    Baselines,
    EncodedTexts,
    TextClassification,
    class_table,
    encode,
    make_loaders,
    result_table,
    scores_of,
    word_baselines,
)
from ._tokenizers import BYTES, Tokenizer, open_tokenizer


@dataclass(frozen=True, kw_only=True)
class TextRecipe(Recipe):
    """Defaults of the options of the same names.

    Attributes:
        models: patterns of the names of models that `--preset auto` takes it for.
        sizes: "fit": an embedding for every word of the tokeniser and every token of ListOps, and no more; "model": the
            model's own, as published.
    """

    models: tuple[str, ...] = ()
    metric: str = "macro_f1"
    smoothing: float = 0.0
    pad: str = "batch"
    sizes: str = "fit"
    weight_decay: float = 0.01
    grad_clip: float = 1.0


# the PyTorch harness of Long Range Arena behind PoNet's table: lxchtan/PoNet, examples/LRA
_LRA = TextRecipe(
    epochs=2,
    batch_size=32,
    lr=1e-4,
    weight_decay=0.0,
    grad_clip=0.0,
    schedule="one-cycle-linear",
    warmup=1 / 3,
    metric="accuracy",
    pad="max",
    sizes="model",
)
# (preset, start); settings published where the name is a benchmark's, which auto takes for its own data alone
PRESETS: dict[tuple[str, str], TextRecipe] = {
    # 5,000 steps of 96,000 expressions, warm-up 1,000
    ("lra-listops", "scratch"): replace(_LRA, models=("lra_*_listops",)),
    # 20,000 steps of 25,000 texts, warm-up 8,000
    ("lra-text", "scratch"): replace(_LRA, epochs=26, warmup=10.24),
    # 30,000 steps of 147,086 pairs, warm-up 800
    ("lra-retrieval", "scratch"): replace(_LRA, epochs=7, warmup=0.17),
    ("text", "scratch"): TextRecipe(models=("*",), epochs=20, batch_size=32, lr=5e-4, warmup=1.0, patience=6),
    # as BERT and its relatives are tuned
    ("text", "tuned"): TextRecipe(
        models=("*",), epochs=10, batch_size=32, lr=3e-5, schedule="linear", warmup=1.0, patience=5
    ),
}

_HELP = """\
text (--task text)
  --data is one of
  FILE         .csv, .tsv or .jsonl with a column of texts, or two for pairs, and one of classes (--text-column,
               --label-column); others by --val-data and --test-data, else 20 % are held out
  DIR          with train.*, val.* (or dev.*) and/or test.* in one of these forms
  listops      expressions of Long Range Arena, generated from --seed (sizes: --items); listops-500 and listops-200 are
               shorter ones
  --folds K --group-by COLUMN is cross-validation over all files together: each text is tested once, in one of K runs,
  and rows of the same COLUMN are never on both sides. Texts in train that stand in test as well are told of.
  --tokenizer is a folder or name of the Hugging Face hub, a tokenizer.json, or bytes, the default, which needs nothing.
  --sentences makes every sentence a segment, for mixers that have these, as PoNet's authors do with long texts.
  Batches hold texts of similar length. Mixers without masks mix the padding in: --pad max pads alike everywhere.
  Accuracy and macro F1 stand beside the majority class and naive Bayes on words, those of listops beside tables of its
  first token, which get further than most published networks.
"""


@dataclass(frozen=True)
class Job:
    """A run's splits as the model takes them, and what needs no network.

    Attributes:
        sequences: EncodedTexts of "train", "val" and, if there is one, "test".
        baselines: for the split that is measured last; computed when they are asked for.
    """

    name: str
    class_names: list[str]
    sequences: Mapping[str, EncodedTexts]
    val_name: str
    baselines: Callable[[], Baselines]
    note: str


def make_plan(args: argparse.Namespace, machine: tuple[int, str]) -> Plan:
    """Open the data, build the model and settle every value; writes nothing.

    Raises:
        ValueError, TypeError: a value that cannot be; the message names the argument or the model's option.
    """
    _check(args)
    start = start_of(args)
    preset, row = find_recipe(args, PRESETS, _preset_for(args, start))
    recipe = fill_recipe(args, row, ("metric", "smoothing", "pad"))
    generated = args.data in _listops.SIZES
    net, job, words = (_from_listops if generated else _from_files)(args, recipe, start)
    check_parts(args, net, recipe)
    net.class_names = job.class_names if net.num_classes == len(job.class_names) else None
    loop = loop_settings(args, recipe, row, machine[0])
    batches = {"batch_size": recipe.batch_size, "workers": args.workers, "seed": args.seed, "processes": machine[0]}
    task = TextClassification(metric=recipe.metric, smoothing=recipe.smoothing)
    _try_out(net, task, job.sequences["train"])
    described = describe_run(args, net, preset, recipe, loop, machine)
    return Plan(
        net=net,
        task=task,
        loaders=make_loaders(job.sequences, job.val_name, **batches),
        loop=loop,
        folder=run_folder(args, job.name),
        preset=preset,
        start=start,
        lines=_lines(job, words, net),
        report=lambda outcome: _report(outcome, job, args),
        curves=(("loss", "loss"), ("accuracy", "accuracy / %")),
        described=described | {"tokenizer": words, "max_length": net.max_length} | _described(args, job),
        data=job,
    )


def _described(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What the result depends on, of the data."""
    return {
        "files": [args.val_data, args.test_data],
        "columns": [args.text_column, args.label_column, args.group_by],
        "sentences": args.sentences,
        "classes": job.class_names,
        "fold": [args.fold, args.folds],
        "texts": {name: len(split) for name, split in job.sequences.items()},
    }


def _check(args: argparse.Namespace) -> None:
    if args.data is None:
        raise ValueError(f"--task text needs --data: a file, a folder, or {', '.join(_listops.SIZES)}")
    if args.data in _listops.SIZES:
        args.metric = args.metric or "accuracy"  # the benchmark's
        clash = ("tokenizer", "text_column", "label_column", "val_data", "test_data", "folds", "group_by", "sentences")
        given = [f"--{name.replace('_', '-')}" for name in clash if getattr(args, name)]
        if given:
            raise ValueError(f"--data {args.data} is generated as numbers; leave out {', '.join(given)}")
    elif args.items:
        raise ValueError("--items is for --data listops")
    if args.group_by and not args.folds and (args.val_data or args.test_data):
        raise ValueError(
            "--group-by says how rows are held out; it needs --folds, or neither --val-data nor --test-data"
        )


def _preset_for(args: argparse.Namespace, start: str) -> str:
    """`--preset auto`: the benchmark's for its models on its data, else the general one."""
    name = args.model if args.data == "listops" else ""
    return next(
        preset
        for (preset, begin), row in PRESETS.items()
        if begin == start and any(fnmatch(name, pattern) for pattern in row.models)
    )


def _from_files(args: argparse.Namespace, recipe: TextRecipe, start: str) -> tuple[nn.Module, Job, str]:
    """Model, data and the tokeniser's name for texts of files."""
    tokenizer = open_tokenizer(args.tokenizer or BYTES)
    columns = Columns(args.text_column.split(",") if args.text_column else None, args.label_column, args.group_by)
    fold = None if args.fold is None else (args.fold, args.folds)
    data = load_texts(args.data, columns=columns, val=args.val_data, test=args.test_data, fold=fold, seed=args.seed)
    words = {"vocab_size": tokenizer.size, "pad_token_id": tokenizer.pad_id, "special_ids": tokenizer.special_ids}
    net = _model(args, recipe, start, data.class_names, words, None)
    sequences, note = _encode(data, tokenizer, net, recipe, args.sentences)
    tested = data.val if data.test is None else data.test
    job = Job(
        name=data.name,
        class_names=data.class_names,
        sequences=sequences,
        val_name=data.val_name,
        baselines=lambda: word_baselines(data.train, tested, len(data.class_names)),
        note="; ".join(part for part in (label_counts(data.train, data.class_names), data.note, note) if part),
    )
    return net, job, tokenizer.name


def _encode(
    data: TextData, tokenizer: Tokenizer, net: nn.Module, recipe: TextRecipe, sentences: bool
) -> tuple[dict[str, EncodedTexts], str]:
    """The splits as numbers, and what was cut."""
    options = {
        "twin": setting_of(net, "head") == "pairs",
        "typed": (setting_of(net, "type_vocab_size") or 0) > 1 and len(data.train.texts[0]) == 2,
        "sentences": sentences,
        "pad_to": net.max_length if recipe.pad == "max" else None,
    }
    if options["twin"] and sentences:
        raise ValueError("--sentences is for one sequence; MODEL compares two")
    if options["twin"] and len(data.train.texts[0]) != 2:
        raise ValueError("MODEL compares two texts; give --text-column a,b")
    splits = {"train": data.train, "val": data.val} | ({} if data.test is None else {"test": data.test})
    made = {name: encode(split, tokenizer, net.max_length, **options) for name, split in splits.items()}
    share = made["train"][1]
    return {name: part for name, (part, _) in made.items()}, f"{share:.0%} longer than {net.max_length}, cut" * (
        share > 0
    )


def _from_listops(args: argparse.Namespace, recipe: TextRecipe, start: str) -> tuple[nn.Module, Job, str]:
    """Model and data for generated expressions."""
    splits = _listops.listops(args.data, items=args.items or _listops.ITEMS, seed=args.seed)
    train, _, test = splits
    names = [str(digit) for digit in range(10)]
    words = {"vocab_size": len(_listops.VOCABULARY), "pad_token_id": _listops.PAD}
    longest = _listops.SIZES[args.data].longest
    net = _model(args, recipe, start, names, words, longest)
    if net.max_length < longest - 1:
        raise ValueError(f"--max-length {net.max_length}: {args.data} has up to {longest - 1} tokens, none may be cut")
    pad_to = net.max_length if recipe.pad == "max" else None
    job = Job(
        name=args.data,
        class_names=names,
        sequences={
            name: EncodedTexts([part[i] for i in range(len(part))], part.labels, _listops.PAD, length=pad_to)
            for name, part in zip(("train", "val", "test"), splits, strict=True)
        },
        val_name="val",
        baselines=lambda: Baselines(test.labels, _listops.baselines(train, test)),
        note=f"generated, seed {args.seed}",
    )
    return net, job, "tokens of the expressions"


def _model(
    args: argparse.Namespace,
    recipe: TextRecipe,
    start: str,
    names: Sequence[str],
    words: dict[str, Any],
    longest: int | None,
) -> nn.Module:
    """The model for the classes and the words of the data; ``longest``: length that it has to take, if known."""
    classes = args.num_classes or len(names)
    if classes < len(names):
        raise ValueError(f"--num-classes {classes} is less than the {len(names)} classes of --data {args.data}")
    if is_own_file(args.model):
        return _fits(_open_own(args, classes, names), words, args)
    options: dict[str, Any] = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
    row = resolve_name(args.model)[0].row
    if start == "scratch":
        options |= _words_of(args, recipe, words)
    length = args.max_length
    if length is None and longest is not None:
        published = row.get("max_length", 0)
        length = longest if recipe.sizes == "fit" or longest > published else published
    options |= {"max_length": length} if length else {}
    net = mixzoo.create_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        token_mixer=parse_spec(args.token_mixer) if args.token_mixer else None,
        num_classes=classes,
        **options | parse_options(args.set),
    )
    return _fits(net, words, args)


def _words_of(args: argparse.Namespace, recipe: TextRecipe, words: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a new model for the words of a tokeniser, those that it has."""
    spec, _ = resolve_name(args.model)
    left = set()
    if recipe.sizes == "model" and spec.row.get("vocab_size", 0) >= words["vocab_size"]:
        left.add("vocab_size")
    # a model that separates no segments has no use for the separators
    if not spec.row.get("special_ids"):
        left.add("special_ids")
    return {key: value for key, value in words.items() if key in skeleton_options(spec) and key not in left}


def _open_own(args: argparse.Namespace, classes: int, names: Sequence[str]) -> nn.Module:
    """The model of a file of ours; a head for other classes than the data's is replaced."""
    net = mixzoo.load(args.model)
    if args.max_length and args.max_length != net.max_length:
        net.set_input_size(args.max_length)
    if net.num_classes != classes or (net.class_names and net.class_names != list(names)):
        net.reset_classifier(classes)
    return net


def _fits(net: nn.Module, words: Mapping[str, Any], args: argparse.Namespace) -> nn.Module:
    """The model, if the numbers of the tokeniser are in its vocabulary."""
    size = words.get("vocab_size", 0)
    if size > net.vocab_size:
        raise ValueError(
            f"--tokenizer {args.tokenizer or BYTES} has {size} words, MODEL {args.model} {net.vocab_size}: "
            "give the tokeniser of its weights"
        )
    head = setting_of(net, "head")
    if head not in (None, "classification", "pairs"):
        raise ValueError(f"MODEL {args.model} has the head {head!r}; give --set head=classification")
    return net


def _try_out(net: nn.Module, task: TextClassification, texts: EncodedTexts) -> None:
    """One batch of the shortest texts through the model, so that what it refuses is known before a run begins."""
    batch = texts.__getitems__(np.argsort(texts.lengths, kind="stable")[:2].tolist())
    try:
        with torch.no_grad():
            task.logits(net.eval(), batch)
    except ValueError as error:
        advice = "" if len(batch["input_ids"][0]) == net.max_length else "; --pad max fills all texts up to one length"
        raise ValueError(f"{error}{advice}") from None


def _lines(job: Job, words: str, net: nn.Module) -> dict[str, str]:
    counts = [f"{job.val_name if name == 'val' else name} {len(split)}" for name, split in job.sequences.items()]
    lengths = job.sequences["train"].lengths
    return {
        "data": f"{job.name}: {len(job.class_names)} classes, {', '.join(counts)}; {job.note}",
        "input": f"{words}, {net.vocab_size} in the vocabulary; lengths {lengths.min()} to {lengths.max()}, mean "
        f"{lengths.mean():.0f}, at most {net.max_length}",
    }


def _report(outcome: Outcome, job: Job, args: argparse.Namespace) -> str:
    """The result of the saved model beside the baselines."""
    trainer, task = outcome.trainer, outcome.trainer.task
    name = "test" if "test" in job.sequences else job.val_name
    chosen = f"epoch {trainer.best[1]}, the best one on {job.val_name}"
    if "test" not in job.sequences:
        chosen += ", the same texts"
    lines = [
        f"{name} scores of {trainer.folder.best} on {len(outcome.measured['label'])} texts ({chosen}):",
        result_table(trainer.net.config["model"], task.summarize(outcome.measured), job.baselines().scores()),
    ]
    if args.per_class or len(job.class_names) == 2:
        lines.append(class_table(outcome.measured, job.class_names))
    return "\n".join(lines)


def pool(plans: Sequence[Plan], outcomes: Sequence[Outcome]) -> str:
    """All runs together: scores over all their texts, and mean and standard deviation over the runs."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for plan, outcome in zip(plans, outcomes, strict=True):
        measured, baselines = outcome.measured, plan.data.baselines()
        pairs = {plan.net.config["model"]: (measured["label"].numpy(), measured["guess"].numpy())}
        pairs |= {name: (baselines.labels, guess) for name, guess in baselines.guesses.items()}
        for name, pair in pairs.items():
            found.setdefault(name, []).append(pair)
    rows = []
    for name, pairs in found.items():
        folds = [scores_of(*pair) for pair in pairs]
        whole = scores_of(*(np.concatenate(parts) for parts in zip(*pairs, strict=True)))
        runs = {f"{metric}_runs": spread([fold[metric] for fold in folds], 2) for metric in whole}
        rows.append({"name": name, **whole, **runs})
    columns = [Column("name", "classifier", left=True)]
    for metric, title in (("accuracy", "accuracy"), ("macro_f1", "macro F1")):
        columns += [Column(metric, f"{title} %", "{:.2f}".format), Column(f"{metric}_runs", "mean ± sd of runs")]
    total = sum(len(outcome.measured["label"]) for outcome in outcomes)
    return f"all {len(plans)} runs, {total} texts tested:\n{text_table(columns, rows)}"


TEXT = Kind(
    modality="text",
    inputs="text",
    options=frozenset(
        (
            *("tokenizer", "max_length", "text_column", "label_column", "val_data", "test_data", "folds", "group_by"),
            *("sentences", "pad", "metric", "items", "num_classes", "smoothing", "per_class"),
        )
    ),
    presets=PRESETS,
    plan=make_plan,
    help=_HELP,
    pool=pool,
)
