"""The registries of token mixers and channel mixers, and the one grammar that names them.

A mixer is named by a string, by a pair ``(name, {option: value})``, or, for a backbone, by a list with
one of these per stage; an entry of that list may itself be a list with one per block. JSON lists mean
the same as tuples, so a saved configuration and a command line speak this grammar too.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn

# what every mixer's constructor takes besides its own options
_COMMON = ("rank", "grid_size", "device", "dtype")

MixerSpec = str | tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class MixerInfo:
    """What a block or a user must know of a registered mixer.

    Attributes:
        name: name it is created by.
        factory: its class, called as ``factory(dim, rank=, grid_size=, **options, device=, dtype=)``.
        ranks: ranks of the grids it mixes; 1 is a sequence ``(N,)``, 2 an image ``(H, W)``.
        needs_grid: parameters depend on the grid, so ``grid_size`` is required and ``set_grid_size`` exists.
        extra_inputs: names of optional arguments of ``forward`` that a block passes along.
        paper: where it was published.
        self_contained: brings its own norms and skips, so a block adds none; it has an option ``drop_path``.
        options: its own options and their defaults, read off the constructor.
    """

    name: str
    factory: Callable[..., nn.Module]
    ranks: tuple[int, ...]
    needs_grid: bool = False
    extra_inputs: tuple[str, ...] = ()
    paper: str = ""
    self_contained: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def honours_mask(self) -> bool:
        """Whether padding, which the input ``mask`` tells, is kept out of what is mixed into valid positions."""
        return "mask" in self.extra_inputs


def _own_options(factory: Callable[..., nn.Module]) -> dict[str, Any]:
    """Options of a mixer's constructor with their defaults, without the arguments that all mixers share."""
    parameters = inspect.signature(factory).parameters.values()
    sinks = [p.name for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if sinks:
        raise TypeError(f"{factory.__name__} takes *{sinks[0]}, which hides misspelt options; list its arguments")
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _COMMON}


class Registry:
    """Mixers of one kind by name; third parties add theirs by ``register`` or by an entry-point group.

    The group is loaded on the first name that is not found, so installed packages cost nothing until then.
    """

    def __init__(self, kind: str, entry_points: str):
        self.kind = kind
        self.entry_points = entry_points
        self._infos: dict[str, MixerInfo] = {}
        self._searched_entry_points = False

    def register(
        self,
        name: str,
        *,
        ranks: Sequence[int] = (1, 2),
        needs_grid: bool = False,
        extra_inputs: Sequence[str] = (),
        paper: str = "",
        self_contained: bool = False,
    ) -> Callable[[type[nn.Module]], type[nn.Module]]:
        """Class decorator that registers a mixer; see `MixerInfo` for the metadata.

        Raises:
            ValueError: the name is taken by another class.
            TypeError: the constructor swallows unknown keywords, a grid mixer lacks ``set_grid_size``, or a
                self-contained one the option ``drop_path``.
        """

        def decorate(factory: type[nn.Module]) -> type[nn.Module]:
            known = self._infos.get(name)
            if known is not None and known.factory.__qualname__ != factory.__qualname__:
                raise ValueError(f"{self.kind} {name!r} is already registered as {known.factory.__qualname__}")
            if needs_grid and not callable(getattr(factory, "set_grid_size", None)):
                raise TypeError(f"{self.kind} {name!r} is registered with needs_grid=True but has no set_grid_size")
            options = _own_options(factory)
            if self_contained and "drop_path" not in options:
                raise TypeError(f"{self.kind} {name!r} is registered with self_contained=True but has no drop_path")
            self._infos[name] = MixerInfo(
                name, factory, tuple(ranks), needs_grid, tuple(extra_inputs), paper, self_contained, options
            )
            return factory

        return decorate

    def _load_entry_points(self) -> None:
        from importlib.metadata import entry_points

        self._searched_entry_points = True
        for entry in entry_points(group=self.entry_points):
            entry.load()

    def infos(self) -> dict[str, MixerInfo]:
        """All registered mixers by name, those of installed packages included."""
        if not self._searched_entry_points:
            self._load_entry_points()
        return dict(sorted(self._infos.items()))

    def __getitem__(self, name: str) -> MixerInfo:
        if name not in self._infos and not self._searched_entry_points:
            self._load_entry_points()
        if name not in self._infos:
            close = difflib.get_close_matches(str(name), self._infos, n=3)
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(
                f"no {self.kind} named {name!r}.{hint} Registered: {', '.join(sorted(self._infos))} "
                f"(searched this package and the entry points of group {self.entry_points!r})"
            )
        return self._infos[name]

    def extra_inputs(self, spec: MixerSpec) -> tuple[str, ...]:
        """Names of the optional inputs of the mixer that ``spec`` names."""
        return self[split_spec(spec)[0]].extra_inputs

    def needs_grid(self, spec: MixerSpec) -> bool:
        """Whether the parameters of the mixer that ``spec`` names depend on the grid."""
        return self[split_spec(spec)[0]].needs_grid

    def create(
        self,
        spec: MixerSpec,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int] | None = None,
        device=None,
        dtype=None,
        **options: Any,
    ) -> nn.Module:
        """Build the mixer that ``spec`` names for maps ``(B, *grid, dim)`` of the given rank.

        Raises:
            TypeError: an option the mixer does not have.
            ValueError: an unknown name, an unsupported rank, or a missing or misshapen ``grid_size``.
        """
        name, spec_options = split_spec(spec)
        info = self[name]
        options = {**spec_options, **options}
        unknown = sorted(set(options) - set(info.options))
        if unknown:
            accepted = ", ".join(sorted(info.options)) or "none"
            raise TypeError(f"{self.kind} {name!r} has no option {unknown[0]!r}; accepted: {accepted}")
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim of {self.kind} {name!r} must be a positive integer, not {dim!r}")
        if rank not in info.ranks:
            raise ValueError(f"{self.kind} {name!r} is defined for rank {_either(info.ranks)}, not rank={rank!r}")
        if grid_size is not None:
            grid_size = tuple(int(side) for side in grid_size)
            if len(grid_size) != rank or min(grid_size) < 1:
                raise ValueError(f"grid_size of a rank-{rank} {self.kind} must be {rank} sides >= 1, not {grid_size}")
        elif info.needs_grid:
            raise ValueError(
                f"{self.kind} {name!r} has parameters that depend on the grid: give grid_size, e.g. {(14,) * rank}"
            )
        return info.factory(dim, rank=rank, grid_size=grid_size, **options, device=device, dtype=dtype)


