"""Tokenisers: bytes, built in, and those of the ecosystem behind `pip install 'mixzoo[text]'`.

A tokeniser turns a text, or two, into numbers of words, with what stands before, between and behind them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

BYTES = "bytes"


class Encoded(NamedTuple):
    """One text, or two in one list.

    Attributes:
        ids: numbers. types: for each its token type. cut: whether something was cut off.
        places: for each the text and its character that it begins at, None for what was added; only if asked for.
    """

    ids: list[int]
    types: list[int]
    cut: bool
    places: list[tuple[int, int] | None]


class Tokenizer(Protocol):
    """What the text task asks of a tokeniser.

    Attributes:
        name: to describe it by. size: numbers are below it. pad_id: the number that fills up.
        special_ids: numbers that separate parts of a text.
    """

    name: str
    size: int
    pad_id: int
    special_ids: tuple[int, ...]

    def encode(self, texts: Sequence[str], max_length: int, places: bool = False) -> Encoded:
        """Numbers of one text or two, cut to a length.

        Raises:
            ValueError: the places were asked for and are not known.
        """


class ByteTokenizer:
    """UTF-8 bytes: 0 padding, byte b is b + 1 (as in Long Range Arena), 257 [CLS] in front, 258 [SEP] behind each."""

    name, size, pad_id, special_ids = BYTES, 259, 0, (257, 258)

    def encode(self, texts: Sequence[str], max_length: int, places: bool = False) -> Encoded:
        cls, sep = self.special_ids
        # cut as bytes: one character has at most four, so the rest of a long text need not be looked at
        parts = [text[:max_length].encode("utf-8", "replace") for text in texts]
        room = max_length - 1 - len(parts)
        kept = _share(list(map(len, parts)), room)
        ids, types, found = [cls], [0], [None]
        for index, (part, count) in enumerate(zip(parts, kept, strict=True)):
            ids += [byte + 1 for byte in part[:count]] + [sep]
            types += [index] * (count + 1)
            if places:
                # the bytes of a character but the first begin with the bits 10
                seen = accumulate(byte & 0xC0 != 0x80 for byte in part[:count])
                found += [*((index, number - 1) for number in seen), None]
        cut = any(len(text) > max_length for text in texts) or sum(kept) < sum(map(len, parts))
        return Encoded(ids, types, cut, found if places else [])


def _share(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each text stays: the longer one is cut first."""
    if len(lengths) == 1:
        return [min(lengths[0], max(room, 0))]
    first, second = lengths
    half = room // 2
    first_kept = min(first, max(half, room - second))
    return [first_kept, min(second, room - first_kept)]


class LibraryTokenizer:
    """A tokeniser of `transformers`, from a folder or the hub."""

    def __init__(self, name: str):
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(f"--tokenizer {name}: {(str(error).splitlines() or ['cannot be read'])[0]}") from None
        if self._tokenizer.pad_token_id is None:
            raise ValueError(f"--tokenizer {name} has no padding token")
        self.name, self.size, self.pad_id = Path(name).name, len(self._tokenizer), self._tokenizer.pad_token_id
        ids = (self._tokenizer.cls_token_id, self._tokenizer.sep_token_id)
        self.special_ids = tuple(number for number in ids if number is not None)

    def encode(self, texts: Sequence[str], max_length: int, places: bool = False) -> Encoded:
        if places and not self._tokenizer.is_fast:
            raise ValueError(f"--tokenizer {self.name} does not tell where a word began; give a fast one")
        found = self._tokenizer(
            *texts,
            truncation=True,
            max_length=max_length,
            return_token_type_ids=True,
            return_overflowing_tokens=False,
            return_offsets_mapping=places,
        )
        ids = found["input_ids"]
        at = _places(found.sequence_ids(0), found["offset_mapping"]) if places else []
        # a list of full length has been cut, but for the one in many that just fits
        return Encoded(ids, found.get("token_type_ids", [0] * len(ids)), len(ids) >= max_length, at)


def _places(texts: Sequence[int | None], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int] | None]:
    return [None if text is None else (text, start) for text, (start, _) in zip(texts, offsets, strict=True)]


class FileTokenizer:
    """A ``tokenizer.json`` of the package `tokenizers`."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Fast

        try:
            self._tokenizer: Any = Fast.from_file(str(path))
        except Exception as error:  # the package raises plain exceptions
            raise ValueError(f"--tokenizer {path}: {error}") from None
        self._tokenizer.no_padding()
        pads = [self._tokenizer.token_to_id(word) for word in ("<pad>", "[PAD]", "<PAD>")]
        found = [number for number in pads if number is not None]
        if not found:
            raise ValueError(f"--tokenizer {path} has no padding token: <pad> or [PAD]")
        self.name, self.size, self.pad_id = path.parent.name, self._tokenizer.get_vocab_size(), found[0]
        words = ("[CLS]", "[SEP]", "<s>", "</s>")
        ids = [self._tokenizer.token_to_id(word) for word in words]
        self.special_ids = tuple(number for number in ids if number is not None)

    def encode(self, texts: Sequence[str], max_length: int, places: bool = False) -> Encoded:
        self._tokenizer.enable_truncation(max_length)
        found = self._tokenizer.encode(*texts)
        at = _places(found.sequence_ids, found.offsets) if places else []
        return Encoded(found.ids, found.type_ids, bool(found.overflowing), at)


def open_tokenizer(name: str) -> Tokenizer:
    """The tokeniser of that name: ``bytes``, a folder or ``tokenizer.json``, or a name of the hub.

    Raises:
        ValueError: it cannot be read, or a package is missing.
    """
    if name == BYTES:
        return ByteTokenizer()
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if path.is_file():
        if importlib.util.find_spec("tokenizers") is None:
            raise ValueError(f"--tokenizer {name} needs the package tokenizers: pip install 'mixzoo[text]'")
        return FileTokenizer(path)
    if Path(name).suffix == ".json":
        raise ValueError(f"--tokenizer {name}: no such file")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"--tokenizer {name} needs the package transformers: pip install 'mixzoo[text]'")
    return LibraryTokenizer(name)
