"""mixzoo: a zoo of token mixers. See README.md for a tour."""

from .mixers import (
    create_mixer,
    dtcwt_forward,
    dtcwt_inverse,
    list_mixers,
    nchw,
    neighborhood_apply,
    register_mixer,
    selective_scan,
)
from .models import MetaFormer, MetaFormerBlock, ResidualBranch, complexity, create_model, list_models, reparameterize
from .models.timm_bridge import register_all
from .weights import load, load_checkpoint, save

__version__ = "0.1.0"

# after the releases are known, so that timm lists them as tags
register_all()

__all__ = [
    "MetaFormer",
    "MetaFormerBlock",
    "ResidualBranch",
    "complexity",
    "create_mixer",
    "create_model",
    "dtcwt_forward",
    "dtcwt_inverse",
    "list_mixers",
    "list_models",
    "load",
    "load_checkpoint",
    "nchw",
    "neighborhood_apply",
    "register_mixer",
    "reparameterize",
    "save",
    "selective_scan",
]
