"""NiNformer: a network inside the network gates a linear layer.

Paper: arXiv:2403.02411. Checked against Abdullah-88/NiNformer at 0ec85d4.

    x <- x + (norm(x) P + p) * mixer(norm(x));  x <- x + mlp(norm(x))        see `mixzoo.mixers.nin_gating`

Both branches of a block have one and the same norm; all hidden widths are 2 C. No position embedding, no norm after the
last block; mean over the tokens, linear classifier. The authors drop half of every MLP's hidden and output values in
training. The sizes for 224 x 224 are ours.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from ._registry import register_models
from .block import MetaFormerBlock
from .isotropic import IsotropicMetaFormer


def one_norm_block(dim: int, **options: Any) -> MetaFormerBlock:
    """A `MetaFormerBlock`, whose arguments these are, with one norm that both of its branches apply."""
    block = MetaFormerBlock(dim, **options)
    block.channel.norm = block.token.norm
    return block


def keep_default(module: nn.Module) -> None:
    """Leave torch's initial values, as the authors do."""


def _row(patch_size: int, dim: int, depth: int, drop: float) -> dict[str, Any]:
    return {
        "patch_size": patch_size,
        "dim": dim,
        "depth": depth,
        "token_mixer": "nin_gating",
        "channel_mixer": ("mlp", {"ratio": 2.0}),
        "proj_drop_rate": drop,
        "norm_eps": 1e-5,
        "final_norm_eps": None,
        "block": one_norm_block,
        "init": keep_default,
    }


_SMALL = _row(4, 256, 4, 0.5)
_COMMON = {"fixed_input_size": True, "crop_pct": 1.0}
_CIFAR = _COMMON | {"reduction": 4, "input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_MNIST = _COMMON | {"reduction": 4, "input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,)}

register_models(IsotropicMetaFormer, {"ninformer_cifar10": _SMALL}, **_CIFAR, num_classes=10)
register_models(IsotropicMetaFormer, {"ninformer_cifar100": _SMALL}, **_CIFAR, num_classes=100)
register_models(IsotropicMetaFormer, {"ninformer_mnist": _SMALL}, **_MNIST, num_classes=10)

# the open sizes, in the widths and depths of the small vision transformers
register_models(
    IsotropicMetaFormer,
    {
        "ninformer_ti16": _row(16, 192, 12, 0.0),
        "ninformer_s16": _row(16, 384, 12, 0.0),
        "ninformer_b16": _row(16, 768, 12, 0.0),
    },
    **_COMMON,
    reduction=16,
    note="open size, not published",
)
