"""Checkpoints: releases, key rules, loading, saving.

One file per family registers its releases and its layouts; `_rules` is the engine that reads them in both directions.
"""

from . import (
    affnet,
    fnet,
    gfnet,
    iformer,
    mambamixer,
    metaformer_baselines,
    mlp_mixer,
    ninformer,
    overlock,
    patchtsmixer,
    ponet,
    poolformer,
    raftmlp,
    svt,
    timemixer,
    tsmixer,
)
from ._fetch import fetch, find_release
from ._files import CheckpointError
from ._load import LoadReport, load_checkpoint, load_pretrained
from ._rules import LAYOUTS, Layout, Rule, convert, export
from ._save import load, save

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "Layout",
    "LoadReport",
    "Rule",
    "affnet",
    "convert",
    "export",
    "fetch",
    "find_release",
    "fnet",
    "gfnet",
    "iformer",
    "load",
    "load_checkpoint",
    "load_pretrained",
    "mambamixer",
    "metaformer_baselines",
    "mlp_mixer",
    "ninformer",
    "overlock",
    "patchtsmixer",
    "ponet",
    "poolformer",
    "raftmlp",
    "save",
    "svt",
    "timemixer",
    "tsmixer",
]
