"""PoolFormer and the ablations of its paper.

Paper: arXiv:2111.11418 (MetaFormer is actually what you need for vision). Checked against sail-sg/poolformer a075575.

    x <- x + l1 mixer(norm1(x));  x <- x + l2 mlp(norm2(x))        GroupNorm(1), layer scale, GELU

The head norms the map, then pools. The letters of ``metaformer_<letters>_s12_224`` name the mixer of each stage: p
pooling, a attention, f a fully connected layer over tokens; ``metaformer_id_s12`` mixes nothing. ``poolformer_*_feat``
is the form for dense prediction: the four maps, each through its own norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from ..mixers._layers import make_norm
from ._registry import register_models
from .metaformer import MetaFormer

_S12 = {
    "depths": (2, 2, 6, 2),
    "dims": (64, 128, 320, 512),
    "token_mixer": "pooling",
    "channel_mixer": "mlp",
    "norm": "group",
    "norm_eps": 1e-5,
    "layer_scale": 1e-5,
    "head": "linear",
    "head_norm": "group",
    "head_norm_eps": 1e-5,
    "head_norm_first": True,
}
_M36 = {"depths": (6, 6, 18, 6), "dims": (96, 192, 384, 768), "layer_scale": 1e-6}

_POOLFORMERS = {
    "poolformer_s12": _S12,
    "poolformer_s24": _S12 | {"depths": (4, 4, 12, 4)},
    "poolformer_s36": _S12 | {"depths": (6, 6, 18, 6), "layer_scale": 1e-6},
    "poolformer_m36": _S12 | _M36,
    "poolformer_m48": _S12 | _M36 | {"depths": (8, 8, 24, 8)},
}

_ATTENTION = ("attention", {"proj_bias": True})
_LAYER_NORM = {"norm": "layer", "head_norm": "layer"}
_ABLATIONS = {
    "metaformer_pppa_s12_224": _S12
    | _LAYER_NORM
    | {"token_mixer": ("pooling", "pooling", "pooling", _ATTENTION), "pos_embed": (3,)},
    "metaformer_ppaa_s12_224": _S12
    | _LAYER_NORM
    | {"token_mixer": ("pooling", "pooling", _ATTENTION, _ATTENTION), "pos_embed": (2,)},
    "metaformer_pppf_s12_224": _S12 | {"token_mixer": ("pooling", "pooling", "pooling", "spatial_fc")},
    "metaformer_ppff_s12_224": _S12 | {"token_mixer": ("pooling", "pooling", "spatial_fc", "spatial_fc")},
}


class DensePoolFormer(nn.Module):
    """The four maps of a MetaFormer, each through its own norm: images to a list of four ``(B, C, H, W)``.

    Args:
        norm, norm_eps: of the norms, see `make_norm`.
        in_chans, img_size, drop_path_rate and all further ones: see `MetaFormer`; it has no head.
    """

    modality = "image"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        token_mixer: object = "pooling",
        channel_mixer: object = "mlp",
        norm: str = "group",
        norm_eps: float = 1e-5,
        layer_scale: float | None = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.config: dict = {}
        self.class_names = None
        self.num_classes = 0
        self.body = MetaFormer(
            in_chans=in_chans,
            num_classes=0,
            img_size=img_size,
            drop_path_rate=drop_path_rate,
            depths=depths,
            dims=dims,
            token_mixer=token_mixer,
            channel_mixer=channel_mixer,
            norm=norm,
            norm_eps=norm_eps,
            layer_scale=layer_scale,
            head_norm=None,
            global_pool="",
            device=device,
            dtype=dtype,
        )
        self.norms = nn.ModuleList(make_norm(norm, dim, eps=norm_eps, device=device, dtype=dtype) for dim in dims)

    @property
    def in_chans(self) -> int:
        return self.body.in_chans

    @property
    def img_size(self) -> tuple[int, int]:
        return self.body.img_size

    @property
    def feature_info(self) -> list[dict]:
        return self.body.feature_info

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """See `MetaFormer.set_input_size`."""
        self.body.set_input_size(img_size)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.body.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        return [norm(y).permute(0, 3, 1, 2) for norm, y in zip(self.norms, maps, strict=True)]


_HEAD = ("head", "head_norm", "head_norm_eps", "head_norm_first")

register_models(MetaFormer, {k: v for k, v in _POOLFORMERS.items() if "_s" in k})
register_models(MetaFormer, {k: v for k, v in _POOLFORMERS.items() if "_m" in k}, crop_pct=0.95)
register_models(MetaFormer, {"metaformer_id_s12": _S12 | {"token_mixer": "identity"}})
register_models(MetaFormer, _ABLATIONS, fixed_input_size=True)
register_models(
    DensePoolFormer,
    {f"{name}_feat": {k: v for k, v in row.items() if k not in _HEAD} for name, row in _POOLFORMERS.items()},
    timm=False,
    classifier=None,
    first_conv="body.stem.conv",
    note="four maps for dense prediction",
)
