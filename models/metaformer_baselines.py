"""IdentityFormer, RandFormer, PoolFormerV2, ConvFormer and CAFormer.

Paper: arXiv:2210.13452 (MetaFormer baselines for vision). Checked against sail-sg/metaformer at 64c534a.

    x <- r1 x + mixer(norm1(x));  x <- r2 x + mlp(norm2(x))        no biases; StarReLU; r in stages 3, 4

The head pools, then norms; ConvFormer and CAFormer classify with an MLP. "s36" and "m36" mean other depths and widths
in ConvFormer and CAFormer than in the rest.
"""

from __future__ import annotations

from ._registry import register_models
from .metaformer import MetaFormer

_V2 = {
    "channel_mixer": ("mlp", {"act": "star_relu", "bias": False}),
    "norm_eps": 1e-6,
    "res_scale": (None, None, 1.0, 1.0),
    "stem_norm": "post",
    "down_norm": "pre",
    "head_norm": "layer",
    "head_norm_eps": 1e-6,
    "init_convs": True,
}
_BASIC = _V2 | {"norm": "group_nobias", "head": "linear"}
_BASIC_SIZES = {
    "s12": {"depths": (2, 2, 6, 2), "dims": (64, 128, 320, 512)},
    "s24": {"depths": (4, 4, 12, 4), "dims": (64, 128, 320, 512)},
    "s36": {"depths": (6, 6, 18, 6), "dims": (64, 128, 320, 512)},
    "m36": {"depths": (6, 6, 18, 6), "dims": (96, 192, 384, 768)},
    "m48": {"depths": (8, 8, 24, 8), "dims": (96, 192, 384, 768)},
}
_LARGE = _V2 | {"norm": "layer_nobias", "head": "mlp"}
_LARGE_SIZES = {
    "s18": {"depths": (3, 3, 9, 3), "dims": (64, 128, 320, 512)},
    "s36": {"depths": (3, 12, 18, 3), "dims": (64, 128, 320, 512)},
    "m36": {"depths": (3, 12, 18, 3), "dims": (96, 192, 384, 576)},
    "b36": {"depths": (3, 12, 18, 3), "dims": (128, 256, 512, 768)},
}
_RANDOM = ("identity", "identity", "random", "random")
_CONV_ATTENTION = ("separable_conv", "separable_conv", "attention", "attention")


def _sizes(family: str, row: dict, sizes: dict[str, dict]) -> dict[str, dict]:
    return {f"{family}_{size}": row | widths for size, widths in sizes.items()}


register_models(MetaFormer, _sizes("identityformer", _BASIC | {"token_mixer": "identity"}, _BASIC_SIZES), crop_pct=1.0)
register_models(
    MetaFormer,
    _sizes("randformer", _BASIC | {"token_mixer": _RANDOM}, _BASIC_SIZES),
    crop_pct=1.0,
    fixed_input_size=True,
    note="frozen random matrices: takes the size it was built for",
)
register_models(MetaFormer, _sizes("poolformerv2", _BASIC | {"token_mixer": "pooling"}, _BASIC_SIZES), crop_pct=1.0)
register_models(
    MetaFormer,
    _sizes("convformer", _LARGE | {"token_mixer": "separable_conv"}, _LARGE_SIZES),
    crop_pct=1.0,
    classifier="head.fc.fc2",
)
register_models(
    MetaFormer,
    _sizes("caformer", _LARGE | {"token_mixer": _CONV_ATTENTION}, _LARGE_SIZES),
    crop_pct=1.0,
    classifier="head.fc.fc2",
)

# the open names: any mixer, in the sizes of the basic baselines
register_models(
    MetaFormer,
    _sizes("metaformer", _BASIC | {"token_mixer": "pooling"}, _BASIC_SIZES),
    crop_pct=1.0,
    note="open: any token_mixer",
)
