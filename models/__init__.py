"""Backbones: the residual branch and block, the skeletons, one file per family, complexity, the timm bridge."""

from . import (  # noqa: F401 - registers them
    affnet,
    gfnet,
    metaformer_baselines,
    mlp_mixer,
    ninformer,
    poolformer,
    raftmlp,
    svt,
    timemixer,
)
from ._registry import create_model, list_models
from .block import MetaFormerBlock, ResidualBranch
from .complexity import Complexity, complexity
from .isotropic import IsotropicMetaFormer
from .metaformer import MetaFormer

__all__ = [
    "Complexity",
    "IsotropicMetaFormer",
    "MetaFormer",
    "MetaFormerBlock",
    "ResidualBranch",
    "complexity",
    "create_model",
    "list_models",
]
