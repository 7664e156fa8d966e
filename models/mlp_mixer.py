"""MLP-Mixer.

Paper: arXiv:2105.01601. Checked against google-research/vision_transformer at c6de1e5 and timm 1.0.31.

    x <- x + W2 gelu(W1 norm1(x) + b1) + b2        over tokens, hidden width C / 2
    x <- x + mlp(norm2(x))                         over channels, hidden width 4 C

Patches, blocks, layer norm, mean over the tokens, linear classifier; no position embedding. Google's GELU is the tanh
approximation, timm's the exact one; `load_checkpoint` sets the one that the weights were made for.
"""

from __future__ import annotations

import torch.nn as nn

from ._registry import register_models
from .isotropic import IsotropicMetaFormer


def init_mixer(module: nn.Module) -> None:
    """timm's: Xavier-uniform linear layers with biases near zero, LeCun-normal patch embedding."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(module.bias, std=1e-6)
    elif isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        nn.init.zeros_(module.bias)


_S16 = {
    "patch_size": 16,
    "dim": 512,
    "depth": 8,
    "token_mixer": ("mlp", {"ratio": 0.5}),
    "channel_mixer": ("mlp", {"ratio": 4.0}),
    "act": "gelu",
    "norm_eps": 1e-6,
    "final_norm_eps": 1e-6,
    "init": init_mixer,
}
_B16 = _S16 | {"dim": 768, "depth": 12}
_L16 = _S16 | {"dim": 1024, "depth": 24}
_32, _14, _8 = {"patch_size": 32}, {"patch_size": 14}, {"patch_size": 8}

_MIXERS = {
    8: {"mixer_s8_224": _S16 | _8},
    14: {"mixer_h14_224": _S16 | _14 | {"dim": 1280, "depth": 32}},
    16: {"mixer_s16_224": _S16, "mixer_b16_224": _B16, "mixer_l16_224": _L16},
    32: {"mixer_s32_224": _S16 | _32, "mixer_b32_224": _B16 | _32, "mixer_l32_224": _L16 | _32},
}

for _reduction, _rows in _MIXERS.items():
    register_models(
        IsotropicMetaFormer,
        _rows,
        fixed_input_size=True,
        crop_pct=0.875,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        reduction=_reduction,
    )
