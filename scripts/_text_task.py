"""Text classification as a `Task` of the training loop: batches of similar length, losses, accuracy and F1, baselines.

Every result stands beside what needs no network: the commonest class, and, for texts, naive Bayes on single words
(multinomial, one added to every count); for ListOps the tables of `_listops`.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ._runs import leave_signals_to_parent
from ._tables import Column, text_table
from ._text_data import Texts
from ._tokenizers import Encoded, Tokenizer
from ._training import Loaders

# batches among which texts are sorted by length
_POOL = 50
METRICS = ("accuracy", "macro_f1")


class EncodedTexts(Dataset):
    """Numbers of words, padded in batches.

    Args:
        ids: of every text; for two sequences a tuple of two.
        pad_id: what fills up. length: that all are filled up to; None for the longest of the batch.
        extras: more numbers for every word, by the name of the model's argument, such as token_type_ids.

    A batch is a dict of ``input_ids`` and ``attention_mask`` (B, N) or, for two sequences, (B, 2, N), ``label`` (B,)
    and the extras, 0 at padding.
    """

    def __init__(
        self,
        ids: Sequence[np.ndarray | tuple[np.ndarray, np.ndarray]],
        labels: Sequence[int],
        pad_id: int,
        *,
        length: int | None = None,
        extras: Mapping[str, Sequence[np.ndarray]] | None = None,
    ):
        self._ids, self._extras, self._labels = ids, extras or {}, np.asarray(labels, np.int64)
        self._pad, self._length = pad_id, length
        self.lengths = np.array([max(map(len, i)) if isinstance(i, tuple) else len(i) for i in ids])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        return {name: part[0] for name, part in self.__getitems__([item]).items()}

    def __getitems__(self, items: Sequence[int]) -> dict[str, Tensor]:
        length = self._length or int(self.lengths[items].max())
        ids = [self._ids[item] for item in items]
        rows = [row for text in ids for row in (text if isinstance(text, tuple) else (text,))]
        padded = np.full((len(rows), length), self._pad, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for at, row in enumerate(rows):
            padded[at, : len(row)], mask[at, : len(row)] = row, 1
        shape = (len(items), 2, length) if isinstance(ids[0], tuple) else (len(items), length)
        batch = {
            "input_ids": torch.from_numpy(padded).view(shape),
            "attention_mask": torch.from_numpy(mask).view(shape),
        }
        for name, values in self._extras.items():
            filled = np.zeros((len(items), length), np.int64)
            for at, item in enumerate(items):
                filled[at, : len(values[item])] = values[item]
            batch[name] = torch.from_numpy(filled)
        return batch | {"label": torch.from_numpy(self._labels[items])}


def encode(
    texts: Texts, tokenizer: Tokenizer, max_length: int, *, twin: bool, typed: bool, sentences: bool, pad_to: int | None
) -> tuple[EncodedTexts, float]:
    """Texts as numbers, and the share of them that was cut.

    Args:
        twin: two texts stay two sequences, else they are one. typed: give token types. sentences: give their
            numbers as segments.
    """
    ids, extras, cut = [], {}, 0
    for text in texts.texts:
        sequences = [(part,) for part in text] if twin else [text]
        parts = [tokenizer.encode(sequence, max_length, places=sentences) for sequence in sequences]
        arrays = [np.asarray(part.ids, np.int32) for part in parts]
        ids.append(tuple(arrays) if twin else arrays[0])
        if typed:
            extras.setdefault("token_type_ids", []).append(np.asarray(parts[0].types, np.int8))
        if sentences:
            extras.setdefault("segment_ids", []).append(sentence_segments(text, parts[0]))
        cut += any(part.cut for part in parts)
    made = EncodedTexts(ids, texts.labels, tokenizer.pad_id, length=pad_to, extras=extras)
    return made, cut / max(len(texts), 1)


# a sentence ends with its stops and the quotes and brackets behind them, in Chinese without a space, or with its line
_SENTENCE_END = re.compile(
    r"[.!?\u2026]+[\"'\u201d\u2019)\]]*\s+|[\u3002\uff01\uff1f\u2026]+[\"'\u201d\u2019\uff09]*|\n+"
)


def sentence_segments(texts: tuple[str, ...], encoded: Encoded) -> np.ndarray:
    """Number of the sentence that every word of one text or two begins in; what was added is a segment by itself.

    ``[CLS] One. Two! [SEP]`` gives 0, 1, 1, 2, 2, 3, as PoNet's authors number sentences for long texts.
    """
    ends = [[match.end() for match in _SENTENCE_END.finditer(text)] for text in texts]
    # the text and its sentence, or what no other has
    keys = [
        (-1, at) if place is None else (place[0], bisect_right(ends[place[0]], place[1]))
        for at, place in enumerate(encoded.places)
    ]
    return np.cumsum([0, *(a != b for a, b in pairwise(keys))], dtype=np.int32)


class LengthBatches(Sampler[list[int]]):
    """Every text once in batches of similar length, in an order drawn for the epoch.

    Texts are drawn, sorted by length within pools of many batches, cut into batches, and these are drawn again: a
    function of (seed, epoch) alone, as `EpochSampler`. A last batch that is not full is left out if there are others.

    Attributes:
        epoch: the epoch to draw for. start: texts at the front to leave out, whole batches.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, processes: int = 1):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.drop_last = len(lengths) >= batch_size * processes
        self.epoch = self.start = 0

    def __len__(self) -> int:
        count = len(self.lengths) // self.batch_size if self.drop_last else -(-len(self.lengths) // self.batch_size)
        return count - self.start // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order, size = rng.permutation(len(self.lengths)), self.batch_size
        if self.drop_last:
            order = order[: len(order) // size * size]
        batches = []
        for begin in range(0, len(order), _POOL * size):
            pool = order[begin : begin + _POOL * size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [pool[at : at + size].tolist() for at in range(0, len(pool), size)]
        for at in rng.permutation(len(batches))[self.start // size :]:
            yield batches[at]


class FixedBatches(Sampler[list[int]]):
    """Every text once, sorted by length, the longest first: what does not fit into memory fails at once."""

    drop_last = False

    def __init__(self, lengths: np.ndarray, batch_size: int):
        self.batch_size = batch_size
        self._order = np.argsort(-lengths, kind="stable")

    def __len__(self) -> int:
        return -(-len(self._order) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for at in range(0, len(self._order), self.batch_size):
            yield self._order[at : at + self.batch_size].tolist()


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def make_loaders(
    splits: Mapping[str, EncodedTexts], val_name: str, *, batch_size: int, workers: int, seed: int, processes: int
) -> Loaders:
    """Batches of the splits "train", "val" and, if there is one, "test"."""
    options = {
        "collate_fn": _as_it_is,  # texts come in batches
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": leave_signals_to_parent,
    }
    sampler = LengthBatches(splits["train"].lengths, batch_size, seed, processes)
    fixed = {
        name: DataLoader(split, batch_sampler=FixedBatches(split.lengths, batch_size), **options)
        for name, split in splits.items()
        if name != "train"
    }
    train = DataLoader(splits["train"], batch_sampler=sampler, **options)
    return Loaders(train, fixed["val"], fixed.get("test"), sampler, batch_size, val_name)


def scores_of(labels: np.ndarray, guesses: np.ndarray) -> dict[str, float]:
    """Accuracy and macro F1 in percent; F1 is the mean over the classes that occur, as labels or guesses."""
    f1 = f1_of(labels, guesses)
    return {"accuracy": float((labels == guesses).mean() * 100), "macro_f1": float(np.mean(list(f1.values())))}


def f1_of(labels: np.ndarray, guesses: np.ndarray) -> dict[int, float]:
    """F1 in percent of every class that occurs."""
    size = int(max(labels.max(), guesses.max())) + 1
    hits = np.bincount(labels[labels == guesses], minlength=size)
    seen = np.bincount(labels, minlength=size) + np.bincount(guesses, minlength=size)
    return {int(c): float(200 * hits[c] / seen[c]) for c in np.flatnonzero(seen)}


class TextClassification:
    """Cross-entropy with label smoothing; accuracy and macro F1.

    Args:
        metric: which of `METRICS` picks the best epoch. smoothing: probability spread over all classes.
    """

    higher_is_better = True
    items = "texts"

    def __init__(self, *, metric: str = "macro_f1", smoothing: float = 0.0):
        self.metric, self.smoothing = metric, smoothing

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, classes), float32."""
        return model(**{name: part for name, part in batch.items() if name != "label"}).float()

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.logits(model, batch)
        right = (logits.detach().argmax(1) == batch["label"]).float().mean() * 100
        return F.cross_entropy(logits, batch["label"], label_smoothing=self.smoothing), {"accuracy": right}

    def measure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss, label and the model's choice, each (B,); -1 for undefined logits."""
        logits = self.logits(model, batch)
        guess = torch.where(logits.isnan().any(1), -1, logits.argmax(1))
        return {
            "loss": F.cross_entropy(logits, batch["label"], reduction="none"),
            "label": batch["label"],
            "guess": guess,
        }

    def summarize(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        labels, guesses = measured["label"].numpy(), measured["guess"].numpy()
        # undefined is a class of its own, never right
        guesses = np.where(guesses < 0, labels.max() + 1, guesses)
        return {"loss": measured["loss"].double().mean().item(), **scores_of(labels, guesses)}

    def describe(self, values: Mapping[str, float]) -> str:
        parts = [f"loss {values['loss']:.3f}"]
        names = {"accuracy": "accuracy", "macro_f1": "macro F1"}
        return ", ".join(parts + [f"{title} {values[name]:.2f} %" for name, title in names.items() if name in values])


@dataclass(frozen=True)
class Baselines:
    """What needs no network: predictions (N,) by name for texts with these labels."""

    labels: np.ndarray
    guesses: Mapping[str, np.ndarray]

    def scores(self) -> dict[str, dict[str, float]]:
        return {name: scores_of(self.labels, guess) for name, guess in self.guesses.items()}


def word_baselines(train: Texts, test: Texts, classes: int) -> Baselines:
    """The commonest class, and naive Bayes on single words."""
    commonest = Counter(train.labels).most_common(1)[0][0]
    guesses = {
        "majority class": np.full(len(test), commonest),
        "naive Bayes on words": _naive_bayes(train, test, classes),
    }
    return Baselines(np.array(test.labels), guesses)


def _words(texts: tuple[str, ...]) -> list[str]:
    # words of the second text are others than those of the first
    return [f"{place}{word}" for place, text in enumerate(texts) for word in re.findall(r"\w+", text.lower())]


def _naive_bayes(train: Texts, test: Texts, classes: int) -> np.ndarray:
    """argmax_c log p(c) + sum over words of log p(word | c), one added to every count."""
    number: dict[str, int] = {}
    for texts in train.texts:
        for word in _words(texts):
            number.setdefault(word, len(number))
    counts = np.ones((classes, max(len(number), 1)))
    for texts, label in zip(train.texts, train.labels, strict=True):
        np.add.at(counts[label], [number[word] for word in _words(texts)], 1)
    log_words = np.log(counts / counts.sum(1, keepdims=True))
    prior = np.log(np.bincount(train.labels, minlength=classes) + 1)
    found = [[number[word] for word in _words(texts) if word in number] for texts in test.texts]
    return np.array([int((prior + log_words[:, words].sum(1)).argmax()) for words in found])


def result_table(name: str, result: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]) -> str:
    """The result and the baselines on the same texts."""
    rows = [{"name": name, **result}, *({"name": title, **scores} for title, scores in baselines.items())]
    columns = [
        Column("name", "classifier", left=True),
        Column("accuracy", "accuracy %", "{:.2f}".format),
        Column("macro_f1", "macro F1 %", "{:.2f}".format),
    ]
    return text_table(columns, rows)


def class_table(measured: Mapping[str, Tensor], class_names: Sequence[str]) -> str:
    """F1 of every class that occurs."""
    labels, guesses = measured["label"].numpy(), measured["guess"].numpy()
    scores = f1_of(labels, np.where(guesses < 0, labels.max() + 1, guesses))
    rows = [
        {"name": class_names[c], "f1": f1, "texts": int((labels == c).sum())}
        for c, f1 in scores.items()
        if c < len(class_names)
    ]
    columns = [Column("name", "class", left=True), Column("f1", "F1 %", "{:.2f}".format), Column("texts", "texts")]
    return text_table(columns, rows)
