"""Releases and key layouts of MLP-Mixer (arXiv:2105.01601).

Layouts: timm's (also of Google's weights that timm converted and of MIIL's), Google's original ``.npz``
(google-research/vision_transformer at c6de1e5), and OpenMMLab's.

Google's network has the tanh form of GELU, timm's and OpenMMLab's the exact one; on the same weights logits differ by
less than a thousandth of their spread.
"""

from __future__ import annotations

from dataclasses import replace

from ..models._registry import Release, register_releases
from ._rules import Layout, Transform, register_layouts, under

_LICENCE = "apache-2.0"
_TIMM_URL = "https://github.com/rwightman/pytorch-image-models/releases/download/{}.pth"
_GOOGLE_URL = "https://storage.googleapis.com/mixer_models/{}.npz"
_OPENMMLAB_URL = "https://download.openmmlab.com/mmclassification/v0/mlp-mixer/{}.pth"
_FROM_SCRATCH = "trained on ImageNet-1k alone, in spite of the name timm gave it (its pull request 651)"

# millions of parameters in the paper, multiply-adds in timm's benchmark
_SIZES = {
    "mixer_s32_224": (19, 1.0),
    "mixer_s16_224": (18, 3.79),
    "mixer_b32_224": (60, 3.24),
    "mixer_b16_224": (59, 12.62),
    "mixer_l32_224": (206, 11.27),
    "mixer_l16_224": (207, 44.6),
}

