"""Releases and key layouts of IdentityFormer, RandFormer, PoolFormerV2, ConvFormer and CAFormer (arXiv:2210.13452).

Layouts: the authors' (sail-sg/metaformer at 64c534a) and timm's, which also covers PoolFormer (arXiv:2111.11418).

timm stores the linear layers of a stage as 1x1 convolutions, unless the stage mixes by attention. Its PoolFormer pools
before the last norm, where the authors and this library norm the map first: the same tensors, other logits.
"""

from __future__ import annotations

from ..models._registry import Release, register_releases
from ._rules import Layout, Rule, register_layouts, under

_URL = "https://huggingface.co/sail/dl/resolve/main/{}/{}.pth"
_LICENCE = "apache-2.0"

# published trainable parameters (M), multiply-adds (G), ImageNet-1k top-1
_BASIC = {
    "identityformer_s12": (11.9, 1.8, 74.6),
    "identityformer_s24": (21.3, 3.4, 78.2),
    "identityformer_s36": (30.8, 5.0, 79.3),
    "identityformer_m36": (56.1, 8.8, 80.0),
    "identityformer_m48": (73.3, 11.5, 80.4),
    "randformer_s12": (11.9, 1.9, 76.6),
    "randformer_s24": (21.3, 3.5, 78.2),
    "randformer_s36": (30.8, 5.2, 79.5),
    "randformer_m36": (56.1, 9.0, 81.2),
    "randformer_m48": (73.3, 11.9, 81.4),
    "poolformerv2_s12": (11.9, 1.8, 78.0),
    "poolformerv2_s24": (21.3, 3.4, 80.7),
    "poolformerv2_s36": (30.8, 5.0, 81.6),
    "poolformerv2_m36": (56.1, 8.8, 82.2),
    "poolformerv2_m48": (73.3, 11.5, 82.6),
}
# parameters (M); multiply-adds (G) at 224 and 384; top-1 at 224 and 384 of ImageNet-1k training, the same after
# ImageNet-21k pretraining
_LARGE = {
    "convformer_s18": (27, (3.9, 11.6), (83.0, 84.4), (83.7, 85.0)),
    "convformer_s36": (40, (7.6, 22.4), (84.1, 85.4), (85.4, 86.4)),
    "convformer_m36": (57, (12.8, 37.7), (84.5, 85.6), (86.1, 86.9)),
    "convformer_b36": (100, (22.6, 66.5), (84.8, 85.7), (87.0, 87.6)),
    "caformer_s18": (26, (4.1, 13.4), (83.6, 85.0), (84.1, 85.4)),
    "caformer_s36": (39, (8.0, 26.0), (84.5, 85.7), (85.8, 86.9)),
    "caformer_m36": (56, (13.2, 42.0), (85.2, 86.2), (86.6, 87.5)),
    "caformer_b36": (99, (23.2, 72.2), (85.5, 86.4), (87.4, 88.1)),
}

# published beside the trainable parameters of randformer_*, in millions
_FROZEN = {"s12": 0.2, "s24": 0.5, "s36": 0.7, "m36": 0.7, "m48": 0.9}


def _basic(arch: str, params_m: float, gmacs: float, top1: float) -> Release:
    family, size = arch.split("_")
    frozen = f"and {_FROZEN[size]} M frozen parameters" if family == "randformer" else ""
    return Release(
        url=_URL.format(family, arch),
        hf_hub_id=f"timm/{arch}.sail_in1k" if family == "poolformerv2" else "",
        licence=_LICENCE,
        crop_pct=1.0,
        top1=top1,
        params_m=params_m,
        gmacs=gmacs,
        note=frozen,
    )


def _large(arch: str, params_m: float, gmacs: tuple, in1k: tuple, in21k: tuple) -> dict[str, Release]:
    """The five releases of an architecture: timm's tag, the authors' suffix, side, top-1, classes."""
    table = [
        ("sail_in1k", "", 224, in1k[0], 1000),
        ("sail_in1k_384", "_384", 384, in1k[1], 1000),
        ("sail_in22k_ft_in1k", "_in21ft1k", 224, in21k[0], 1000),
        ("sail_in22k_ft_in1k_384", "_384_in21ft1k", 384, in21k[1], 1000),
        ("sail_in22k", "_in21k", 224, None, 21841),
    ]
    return {
        f"{arch}.{tag}": Release(
            url=_URL.format(arch.split("_")[0], arch + suffix),
            hf_hub_id=f"timm/{arch}.{tag}",
            licence=_LICENCE,
            input_size=(3, side, side),
            crop_pct=1.0,
            num_classes=classes,
            top1=top1,
            # the published sizes are those of 1000 classes
            params_m=params_m if classes == 1000 else None,
            gmacs=gmacs[side == 384] if classes == 1000 else None,
            aliases=(arch + suffix,) if suffix else (),
        )
        for tag, suffix, side, top1, classes in table
    }


