"""The generator of ListOps against the definition, a naive twin and the benchmark's statistics; its baselines."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mixzoo.scripts import _listops
from mixzoo.scripts._listops import SIZES, VOCABULARY, Expressions, Size, generate, listops


def value_of(tokens: list[str]) -> int:
    """The value of an expression, by its definition."""
    token = tokens.pop(0)
    if token.isdigit():
        return int(token)
    values = []
    while tokens[0] != "]":
        values.append(value_of(tokens))
    tokens.pop(0)
    values.sort()
    middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
    return {"[MIN": values[0], "[MAX": values[-1], "[MED": int(middle), "[SM": sum(values) % 10}[token]


def draw_one(rng: random.Random, depth: int, max_depth: int) -> tuple[list[str], int]:
    """Naive twin: one tree by recursion; tokens and depth."""
    if depth < max_depth and rng.random() <= 0.25:
        parts = [draw_one(rng, depth + 1, max_depth) for _ in range(rng.randint(2, 10))]
        operator = rng.choice(["[MIN", "[MAX", "[MED", "[SM"])
        return [operator, *(t for part, _ in parts for t in part), "]"], max(d for _, d in parts)
    return [str(rng.randint(0, 9))], depth


def test_listops_values_follow_their_definition():
    drawn = generate(SIZES["listops-200"], 300, seed=1)
    assert len({drawn[i].tobytes() for i in range(300)}) == 300
    for i in range(300):
        tokens = [VOCABULARY[t] for t in drawn[i]]
        assert 20 < len(tokens) < 200
        assert value_of(tokens) == drawn.labels[i]
        assert not tokens  # nothing behind the last bracket
    again = generate(SIZES["listops-200"], 300, seed=1)
    assert np.array_equal(drawn.tokens, again.tokens)
    assert not np.array_equal(drawn.tokens[:50], generate(SIZES["listops-200"], 300, seed=2).tokens[:50])


def test_listops_is_distributed_as_the_naive_twin():
    size = Size(5, 60, 5)
    drawn = generate(size, 4000, seed=0)
    rng, twin = random.Random(0), []
    while len(twin) < 4000:
        tokens, depth = draw_one(rng, 1, size.max_depth)
        if size.shortest < len(tokens) < size.longest:
            twin.append((len(tokens), VOCABULARY.index(tokens[0]), value_of(list(tokens)), depth))
    twin = np.array(twin)
    lengths = np.diff(drawn.starts)
    roots = np.array([drawn[i][0] for i in range(4000)])
    opens = [(drawn[i] >= 11) & (drawn[i] < 15) for i in range(4000)]
    depths = [int((np.cumsum(o) - np.cumsum(drawn[i] == 15)).max()) + 1 for i, o in enumerate(opens)]
    # short expressions repeat and count once: some tenths of a percent, below the noise
    for ours, theirs in ((lengths, twin[:, 0]), (roots, twin[:, 1]), (drawn.labels, twin[:, 2])):
        values = np.unique(np.concatenate([ours, theirs]))
        a, b = ((ours[:, None] <= values).mean(0), (theirs[:, None] <= values).mean(0))
        assert np.abs(a - b).max() < 1.95 * np.sqrt(2 / 4000)  # Kolmogorov-Smirnov, 0.1 %
    assert abs(np.mean(depths) - twin[:, 3].mean()) < 0.1


def test_listops_statistics_are_those_of_the_benchmark():
    drawn = generate(SIZES["listops"], 3000, seed=0)
    lengths = np.diff(drawn.starts)
    assert lengths.min() > 500
    assert lengths.max() < 2000
    assert abs(lengths.mean() - 1040) < 30
    quantiles = np.quantile(lengths, [0.05, 0.25, 0.5, 0.75, 0.95])
    assert quantiles == pytest.approx([540, 720, 986, 1323, 1810], rel=0.04)
    nested = (drawn.tokens >= 11) & (drawn.tokens < 15)
    depth = np.cumsum(nested.astype(int) - (drawn.tokens == 15))
    assert (np.maximum.reduceat(depth, drawn.starts[:-1]) == 9).all()
    assert ((drawn.tokens >= 11) & (drawn.tokens < 15)).mean() == pytest.approx(0.142, abs=0.002)
    shares = np.bincount(drawn.labels, minlength=10) / 3000
    assert shares[[0, 9]] == pytest.approx(0.17, abs=0.025)
    roots = np.bincount(drawn.tokens[drawn.starts[:-1]], minlength=15)[11:] / 3000
    assert roots == pytest.approx(0.25, abs=0.03)
    assert ((shares[1:9] > 0.06) & (shares[1:9] < 0.11)).all()


def test_listops_baselines():
    train, val, test = listops("listops-500", items=(6000, 10, 4000), seed=0)
    assert (len(train), len(val), len(test)) == (6000, 10, 4000)
    found = {name: (guess == test.labels).mean() for name, guess in _listops.baselines(train, test).items()}
    assert found["majority class"] == pytest.approx(0.17, abs=0.02)
    assert found["first token only"] == pytest.approx(0.367, abs=0.025)
    assert found["root operator and its digits"] == pytest.approx(0.47, abs=0.025)
    nested = Expressions(np.array([12, 11, 1, 2, 15, 4, 15], np.uint8), np.array([0, 7]), np.array([3]))
    assert _listops._first_arguments(nested[0]) == (1, 3)


def test_as_many_trees_are_kept_as_of_the_benchmark():
    levels = _listops._draw(np.random.default_rng(0), 40_000, SIZES["listops"].max_depth)
    _listops._evaluate(levels)
    lengths = levels[0].length
    assert ((lengths > 500) & (lengths < 2000)).mean() == pytest.approx(0.082, abs=0.005)
