"""Backbones: the residual branch and block, the skeletons, one file per family, complexity, the timm bridge."""

from . import (  # noqa: F401 - registers them
    affnet,
    fnet,
    gfnet,
    inception_transformer,
    lra,
    metaformer_baselines,
    mlp_mixer,
    ninformer,
    overlock,
    patchtsmixer,
    ponet,
    poolformer,
    raftmlp,
    seqformer,
    svt,
    timemixer,
    tsm2,
    tsmixer,
    vim2,
)
from ._inputs import example_inputs
from ._registry import create_model, list_models
from .block import MetaFormerBlock, ResidualBranch
from .complexity import Complexity, complexity
from .isotropic import IsotropicMetaFormer
from .metaformer import MetaFormer
from .reparameterize import reparameterize
from .text_encoder import TextEncoder

__all__ = [
    "Complexity",
    "IsotropicMetaFormer",
    "MetaFormer",
    "MetaFormerBlock",
    "ResidualBranch",
    "TextEncoder",
    "complexity",
    "create_model",
    "example_inputs",
    "list_models",
    "reparameterize",
]
