"""Key rules: a table from another layout's names to ours that can be read in both directions.

A rule is ``(theirs, ours)`` or ``(theirs, ours, transform)``. Patterns are keys with placeholders:

    {i}             an index, the same on both sides
    {2s}, {s+1}     an index that is a linear function of the other side's
    {p:weight|bias} one of these words
    {rest:*}        anything

    ("network.{2s}.{i}.norm1.{p:weight|bias}", "stages.{s}.blocks.{i}.token.norm.{p}")

``ours`` may be a tuple of patterns (one tensor, several parameters), or None with the reason in the third place: a key
that is known and left out on purpose. A key that no rule knows is an error, in both directions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ._files import CheckpointError

Values = dict[str, int | str]
_PLACEHOLDER = re.compile(r"\{(\d*)([a-z]+)([+-]\d+)?(?::([^}]*))?\}")


class Pattern:
    """A key with placeholders, to be matched or to be filled.

    Args:
        text: the key.
        words: words of placeholders that ``text`` names without listing them, by name.
    """

    def __init__(self, text: str, words: Mapping[str, str | None] | None = None):
        self.text = text
        self.words: dict[str, str | None] = {}
        self._known = words or {}
        self._linear: list[tuple[str, int, int]] = []
        self._parts: list[str | tuple[str, int, int]] = []
        regex, end = "", 0
        for hole in _PLACEHOLDER.finditer(text):
            self._parts.append(text[end : hole.start()])
            regex += re.escape(text[end : hole.start()]) + self._hole(*hole.groups())
            end = hole.end()
        self._parts.append(text[end:])
        self._regex = re.compile(regex + re.escape(text[end:]))
        if "{" in re.sub(_PLACEHOLDER, "", text):
            raise ValueError(f"malformed placeholder in the key pattern {text!r}")

    def _hole(self, factor: str, name: str, offset: str | None, words: str | None) -> str:
        linear = (name, int(factor or 1), int(offset or 0))
        self._parts.append(linear)
        if name in self.words:
            return f"(?P={name})"
        words = self._known.get(name) if words is None else words
        self.words[name] = words
        if words is None:
            self._linear.append(linear)
            return rf"(?P<{name}>\d+)"
        choice = ".+" if words == "*" else "|".join(map(re.escape, words.split("|")))
        return f"(?P<{name}>{choice})"

    def match(self, key: str) -> Values | None:
        """The placeholders' values if the key fits, else None."""
        found = self._regex.fullmatch(key)
        if found is None:
            return None
        values: Values = dict(found.groupdict())
        for name, factor, offset in self._linear:
            index, rest = divmod(int(values[name]) - offset, factor)
            if rest or index < 0:
                return None
            values[name] = index
        return values

    def fill(self, values: Values) -> str:
        """The key with these values."""
        return "".join(part if isinstance(part, str) else self._value(part, values) for part in self._parts)

    @staticmethod
    def _value(part: tuple[str, int, int], values: Values) -> str:
        name, factor, offset = part
        value = values[name]
        return str(factor * value + offset) if isinstance(value, int) else value


@dataclass(frozen=True)
class Transform:
    """How a tensor changes between the layouts; ``save`` undoes ``load`` bit for bit.

    ``load`` maps one tensor of theirs to one of ours, or to a tuple where a rule names several parameters;
    ``save`` maps these back.
    """

    load: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    save: Callable[..., Tensor]


def _to_linear(weight: Tensor) -> Tensor:
    return weight.flatten(1) if weight.ndim > 2 and weight[0, 0].numel() == 1 else weight


def _same(*copies: Tensor) -> Tensor:
    first = copies[0]
    if any(not torch.equal(first, other) for other in copies[1:]):
        raise CheckpointError("parameters that share one tensor in this layout have different values")
    return first


TRANSFORMS = {
    "same": Transform(lambda t: t, _same),
    # 1x1 convolution (O, I, 1, 1) <-> linear (O, I); already flat weights pass
    "pointwise": Transform(_to_linear, lambda t: t[:, :, None, None]),
    # map (1, C, H, W) <-> (1, H, W, C)
    "channels_last": Transform(lambda t: t.permute(0, 2, 3, 1), lambda t: t.permute(0, 3, 1, 2)),
}