register_releases({f"{arch}.sail_in1k": _basic(arch, *row) for arch, row in _BASIC.items()})
for _arch, _row in _LARGE.items():
    register_releases(_large(_arch, *_row))

_MIXER = [
    ("{l:pwconv1|dwconv|pwconv2}.weight", "{l}.weight"),
    ("act1.{p:scale|bias}", "act.{p}"),
    ("{l:qkv|proj}.weight", "{l}.weight"),
    ("random_matrix", "random_matrix"),
]
_BLOCK = [
    ("norm1.weight", "token.norm.weight"),
    ("norm2.weight", "channel.norm.weight"),
    ("layer_scale1.scale", "token.layer_scale"),
    ("layer_scale2.scale", "channel.layer_scale"),
    ("res_scale1.scale", "token.res_scale"),
    ("res_scale2.scale", "channel.res_scale"),
    ("mlp.act.{p:scale|bias}", "channel.op.act.{p}"),
    *under("token_mixer.", "token.op.", _MIXER),
]
_LINEAR = [("mlp.{l:fc1|fc2}.weight", "channel.op.{l}.weight")]
_STAGES = "stages.{s}.blocks.{i}."

_SAIL = [
    ("downsample_layers.0.conv.{p:weight|bias}", "stem.conv.{p}"),
    ("downsample_layers.0.post_norm.weight", "stem.norm.weight"),
    ("downsample_layers.{s}.conv.{p:weight|bias}", "stages.{s}.downsample.conv.{p}"),
    ("downsample_layers.{s}.pre_norm.weight", "stages.{s}.downsample.norm.weight"),
    *under("stages.{s}.{i}.", _STAGES, _BLOCK + _LINEAR),
    ("norm.{p:weight|bias}", "head.norm.{p}"),
    ("head.{p:weight|bias}", "head.fc.{p}"),
    ("head.{l:fc1|norm|fc2}.{p:weight|bias}", "head.fc.{l}.{p}"),
]

# in attention stages timm keeps the matrices flat; reading, the first rule takes either rank
_ATTENTION = "token.op.qkv.weight"
_TIMM_BLOCK = [
    Rule("mlp.{l:fc1|fc2}.weight", "channel.op.{l}.weight", "pointwise", unless=_ATTENTION),
    Rule("mlp.{l:fc1|fc2}.weight", "channel.op.{l}.weight"),
    ("mlp.{l:fc1|fc2}.bias", "channel.op.{l}.bias"),
    ("token_mixer.{l:pwconv1|pwconv2}.weight", "token.op.{l}.weight", "pointwise"),
    ("norm1.bias", "token.norm.bias"),
    ("norm2.bias", "channel.norm.bias"),
    *_BLOCK,
]
_TIMM = [
    ("stem.conv.{p:weight|bias}", "stem.conv.{p}"),
    ("stem.norm.weight", "stem.norm.weight"),
    ("stages.{s}.downsample.conv.{p:weight|bias}", "stages.{s}.downsample.conv.{p}"),
    ("stages.{s}.downsample.norm.weight", "stages.{s}.downsample.norm.weight"),
    *under("stages.{s}.blocks.{i}.", _STAGES, _TIMM_BLOCK),
    ("head.norm.{p:weight|bias}", "head.norm.{p}"),
    ("head.fc.{p:weight|bias}", "head.fc.{p}"),
    ("head.fc.{l:fc1|norm|fc2}.{p:weight|bias}", "head.fc.{l}.{p}"),
]

LAYOUTS = [
    Layout("sail", "sail-sg/metaformer", ("downsample_layers.0.conv.weight", "stages.{s}.{i}.mlp.fc1.weight"), _SAIL),
    Layout("sail", "sail-sg/metaformer, one block", ("mlp.fc1.weight", "mlp.act.scale"), _BLOCK + _LINEAR),
    Layout("sail", "sail-sg/metaformer, one separable convolution", ("pwconv1.weight", "act1.scale"), _MIXER),
    Layout("timm", "timm's MetaFormers", ("stem.conv.weight", "stages.0.blocks.{i}.mlp.fc1.weight"), _TIMM),
]
register_layouts(LAYOUTS)
