"""ListOps, generated: nested lists of digits whose value is to be found, equal in distribution to Long Range Arena's.

Paper: arXiv:1804.06028, in the form of arXiv:2011.04006. A tree is drawn from its root at depth 1:

    node(depth):  depth < max_depth and U(0, 1) <= 0.25:  operator MIN, MAX, MED or SM, then 2..10 nodes of depth + 1
                  otherwise:                              digit 0..9
    value:        MIN, MAX; MED: median, rounded down; SM: sum modulo 10
    kept if       shortest < length < longest, and not drawn before

As tokens: ``[OP children ]``, so a node has length 1, or 2 and its children's. Trees are drawn level by level, many at
once: the benchmark's 100,000 take some 12 s on one core, a hundredth of what drawing them one by one does.

A classifier of the first token alone gets 36.8 % of the test right; most published results do not get further. The
baselines at the end of this file go with every result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# ids: 0 padding, 1..10 digits, 11..14 operators, 15 the closing bracket
PAD, DIGIT, OPERATOR, CLOSE = 0, 1, 11, 15
OPERATORS = ("MIN", "MAX", "MED", "SM")
MIN, MAX, MED, SM = range(4)
VOCABULARY = ("<pad>", *"0123456789", *(f"[{name}" for name in OPERATORS), "]")
_MAX_ARGUMENTS = 10
_P_OPERATOR = 0.25
# roots drawn at once; more than half of them are single digits
_ROOTS = 20_000


@dataclass(frozen=True)
class Size:
    """Which trees are kept: shortest < length < longest; operators lie above ``max_depth``."""

    shortest: int
    longest: int
    max_depth: int


# the benchmark's, and two with the same structure for small machines
SIZES = {"listops": Size(500, 2000, 10), "listops-500": Size(100, 500, 6), "listops-200": Size(20, 200, 4)}
# training, validation and test; the benchmark tests 2,000, whose standard error is 1.1 points
ITEMS = (96_000, 2_000, 10_000)


@dataclass(frozen=True)
class Expressions:
    """Token lists one after the other: list i is ``tokens[starts[i]:starts[i + 1]]``, its value ``labels[i]``."""

    tokens: np.ndarray
    starts: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def part(self, start: int, stop: int) -> Expressions:
        """Lists ``start`` to ``stop``."""
        ends = self.starts[start : stop + 1]
        return Expressions(self.tokens[ends[0] : ends[-1]], ends - ends[0], self.labels[start:stop])


@dataclass
class _Level:
    """Nodes of one depth, children of one parent side by side: digit, or operator and number of children (else 0)."""

    digit: np.ndarray
    operator: np.ndarray
    children: np.ndarray
    length: np.ndarray
    value: np.ndarray


def _draw(rng: np.random.Generator, roots: int, max_depth: int) -> list[_Level]:
    """Levels of ``roots`` trees, lengths and values not known yet."""
    levels, count = [], roots
    for depth in range(1, max_depth + 1):
        is_operator = (rng.random(count) <= _P_OPERATOR) & (depth < max_depth)
        children = np.where(is_operator, rng.integers(2, _MAX_ARGUMENTS + 1, count), 0)
        digit = rng.integers(0, 10, count)
        levels.append(_Level(digit, rng.integers(0, 4, count), children, np.ones(count, np.int64), digit.copy()))
        count = int(children.sum())
        if not count:
            break
    return levels


def _evaluate(levels: list[_Level]) -> None:
    """Lengths and values, from the deepest level up."""
    for level, below in zip(reversed(levels[:-1]), reversed(levels[1:]), strict=True):
        at = np.flatnonzero(level.children)
        counts = level.children[at]
        first = np.cumsum(counts) - counts  # of every operator's children
        level.length[at] = 2 + np.add.reduceat(below.length, first)
        ordered = below.value[np.lexsort((below.value, np.repeat(np.arange(len(at)), counts)))]
        low, high = ordered[first + (counts - 1) // 2], ordered[first + counts // 2]
        results = (
            ordered[first],
            ordered[first + counts - 1],
            (low + high) // 2,
            np.add.reduceat(below.value, first) % 10,
        )
        level.value[at] = np.choose(level.operator[at], results)


def _write(levels: list[_Level]) -> np.ndarray:
    """Tokens of all trees, one after the other."""
    tokens = np.empty(int(levels[0].length.sum()), np.uint8)
    position = np.cumsum(levels[0].length) - levels[0].length
    for level, below in zip(levels, [*levels[1:], None], strict=True):
        at = np.flatnonzero(level.children)
        tokens[position] = DIGIT + level.digit
        tokens[position[at]] = OPERATOR + level.operator[at]
        tokens[position[at] + level.length[at] - 1] = CLOSE
        if below is None or not len(at):
            break
        counts = level.children[at]
        before = np.cumsum(below.length) - below.length
        family = np.repeat(before[np.cumsum(counts) - counts], counts)  # of the first child
        position = np.repeat(position[at] + 1, counts) + before - family
    return tokens


def generate(size: Size, count: int, seed: int) -> Expressions:
    """``count`` different expressions; the same ones for the same arguments."""
    rng = np.random.default_rng(seed)
    found: dict[bytes, int] = {}
    while len(found) < count:
        levels = _draw(rng, _ROOTS, size.max_depth)
        _evaluate(levels)
        lengths, values = levels[0].length, levels[0].value
        tokens, ends = _write(levels), np.cumsum(lengths)
        for i in np.flatnonzero((lengths > size.shortest) & (lengths < size.longest)):
            found.setdefault(tokens[ends[i] - lengths[i] : ends[i]].tobytes(), int(values[i]))
    chosen = list(found)[:count]
    starts = np.cumsum([0, *map(len, chosen)])
    labels = np.array([found[key] for key in chosen], np.int64)
    return Expressions(np.frombuffer(b"".join(chosen), np.uint8), starts, labels)


def listops(name: str, *, items: Sequence[int] = ITEMS, seed: int = 0) -> tuple[Expressions, Expressions, Expressions]:
    """Training, validation and test expressions.

    Args:
        name: key of `SIZES`. items: of each split.
    """
    drawn = generate(SIZES[name], sum(items), seed)
    first, second = items[0], items[0] + items[1]
    return drawn.part(0, first), drawn.part(first, second), drawn.part(second, sum(items))


def _first_token(tokens: np.ndarray) -> tuple[int, ...]:
    return (int(tokens[0]),)


def _first_arguments(tokens: np.ndarray) -> tuple[int, ...]:
    """The root's operator and what it makes of the digits directly below it; -1 if there are none."""
    depth = np.cumsum((tokens >= OPERATOR) & (tokens < CLOSE)) - np.cumsum(tokens == CLOSE)
    digits = np.sort(tokens[(depth == 1) & (tokens < OPERATOR)].astype(int) - DIGIT)
    root = int(tokens[0]) - OPERATOR
    if not len(digits):
        return root, -1
    low, high = digits[(len(digits) - 1) // 2], digits[len(digits) // 2]
    return root, int({MIN: digits[0], MAX: digits[-1], MED: (low + high) // 2, SM: digits.sum() % 10}[root])


def baselines(train: Expressions, test: Expressions) -> dict[str, np.ndarray]:
    """Predictions (N,) for ``test`` that need no mixing, from tables of the commonest label in ``train``."""
    majority = np.bincount(train.labels, minlength=10).argmax()
    guesses = {"majority class": np.full(len(test), majority)}
    for name, look in (("first token only", _first_token), ("root operator and its digits", _first_arguments)):
        table: dict[tuple[int, ...], np.ndarray] = {}
        for i, label in enumerate(train.labels):
            table.setdefault(look(train[i]), np.zeros(10, int))[label] += 1
        best = {key: counts.argmax() for key, counts in table.items()}
        guesses[name] = np.array([best.get(look(test[i]), majority) for i in range(len(test))])
    return guesses