@dataclass(frozen=True)
class Rule:
    """One line of a table, see the module's docstring.

    Attributes:
        theirs: their key.
        ours: our key, several for one tensor that feeds several parameters, or none for a dead key.
        transform: a `Transform` or the name of one in `TRANSFORMS`.
        unless: read from ours to theirs, the rule is skipped where this key of ours exists; placeholders have the
            values of the rule's own. For layouts that store the same parameter in two ways.
        why: reason for leaving a dead key out; with ``ours``, the reason why a model may do without these parameters,
            whose tensor is then left out.
    """

    theirs: str
    ours: str | tuple[str, ...] | None
    transform: str | Transform = "same"
    unless: str | None = None
    why: str = ""

    @classmethod
    def of(cls, line: Rule | Sequence) -> Rule:
        """A rule from a line of a table."""
        if isinstance(line, Rule):
            return line
        if len(line) > 2 and line[1] is None:
            return cls(line[0], None, why=line[2])
        return cls(*line)

    def __post_init__(self) -> None:
        if self.ours is None and not self.why:
            raise ValueError(f"rule for {self.theirs!r} leaves the key out without a reason")

    @cached_property
    def source(self) -> Pattern:
        return Pattern(self.theirs)

    # compiled when first needed: most processes that import the library read one layout or none
    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        ours = (self.ours,) if isinstance(self.ours, str) else self.ours or ()
        patterns = tuple(Pattern(text, self.source.words) for text in ours)
        for pattern in patterns:
            if pattern.words.keys() != self.source.words.keys():
                raise ValueError(f"{self.theirs!r} and {pattern.text!r} have different placeholders")
        return patterns

    @cached_property
    def exception(self) -> Pattern | None:
        return None if self.unless is None else Pattern(self.unless)

    @property
    def via(self) -> Transform:
        return TRANSFORMS[self.transform] if isinstance(self.transform, str) else self.transform

    def load(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Our tensors, one for each pattern."""
        tensors = self.via.load(tensor)
        return tensors if isinstance(tensors, tuple) else (tensors,) * len(self.patterns)


def under(theirs: str, ours: str, rules: Iterable[Rule | Sequence]) -> list[Rule]:
    """The same rules with a prefix on each side; a prefix may have placeholders of its own."""
    placed = []
    for rule in map(Rule.of, rules):
        names = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        names = None if names is None else tuple(ours + name for name in names)
        unless = None if rule.unless is None else ours + rule.unless
        placed.append(Rule(theirs + rule.theirs, names, rule.transform, unless, rule.why))
    return placed


def _near(value: Tensor, want: Tensor) -> bool:
    """Whether a stored constant is the right one, as far as its dtype can say."""
    tolerance = max(1e-6, torch.finfo(value.dtype).eps) if value.is_floating_point() else 0.0
    return value.is_meta or torch.allclose(value.to(want), want, rtol=0, atol=tolerance)


@dataclass(frozen=True)
class Converted:
    """A state dict in our names.

    Attributes:
        tensors: what the rules translated.
        dead: their keys that a rule leaves out, with the tensors, so that they can be put back.
        reasons: why each of these was left out.
        unknown: their keys that no rule knows.
        optional: our keys that a model may do without, and why.
    """

    tensors: dict[str, Tensor]
    dead: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    optional: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Layout:
    """How one publisher names the tensors of a family.

    Attributes:
        name: publisher; layouts of different families may share it.
        title: what it covers, one line.
        marks: patterns of keys that all occur in this layout; they tell it from the others.
        rules: the table; the first rule that fits a key counts.
        fresh: (pattern of our key, reason): parameters that this layout never holds and that keep their values.
        activation: form of GELU that this publisher's network has, which a model that leaves the choice takes on.
        bridge: its keys are ours too, of another form of the model (a classifier's for a dense-prediction form).
        constants: from a state dict of theirs, the tensors that it holds by construction, whatever the weights: dead
            keys, which must have these values in a source and which `export` writes.
        rebuild: makes dead tensors that the authors' code asks for, from its other tensors, when weights are exported.
    """

    name: str
    title: str
    marks: tuple[str, ...]
    rules: Sequence[Rule | Sequence]
    fresh: Sequence[tuple[str, str]] = ()
    activation: str | None = None
    bridge: bool = False
    constants: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    rebuild: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None

    @cached_property
    def table(self) -> list[Rule]:
        return [Rule.of(line) for line in self.rules]

    @cached_property
    def _marks(self) -> list[Pattern]:
        return [Pattern(mark) for mark in self.marks]

    def detect(self, keys: Iterable[str]) -> bool:
        """Whether these are keys of this layout."""
        keys = list(keys)
        return all(any(mark.match(key) is not None for key in keys) for mark in self._marks)

    def find(self, key: str) -> tuple[Rule, tuple[str, ...]] | None:
        """The rule for a key of theirs and our names for it; none if no rule knows the key."""
        for rule in self.table:
            values = rule.source.match(key)
            if values is not None:
                return rule, tuple(pattern.fill(values) for pattern in rule.patterns)
        return None

    def convert(self, state: Mapping[str, Tensor]) -> Converted:
        """Translate their state dict to ours.

        Raises:
            CheckpointError: a constant of this layout has another value.
        """
        tensors, dead, reasons, unknown, optional = {}, {}, {}, [], {}
        for key, tensor in state.items():
            found = self.find(key)
            if found is None:
                unknown.append(key)
                continue
            rule, names = found
            if not names:
                dead[key], reasons[key] = tensor, rule.why
                continue
            tensors.update(zip(names, rule.load(tensor), strict=True))
            optional.update(dict.fromkeys(names, rule.why) if rule.why else {})
        self._check_constants(state)
        return Converted(tensors, dead, reasons, tuple(unknown), optional)

    def _check_constants(self, state: Mapping[str, Tensor]) -> None:
        for key, want in self.constants(state).items() if self.constants else ():
            value = state.get(key, want)
            if value.shape != want.shape or not _near(value, want):
                raise CheckpointError(
                    f"{key} is not the constant that the layout {self.name!r} ({self.title}) has there"
                )

    def unnamed(self, state: Mapping[str, Tensor]) -> list[str]:
        """Our keys that have no name in this layout."""
        return [key for key in state if self._find_ours(key, state) is None]

    def export(self, state: Mapping[str, Tensor], dead: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Translate our state dict to theirs; ``dead`` are tensors to put back as they were.

        Raises:
            CheckpointError: a key has no name in this layout.
        """
        theirs, done = {}, set()
        for key in state:
            if key in done:
                continue
            found = self._find_ours(key, state)
            if found is None:
                raise CheckpointError(f"{key} has no name in the layout {self.name!r} ({self.title})")
            rule, values = found
            names = [pattern.fill(values) for pattern in rule.patterns]
            absent = [name for name in names if name not in state]
            if absent:
                raise CheckpointError(f"layout {self.name!r} stores {', '.join(names)} together, without {absent[0]}")
            theirs[rule.source.fill(values)] = rule.via.save(*(state[name] for name in names)).contiguous()
            done.update(names)
        made = {**(self.rebuild(theirs) if self.rebuild else {}), **theirs}
        return {**made, **(self.constants(theirs) if self.constants else {}), **(dead or {})}

    def _find_ours(self, key: str, state: Mapping[str, Tensor]) -> tuple[Rule, Values] | None:
        for rule in self.table:
            for pattern in rule.patterns:
                values = pattern.match(key)
                if values is None:
                    continue
                if rule.exception is None or rule.exception.fill(values) not in state:
                    return rule, values
        return None

    def nearest(self, key: str) -> str | None:
        """Their pattern that looks most like the key, for messages."""
        close = difflib.get_close_matches(key, [rule.theirs for rule in self.table], n=1, cutoff=0.5)
        return close[0] if close else None


# our own names, for state dicts that come from a model of this library
OWN = Layout("mixzoo", "our own names", (), [("{key:*}", "{key}")])
LAYOUTS: list[Layout] = []


def register_layouts(layouts: Iterable[Layout]) -> None:
    """Add a family's layouts to those that are recognised."""
    LAYOUTS.extend(layouts)


def choose(keys: Iterable[str], names: Iterable[str] | None = None, bridges: bool = False) -> Layout:
    """The layout whose marks are among ``keys`` and that translates most of them.

    Args:
        names: parameters of the model they are for; then translations to these count alone.
        bridges: choose among the bridges instead.
    """
    keys, names = list(keys), None if names is None else set(names)
    best, score = OWN, 0 if names is None else sum(key in names for key in keys)
    for layout in LAYOUTS:
        if layout.bridge != bridges or not layout.detect(keys):
            continue
        known = [found[1] for found in map(layout.find, keys) if found is not None]
        fits = len(known) if names is None else sum(name in names for ours in known for name in ours)
        if fits > score or (best is OWN and score == 0):
            best, score = layout, fits
    return best


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict of any known layout to our names, without a model to fit it to.

    Raises:
        CheckpointError: a key that no rule of the layout knows.
    """
    layout = choose(state)
    converted = layout.convert(state)
    if converted.unknown:
        raise CheckpointError(
            f"no rule of layout {layout.name} ({layout.title}) knows {', '.join(converted.unknown[:4])}"
        )
    return converted.tensors


def export(state: Mapping[str, Tensor], to: str) -> dict[str, Tensor]:
    """Translate our state dict to the layout of the publisher ``to``.

    Raises:
        ValueError: no layout of that name.
        CheckpointError: no layout of that name has a name for every tensor.
    """
    candidates = [layout for layout in (*LAYOUTS, OWN) if layout.name == to and not layout.bridge]
    if not candidates:
        known = sorted({layout.name for layout in (*LAYOUTS, OWN) if not layout.bridge})
        raise ValueError(f"no layout named {to!r}; layouts: {', '.join(known)}")
    unnamed = {layout: layout.unnamed(state) for layout in candidates}
    for layout in (layout for layout, keys in unnamed.items() if not keys):
        theirs = layout.export(state)
        if layout.detect(theirs):
            return theirs
    nearest, keys = min(unnamed.items(), key=lambda item: len(item[1]))
    raise CheckpointError(
        f"these weights cannot be written in the layout {to!r}: of {len(state)} tensors {len(keys)} have no name in "
        f"the nearest one, {nearest.title}: {', '.join(keys[:4]) or 'those that tell it from others are missing'}"
    )
