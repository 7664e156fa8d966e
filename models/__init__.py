"""Backbones: the residual branch and block, the skeletons, one file per family, complexity, the timm bridge."""

from . import metaformer_baselines, poolformer  # noqa: F401 - registers them
from ._registry import create_model, list_models
from .block import MetaFormerBlock, ResidualBranch
from .complexity import Complexity, complexity
from .metaformer import MetaFormer

__all__ = ["Complexity", "MetaFormer", "MetaFormerBlock", "ResidualBranch", "complexity", "create_model", "list_models"]