def _either(values: Sequence[int]) -> str:
    return " or ".join(str(v) for v in values)


def _is_spec(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    return isinstance(value, str) or (pair and isinstance(value[0], str) and isinstance(value[1], Mapping))


def split_spec(spec: MixerSpec) -> tuple[str, dict[str, Any]]:
    """``name`` or ``(name, options)`` as the pair of both."""
    if isinstance(spec, str):
        return spec, {}
    if not _is_spec(spec):
        raise ValueError(f"a mixer is named by a string or a pair (name, {{option: value}}), not by {spec!r}")
    return spec[0], dict(spec[1])


def parse_spec(text: str) -> Any:
    """The grammar as text: JSON, or names separated by commas.

    >>> parse_spec("pooling,pooling,attention,attention")
    ['pooling', 'pooling', 'attention', 'attention']
    >>> parse_spec('["pooling", {"pool_size": 5}]')
    ['pooling', {'pool_size': 5}]
    """
    text = text.strip()
    if text.startswith(("[", "{", '"')):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a mixer was given as {text!r}, which is not valid JSON: {error}") from None
    names = [name.strip() for name in text.split(",")]
    return names[0] if len(names) == 1 else names


def specs_per_block(spec: Any, depths: Sequence[int], argument: str = "token_mixer") -> list[list[MixerSpec]]:
    """Expand the grammar to one spec for every block: result[stage][block].

    Args:
        spec: a spec for all stages, or a list with one entry per stage, each a spec or a list per block.
        depths: blocks of each stage.
        argument: name used in errors.
    """
    if _is_spec(spec):
        return [[spec] * depth for depth in depths]
    if not isinstance(spec, tuple | list):
        raise ValueError(f"{argument} must be a name, (name, {{options}}) or a list with one per stage, not {spec!r}")
    if len(spec) != len(depths):
        raise ValueError(f"{argument} has {len(spec)} entries for {len(depths)} stages: {spec!r}")
    blocks = []
    for stage, (entry, depth) in enumerate(zip(spec, depths, strict=True)):
        if _is_spec(entry):
            blocks.append([entry] * depth)
        elif isinstance(entry, tuple | list) and len(entry) == depth and all(map(_is_spec, entry)):
            blocks.append(list(entry))
        else:
            raise ValueError(f"{argument}[{stage}] must be one mixer or {depth}, one per block, not {entry!r}")
    return blocks


TOKEN_MIXERS = Registry("token mixer", "mixzoo.mixers")
CHANNEL_MIXERS = Registry("channel mixer", "mixzoo.channel_mixers")

register_mixer = TOKEN_MIXERS.register
register_channel_mixer = CHANNEL_MIXERS.register
create_mixer = TOKEN_MIXERS.create


def list_mixers() -> dict[str, MixerInfo]:
    """All token mixers by name with their metadata, those of installed packages included."""
    return TOKEN_MIXERS.infos()