_TIMM = Release(licence=_LICENCE, crop_pct=0.875, mean=(0.5,) * 3, std=(0.5,) * 3)
_MIIL = replace(_TIMM, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear")
# Google resizes straight to the square, whatever the aspect ratio
_GOOGLE = replace(_TIMM, crop_pct=1.0, crop_mode="squash", interpolation="bilinear")


def _timm(file: str, base: Release = _TIMM, **facts) -> Release:
    return replace(base, url=_TIMM_URL.format(file), **facts)


def _google(file: str, **facts) -> Release:
    return replace(_GOOGLE, url=_GOOGLE_URL.format(file), **facts)


_RELEASES = {
    "mixer_b16_224.goog_in21k_ft_in1k": _timm("v0.1-vitjx/jx_mixer_b16_224-76587d61", top1=76.616, note=_FROM_SCRATCH),
    "mixer_b16_224.goog_in21k": _timm("v0.1-vitjx/jx_mixer_b16_224_in21k-617b3de2", num_classes=21843),
    "mixer_b16_224.miil_in21k_ft_in1k": _timm("v0.1-tresnet/mixer_b16_224_miil-9229a591", _MIIL, top1=82.314),
    "mixer_b16_224.miil_in21k": _timm("v0.1-tresnet/mixer_b16_224_miil_in21k-2a558a71", _MIIL, num_classes=11221),
    "mixer_l16_224.goog_in21k_ft_in1k": _timm("v0.1-vitjx/jx_mixer_l16_224-92f9adc4", top1=72.084, note=_FROM_SCRATCH),
    "mixer_l16_224.goog_in21k": _timm("v0.1-vitjx/jx_mixer_l16_224_in21k-846aa33c", num_classes=21843),
}
_RELEASES = {name: replace(release, hf_hub_id=f"timm/{name}") for name, release in _RELEASES.items()}

_RELEASES |= {
    "mixer_b16_224.google_in1k": _google("imagenet1k/Mixer-B_16", top1=76.44, aliases=("mixer_b16_google",)),
    "mixer_b16_224.google_in21k": _google("imagenet21k/Mixer-B_16", num_classes=21843),
    "mixer_b16_224.google_sam_in1k": _google("sam/Mixer-B_16", top1=77.36),
    "mixer_b16_224.google_gsam_in1k": _google("gsam/Mixer-B_16"),
    "mixer_l16_224.google_in1k": _google("imagenet1k/Mixer-L_16", top1=71.76, aliases=("mixer_l16_google",)),
    "mixer_l16_224.google_in21k": _google("imagenet21k/Mixer-L_16", num_classes=21843),
    "mixer_b32_224.google_sam_in1k": _google("sam/Mixer-B_32", top1=72.47, aliases=("mixer_b32_google",)),
    "mixer_b32_224.google_gsam_in1k": _google("gsam/Mixer-B_32"),
    "mixer_s8_224.google_gsam_in1k": _google("gsam/Mixer-S_8", aliases=("mixer_s8_google",)),
    "mixer_s16_224.google_gsam_in1k": _google("gsam/Mixer-S_16", aliases=("mixer_s16_google",)),
    "mixer_s32_224.google_gsam_in1k": _google("gsam/Mixer-S_32", aliases=("mixer_s32_google",)),
    "mixer_b16_224.openmmlab_in1k": replace(
        _TIMM,
        url=_OPENMMLAB_URL.format("mixer-base-p16_3rdparty_64xb64_in1k_20211124-1377e3e0"),
        top1=76.68,
        note="OpenMMLab's network has the norm eps 1e-5",
    ),
    "mixer_l16_224.openmmlab_in1k": replace(
        _TIMM,
        url=_OPENMMLAB_URL.format("mixer-large-p16_3rdparty_64xb64_in1k_20211124-5a2519d2"),
        top1=72.34,
        note="OpenMMLab's network has the norm eps 1e-5",
    ),
}


def _sized(name: str, release: Release) -> Release:
    """The release with the published size, which is that of 1000 classes."""
    params_m, gmacs = _SIZES.get(name.partition(".")[0], (None, None))
    return replace(release, params_m=params_m, gmacs=gmacs) if release.num_classes == 1000 else release


register_releases({name: _sized(name, release) for name, release in _RELEASES.items()})

_OURS = "stages.{i}.blocks.0."
_BLOCK = [
    ("norm1.{p:weight|bias}", "token.norm.{p}"),
    ("mlp_tokens.{l:fc1|fc2}.{p:weight|bias}", "token.op.{l}.{p}"),
    ("norm2.{p:weight|bias}", "channel.norm.{p}"),
    ("mlp_channels.{l:fc1|fc2}.{p:weight|bias}", "channel.op.{l}.{p}"),
]
_TIMM_RULES = [
    ("stem.proj.{p:weight|bias}", "stem.conv.{p}"),
    *under("blocks.{i}.", _OURS, _BLOCK),
    ("norm.{p:weight|bias}", "norm.{p}"),
    ("head.{p:weight|bias}", "head.fc.{p}"),
]

# Flax keeps convolutions as (kh, kw, I, O) and linear layers as (I, O)
_CONV = Transform(lambda t: t.permute(3, 2, 0, 1), lambda t: t.permute(2, 3, 1, 0))
_DENSE = Transform(lambda t: t.t(), lambda t: t.t())


def _flax_norm(theirs: str, ours: str) -> list:
    return [(f"{theirs}/scale", f"{ours}.weight"), (f"{theirs}/bias", f"{ours}.bias")]


def _flax_layer(theirs: str, ours: str, kernel: Transform = _DENSE) -> list:
    return [(f"{theirs}/kernel", f"{ours}.weight", kernel), (f"{theirs}/bias", f"{ours}.bias")]


_GOOGLE_BLOCK = [
    *_flax_norm("LayerNorm_0", "token.norm"),
    *_flax_layer("token_mixing/Dense_0", "token.op.fc1"),
    *_flax_layer("token_mixing/Dense_1", "token.op.fc2"),
    *_flax_norm("LayerNorm_1", "channel.norm"),
    *_flax_layer("channel_mixing/Dense_0", "channel.op.fc1"),
    *_flax_layer("channel_mixing/Dense_1", "channel.op.fc2"),
]
_GOOGLE_RULES = [
    *_flax_layer("stem", "stem.conv", _CONV),
    *under("MixerBlock_{i}/", _OURS, _GOOGLE_BLOCK),
    *_flax_norm("pre_head_layer_norm", "norm"),
    *_flax_layer("head", "head.fc"),
]

_OPENMMLAB_BLOCK = [
    ("ln1.{p:weight|bias}", "token.norm.{p}"),
    ("token_mix.layers.0.0.{p:weight|bias}", "token.op.fc1.{p}"),
    ("token_mix.layers.1.{p:weight|bias}", "token.op.fc2.{p}"),
    ("ln2.{p:weight|bias}", "channel.norm.{p}"),
    ("channel_mix.layers.0.0.{p:weight|bias}", "channel.op.fc1.{p}"),
    ("channel_mix.layers.1.{p:weight|bias}", "channel.op.fc2.{p}"),
]
_OPENMMLAB_RULES = [
    ("backbone.patch_embed.projection.{p:weight|bias}", "stem.conv.{p}"),
    *under("backbone.layers.{i}.", _OURS, _OPENMMLAB_BLOCK),
    ("backbone.ln1.{p:weight|bias}", "norm.{p}"),
    ("head.fc.{p:weight|bias}", "head.fc.{p}"),
]

register_layouts(
    [
        Layout(
            "timm",
            "timm's MLP-Mixers",
            ("stem.proj.weight", "blocks.{i}.mlp_tokens.fc1.weight"),
            _TIMM_RULES,
            activation="gelu",
        ),
        Layout("timm", "timm's MLP-Mixers, one block", ("mlp_tokens.fc1.weight", "norm1.weight"), _BLOCK),
        Layout(
            "google",
            "google-research/vision_transformer, MLP-Mixer as .npz",
            ("MixerBlock_{i}/token_mixing/Dense_0/kernel",),
            _GOOGLE_RULES,
            activation="gelu_tanh",
        ),
        Layout("google", "one block of Google's MLP-Mixer", ("token_mixing/Dense_0/kernel",), _GOOGLE_BLOCK),
        Layout(
            "mmpretrain",
            "OpenMMLab's MLP-Mixers",
            ("backbone.layers.{i}.token_mix.layers.0.0.weight",),
            _OPENMMLAB_RULES,
            activation="gelu",
        ),
    ]
)
