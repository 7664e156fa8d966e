"""mixzoo finetune --task text: files, leaks, folds, tokenisers, batches, scores, baselines, resumption."""

from __future__ import annotations

import csv
import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn

import mixzoo
from mixzoo.models._registry import MODELS, ModelSpec
from mixzoo.models.text_encoder import TextEncoder
from mixzoo.scripts import _training, finetune
from mixzoo.scripts._text_data import Columns, Texts, load_texts
from mixzoo.scripts._text_task import (
    EncodedTexts,
    FixedBatches,
    LengthBatches,
    TextClassification,
    f1_of,
    scores_of,
    sentence_segments,
    word_baselines,
)
from mixzoo.scripts._tokenizers import ByteTokenizer, open_tokenizer


class TinyReader(nn.Module):
    """Mean of embeddings to classes, (B, N) -> (B, classes); with the head "pairs" of two texts, (B, 2, N)."""

    modality = "text"
    # files are written for models of the package alone
    __module__ = "mixzoo.models.tiny"

    def __init__(
        self,
        *,
        vocab_size: int = 512,
        max_length: int = 64,
        pad_token_id: int = 0,
        type_vocab_size: int = 0,
        num_classes: int = 2,
        head: str | None = None,
        dim: int = 16,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.vocab_size, self.max_length, self.pad_token_id = vocab_size, max_length, pad_token_id
        self.num_classes, self.class_names, self._paired = num_classes, None, head == "pairs"
        self.embed = nn.Embedding(vocab_size, dim, device=device, dtype=dtype)
        self.types = nn.Embedding(type_vocab_size, dim, device=device, dtype=dtype) if type_vocab_size else None
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(dim * (1 + self._paired), num_classes, device=device, dtype=dtype)

    def get_classifier(self):
        return self.fc

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        if input_ids.shape[-1] > self.max_length:
            raise ValueError(f"the sequence has {input_ids.shape[-1]} tokens")
        x = self.embed(input_ids)  # (B, [2,] N, D)
        x = x if token_type_ids is None else x + self.types(token_type_ids)
        mask = attention_mask.unsqueeze(-1)
        pooled = (x * mask).sum(-2) / mask.sum(-2)  # (B, [2,] D)
        return self.fc(self.drop(pooled.flatten(1)))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, row in (("tiny_reader", {}), ("tiny_pairs", {"head": "pairs"}), ("tiny_typed", {"type_vocab_size": 2})):
        monkeypatch.setitem(MODELS, name, ModelSpec(name, TinyReader, row, modality="text", classifier="fc"))


def rows_of(count: int, seed: int = 0) -> list[dict]:
    """Texts of two classes, told apart by their words, a third of them of the second class."""
    rng = random.Random(seed)
    words = {"calm": ["lake", "tea", "shade", "wool"], "storm": ["gale", "hail", "surf", "roar"]}
    rows = []
    for i in range(count):
        label = "storm" if i % 3 == 0 else "calm"
        text = " ".join(rng.choice(words[label] + ["and", "of"]) for _ in range(rng.randint(3, 12)))
        rows.append({"text": f"{text} {i}", "label": label, "id": str(i)})
    return rows


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def weather(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "weather.jsonl", rows_of(150))


def run(*arguments, output, model="tiny_reader") -> int:
    return finetune.main([str(a) for a in (model, *arguments, "--cpu", "--output", output)])


def log_of(output) -> list[dict[str, float]]:
    with (output / "log.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_files_of_every_form_say_the_same(tmp_path, ending):
    rows = rows_of(30)
    rows[3]["text"] = 'two\tparts, "quoted"\nand a second line'
    data = load_texts(str(write(tmp_path / f"texts{ending}", rows)))
    assert (data.class_names, data.val_name, data.test) == (["calm", "storm"], "held-out", None)
    texts = data.train.texts + data.val.texts
    assert sorted(text for (text,) in texts) == sorted(row["text"] for row in rows)
    assert len(data.val) == 6
    assert sum(data.val.labels) == 2


def test_splits_of_a_folder_and_leaks(tmp_path):
    rows = rows_of(40)
    write(tmp_path / "train.jsonl", rows[:20] + rows[:2])
    write(tmp_path / "dev.csv", rows[20:30])
    write(tmp_path / "test.tsv", rows[5:15] + rows[29:])
    data = load_texts(str(tmp_path))
    assert (len(data.train), len(data.val), len(data.test), data.val_name) == (20, 10, 21, "val")
    assert "2 repeated rows of train dropped" in data.note
    assert "LEAK: 11 of 21 of test" in data.note
    (tmp_path / "dev.csv").unlink()
    assert load_texts(str(tmp_path)).val_name == "test"


def test_labels_are_text_numbers_or_truth(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 2 == 0} for i in range(10)]
    rows += [{"text": f"u{i}", "label": "true"} for i in range(5)]
    assert load_texts(str(write(tmp_path / "a.jsonl", rows))).class_names == ["false", "true"]
    rows = [{"text": f"t{i}", "label": (10, 9, 2)[i % 3]} for i in range(15)]
    assert load_texts(str(write(tmp_path / "b.csv", rows))).class_names == ["2", "9", "10"]


def test_every_text_is_tested_in_one_fold_and_groups_stay_whole(tmp_path):
    rows = rows_of(60)
    for row in rows:
        row["author"] = f"author {int(row['id']) // 2}"
    path = str(write(tmp_path / "train.csv", rows + rows[:5]))
    tested = []
    for k in range(5):
        data = load_texts(path, columns=Columns(group="author"), fold=(k, 5), seed=3)
        parts = [{int(text.split()[-1]) // 2 for (text,) in part.texts} for part in (data.train, data.val, data.test)]
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert len(data.train) + len(data.val) + len(data.test) == 60
        assert 0.2 < np.mean(data.test.labels) < 0.5
        tested += data.test.texts
    assert sorted(tested) == sorted((row["text"],) for row in rows)
    again = load_texts(path, columns=Columns(group="author"), fold=(0, 5), seed=4)
    assert again.test.texts != load_texts(path, columns=Columns(group="author"), fold=(0, 5), seed=3).test.texts


def test_bytes_are_shifted_framed_and_cut():
    tokenizer = ByteTokenizer()
    ids, types, cut, _ = tokenizer.encode(["aé"], 64)
    assert (ids, types, cut) == ([257, 98, 0xC3 + 1, 0xA9 + 1, 258], [0] * 5, False)
    ids, types, cut, _ = tokenizer.encode(["a" * 9, "bb"], 10)
    assert ids == [257, *[98] * 5, 258, 99, 99, 258]
    assert types == [0] * 7 + [1] * 3
    assert cut
    assert len(tokenizer.encode(["é" * 50], 20)[0]) == 20
    assert len(tokenizer.encode(["a" * 50, "b" * 60], 20)[0]) == 20
    assert max(tokenizer.encode(["\udcff\x00"], 9)[0]) < tokenizer.size


def test_tokenizer_of_a_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "lake": 4, "gale": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path))
    assert (tokenizer.size, tokenizer.pad_id, tokenizer.special_ids) == (6, 0, (2, 3))
    assert tokenizer.encode(["lake gale x"], 8) == ([2, 4, 5, 1, 3], [0] * 5, False, [])
    assert tokenizer.encode(["lake", "gale"], 8)[:2] == ([2, 4, 3, 5, 3], [0, 0, 0, 1, 1])
    ids, _, cut, _ = tokenizer.encode(["lake " * 20], 8)
    assert (len(ids), cut) == (8, True)
    places = tokenizer.encode(["lake gale", "x"], 8, places=True).places
    assert places == [None, (0, 0), (0, 5), None, (1, 0), None]


def test_tokenizer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lake", "gale"]))
    tokenizer_of_bert = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer_of_bert.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").unlink(missing_ok=True)
    (tmp_path / "saved" / "vocab.txt").write_text((tmp_path / "vocab.txt").read_text())
    tokenizer = open_tokenizer(str(tmp_path / "saved"))
    assert (tokenizer.size, tokenizer.pad_id, tokenizer.special_ids) == (7, 0, (2, 3))
    assert tokenizer.encode(["lake gale"], 9)[0] == [2, 5, 6, 3]
    assert tokenizer.encode(["lake", "gale"], 9)[:2] == ([2, 5, 3, 6, 3], [0, 0, 0, 1, 1])
    places = tokenizer.encode(["lake gale", "lake"], 9, places=True).places
    assert places == [None, (0, 0), (0, 5), None, (1, 0), None]


def test_sentences_are_segments():
    def of(*texts: str, length: int = 64) -> list[int]:
        return sentence_segments(texts, ByteTokenizer().encode(texts, length, places=True)).tolist()

    assert of("A. B") == [0, 1, 1, 1, 2, 3]
    # stops inside words, quotes behind stops, lines
    assert of('1.5 "A." b\nc') == [0, *[1] * 9, *[2] * 2, 3, 4]
    assert of("é! é", length=9) == [0, 1, 1, 1, 1, 2, 2, 3]
    assert of("一。二") == [0, *[1] * 6, *[2] * 3, 3]
    # two texts share no sentence, and a cut text ends where it is cut
    assert of("a", "b") == [0, 1, 2, 3, 4]
    assert of("A. B. C. D", length=8) == [0, 1, 1, 1, 2, 2, 2, 3]


def test_padding_fills_up_and_is_masked():
    texts = EncodedTexts([np.array([5, 6, 7]), np.array([8])], [1, 0], 9)
    batch = texts.__getitems__([1, 0])
    assert batch["input_ids"].tolist() == [[8, 9, 9], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["label"].tolist() == [0, 1]
    assert EncodedTexts([np.array([5])], [0], 9, length=4)[0]["input_ids"].tolist() == [5, 9, 9, 9]
    extras = {"segment_ids": [np.array([0, 1, 1]), np.array([2])]}
    batch = EncodedTexts([np.array([5, 6, 7]), np.array([8])], [1, 0], 9, extras=extras).__getitems__([1, 0])
    assert batch["segment_ids"].tolist() == [[2, 0, 0], [0, 1, 1]]
    pair = EncodedTexts([(np.array([5, 6]), np.array([7]))], [0], 9).__getitems__([0])
    assert pair["input_ids"].tolist() == [[[5, 6], [7, 9]]]


def test_batches_have_similar_lengths_and_hold_every_text_once():
    lengths = np.random.default_rng(0).integers(1, 1000, 330)
    sampler = LengthBatches(lengths, 8, seed=2)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 41
    assert len({i for batch in batches for i in batch}) == 328
    waste = sum(8 * lengths[b].max() - lengths[b].sum() for b in batches) / lengths.sum()
    assert waste < 0.05
    # not from short to long
    assert abs(np.corrcoef(range(41), [lengths[b].mean() for b in batches])[0, 1]) < 0.5
    sampler.start = 16
    assert list(sampler) == batches[2:]
    assert len(sampler) == 39
    sampler.start, sampler.epoch = 0, 1
    assert list(sampler) != batches
    assert sorted(i for b in LengthBatches(lengths[:5], 8, 0) for i in b) == list(range(5))
    fixed = list(FixedBatches(lengths, 8))
    assert sorted(i for b in fixed for i in b) == list(range(330))
    assert lengths[fixed[0]].min() >= lengths[fixed[-1]].max()


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 4, 200), rng.integers(0, 5, 200)
    scores = scores_of(labels, guesses)
    assert scores["accuracy"] == pytest.approx(100 * metrics.accuracy_score(labels, guesses))
    assert scores["macro_f1"] == pytest.approx(100 * metrics.f1_score(labels, guesses, average="macro"))
    assert f1_of(np.array([1, 1, 0]), np.array([1, 0, 0])) == {0: pytest.approx(200 / 3), 1: pytest.approx(200 / 3)}
    measured = {"loss": torch.zeros(2), "label": torch.tensor([0, 1]), "guess": torch.tensor([-1, 1])}
    assert TextClassification().summarize(measured)["accuracy"] == 50


def test_naive_bayes_is_the_one_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.naive_bayes")
    from sklearn.feature_extraction.text import CountVectorizer

    rows = rows_of(90, seed=5)
    texts = [row["text"] for row in rows]
    labels = [int(row["label"] == "storm") for row in rows]
    train = Texts(tuple((t,) for t in texts[:60]), tuple(labels[:60]))
    test = Texts(tuple((t,) for t in texts[60:]), tuple(labels[60:]))
    found = word_baselines(train, test, 2)
    counter = CountVectorizer(token_pattern=r"\w+")
    theirs = sklearn.MultinomialNB().fit(counter.fit_transform(texts[:60]), labels[:60])
    expected = theirs.predict(counter.transform(texts[60:]))
    assert (found.guesses["naive Bayes on words"] == expected).mean() > 0.99
    assert found.scores()["majority class"]["accuracy"] == pytest.approx(100 * (1 - np.mean(labels[60:])))


COMMON = ("--epochs", 4, "--batch-size", 8, "--lr", 2e-2, "--metric", "accuracy")


@pytest.fixture(scope="module")
def straight(weather, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny_reader", ModelSpec("tiny_reader", TinyReader, {}, modality="text", classifier="fc"))
        assert run("--data", weather, *COMMON, output=output) == 0
    return output


def test_learns_and_tells_the_baselines(straight, weather, capsys):
    rows = log_of(straight)
    assert rows[-1]["val_accuracy"] > 80
    assert rows[-1]["texts_per_second"] > 0
    assert run("--data", weather, *COMMON, "--resume", output=straight) == 0
    shown = capsys.readouterr().out
    for text in ("majority class", "naive Bayes on words", "storm", "bytes"):
        assert text in shown
    model = mixzoo.load(straight / "best.safetensors").eval()
    assert model.class_names == ["calm", "storm"]
    # the vocabulary is that of the tokeniser
    assert model.vocab_size == ByteTokenizer.size
    data, right = load_texts(str(weather)), 0
    for (text,), label in zip(data.val.texts, data.val.labels, strict=True):
        ids = torch.tensor(ByteTokenizer().encode([text], 64)[0])[None]
        right += int(model(ids, torch.ones_like(ids)).argmax() == label)
    best = max(row["val_accuracy"] for row in rows)
    assert 100 * right / len(data.val) == pytest.approx(best)


def test_resumed_run_equals_an_uninterrupted_one(straight, weather, tmp_path, monkeypatch):
    step, count = _training.Trainer._train_step, 0

    def interrupted_step(trainer, batch):
        nonlocal count
        step(trainer, batch)
        count += 1
        if count == 20:
            os.kill(os.getpid(), signal.SIGINT)

    command = ("--data", weather, *COMMON)
    with monkeypatch.context() as patch:
        patch.setattr(_training.Trainer, "_train_step", interrupted_step)
        assert run(*command, output=tmp_path) == 130
    assert run(*command, "--resume", output=tmp_path) == 0
    expected, got = (torch.load(folder / "last.pt", weights_only=True) for folder in (straight, tmp_path))
    for key in expected["model"]:
        assert torch.equal(expected["model"][key], got["model"][key])
    timeless = [[(k, v) for k, v in row.items() if "second" not in k] for row in log_of(straight)]
    assert [[(k, v) for k, v in row.items() if "second" not in k] for row in log_of(tmp_path)] == timeless


def test_folds_are_run_and_told_of_together(weather, tmp_path, capsys):
    command = ("--data", weather, "--folds", 3, "--group-by", "id", "--epochs", 1, "--lr", 1e-2)
    assert run(*command, output=tmp_path) == 0
    shown = capsys.readouterr().out
    assert "all 3 runs, 150 texts tested" in shown
    assert "mean ± sd of runs" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fold1", "fold2", "fold3"]
    last = (tmp_path / "fold2" / "last.pt").read_bytes()
    # a fold that was not begun is run, the others are told of again
    for path in (tmp_path / "fold3").iterdir():
        path.unlink()
    assert run(*command, "--resume", output=tmp_path) == 0
    again = capsys.readouterr().out
    assert again.partition("all 3 runs")[2] == shown.partition("all 3 runs")[2]
    assert (tmp_path / "fold2" / "last.pt").read_bytes() == last


def test_sentences_reach_the_mixers(weather, tmp_path, monkeypatch, capsys):
    segments, forward = [], TextEncoder.forward

    def spying(self, input_ids, attention_mask=None, token_type_ids=None, segment_ids=None, **rest):
        segments.append(segment_ids)
        return forward(self, input_ids, attention_mask, token_type_ids, segment_ids, **rest)

    monkeypatch.setattr(TextEncoder, "forward", spying)
    command = ("--data", weather, "--sentences", "--epochs", 1, "--seq-len", 64, "--set", "dim=32")
    assert run(*command, output=tmp_path / "run", model="lra_ponet_text") == 0
    assert all(given is not None and given.max() == 2 for given in segments)
    with pytest.raises(SystemExit):
        run(*command, output=tmp_path / "other", model="lra_fnet_text")
    assert "segment_ids was given, but no mixer of the model uses it: fourier" in capsys.readouterr().err


def test_pairs_are_joined_typed_or_two_sequences(tmp_path):
    rows = rows_of(40)
    pairs = [
        {"sentence1": a["text"], "sentence2": b["text"], "label": int(a["label"] == b["label"])}
        for a, b in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    path = write(tmp_path / "pairs.tsv", pairs)
    shapes = []
    for model in ("tiny_reader", "tiny_typed", "tiny_pairs"):
        with pytest.MonkeyPatch.context() as patch:
            forward = TinyReader.forward

            def spying(self, input_ids, attention_mask=None, token_type_ids=None, forward=forward):
                shapes.append((input_ids.ndim, token_type_ids is not None))
                return forward(self, input_ids, attention_mask, token_type_ids)

            patch.setattr(TinyReader, "forward", spying)
            assert run("--data", path, "--epochs", 1, output=tmp_path / model, model=model) == 0
    assert set(shapes) == {(2, False), (2, True), (3, False)}


def test_listops_runs(tmp_path, capsys):
    command = ("--data", "listops-200", "--items", 320, 64, 128, "--epochs", 1, "--seq-len", 200)
    assert run(*command, output=tmp_path) == 0
    shown = capsys.readouterr().out
    for text in ("majority class", "first token only", "root operator and its digits", "test scores", "128 texts"):
        assert text in shown
    model = mixzoo.load(tmp_path / "best.safetensors")
    assert (model.num_classes, model.vocab_size, model.max_length) == (10, 16, 200)


BAD = [
    ((), "needs --data"),
    (("--data", "missing.csv"), "missing.csv"),
    (("--data", "WEATHER", "--text-column", "body"), "--text-column body"),
    (("--data", "WEATHER", "--label-column", "mood"), "--label-column mood"),
    (("--data", "WEATHER", "--folds", "3", "--group-by", "writer"), "--group-by writer"),
    (("--data", "WEATHER", "--tokenizer", "missing/tokenizer.json"), "missing/tokenizer.json"),
    (("--data", "WEATHER", "--items", "3", "3", "3"), "--items"),
    (("--data", "listops", "--folds", "3"), "leave out --folds"),
    (("--data", "listops", "--sentences"), "leave out --sentences"),
    (("--data", "listops-200", "--items", "64", "8", "8", "--max-length", "64"), "up to 199 tokens"),
    (("--data", "WEATHER", "--num-classes", "1"), "--num-classes 1"),
    (("--data", "WEATHER", "--horizon", "3"), "--horizon is no option of --task text"),
    (("--data", "WEATHER", "--task", "classify"), "takes text, not images"),
    (("--data", "WEATHER", "--set", "vocab_size=99"), "259 words"),
    (("--data", "WEATHER", "--set", "head=mlm"), "head=classification"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[" ".join(a[-2:]) for a, _ in BAD])
def test_bad_arguments_are_named_and_create_nothing(arguments, named, weather, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(*(str(weather) if a == "WEATHER" else a for a in arguments), output=tmp_path / "run")
    assert stop.value.code == 2
    assert named in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_rows_without_text_or_label_are_named(tmp_path):
    rows = rows_of(10)
    rows[4]["label"] = None
    with pytest.raises(ValueError, match="label is missing in line 5"):
        load_texts(str(write(tmp_path / "a.jsonl", rows)))
    rows = rows_of(10)
    rows[6]["text"] = " "
    with pytest.raises(ValueError, match="text is missing in line 8"):
        load_texts(str(write(tmp_path / "b.csv", rows)))
    (tmp_path / "c.jsonl").write_text('{"text": "x", "label": 1}\n{"text": ')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        load_texts(str(tmp_path / "c.jsonl"))
    same = [row | {"label": "calm"} for row in rows_of(10)]
    with pytest.raises(ValueError, match=r"one class only \(calm\)"):
        load_texts(str(write(tmp_path / "d.csv", same)))
