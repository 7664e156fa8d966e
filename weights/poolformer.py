"""Releases and key layouts of PoolFormer and the ablations of its paper (arXiv:2111.11418).

Layouts: the authors' (sail-sg/poolformer at a075575) for classification and for dense prediction, Hugging Face
transformers', and OpenMMLab's. timm's is in `metaformer_baselines`, because timm has one for both papers.

The authors number stages and downsamplings together: stage s is ``network.{2s}``, the downsampling into it
``network.{2s-1}``, and a position embedding takes a number of its own, which shifts what follows.
"""

from __future__ import annotations

from ..models._registry import Release, register_releases
from ._rules import Layout, Rule, register_layouts, under

_URL = "https://github.com/sail-sg/poolformer/releases/download/v1.0/{}.pth.tar"
_LICENCE = "apache-2.0"

# architecture: crop_pct, published parameters (M), multiply-adds (G), ImageNet-1k top-1
_POOLFORMERS = {
    "poolformer_s12": (0.9, 12, 1.8, 77.2),
    "poolformer_s24": (0.9, 21, 3.4, 80.3),
    "poolformer_s36": (0.9, 31, 5.0, 81.4),
    "poolformer_m36": (0.95, 56, 8.8, 82.1),
    "poolformer_m48": (0.95, 73, 11.6, 82.5),
}
# the repository publishes the ablations' weights without their size; one accuracy is from its issue 5
_ABLATIONS = {
    "metaformer_id_s12": (0.9, None, None, 74.3),
    "metaformer_pppa_s12_224": (0.95, None, None, None),
    "metaformer_ppaa_s12_224": (0.95, None, None, None),
    "metaformer_pppf_s12_224": (0.9, None, None, None),
    "metaformer_ppff_s12_224": (0.95, None, None, None),
}


def _release(arch: str, figures: tuple[float | None, ...], on_timm: bool) -> Release:
    crop_pct, params_m, gmacs, top1 = figures
    return Release(
        url=_URL.format(arch),
        hf_hub_id=f"timm/{arch}.sail_in1k" if on_timm else "",
        licence=_LICENCE,
        crop_pct=crop_pct,
        top1=top1,
        params_m=params_m,
        gmacs=gmacs,
        macs_rule="matmul+norm",
    )


_RELEASES = {f"{arch}.sail_in1k": _release(arch, row, on_timm=True) for arch, row in _POOLFORMERS.items()}
_RELEASES |= {f"{arch}.sail_in1k": _release(arch, row, on_timm=False) for arch, row in _ABLATIONS.items()}
register_releases(_RELEASES)

_BLOCK = [
    ("norm1.{p:weight|bias}", "token.norm.{p}"),
    ("norm2.{p:weight|bias}", "channel.norm.{p}"),
    ("layer_scale_1", "token.layer_scale"),
    ("layer_scale_2", "channel.layer_scale"),
    ("mlp.{l:fc1|fc2}.weight", "channel.op.{l}.weight", "pointwise"),
    ("mlp.{l:fc1|fc2}.bias", "channel.op.{l}.bias"),
    # mixers of the ablations
    ("token_mixer.qkv.weight", "token.op.qkv.weight"),
    ("token_mixer.proj.{p:weight|bias}", "token.op.proj.{p}"),
    ("token_mixer.fc.weight", "token.op.fc.weight"),
]


def _body(stages: tuple[int, ...] = (0, 2, 4, 6), downsamplings: tuple[int, ...] = (1, 3, 5)) -> list[Rule]:
    """Stem, downsamplings and blocks, whose numbers in ``network`` are given."""
    rules = under("patch_embed.proj.", "stem.conv.", [("{p:weight|bias}", "{p}")])
    for stage, number in enumerate(downsamplings, start=1):
        rules += under(f"network.{number}.proj.", f"stages.{stage}.downsample.conv.", [("{p:weight|bias}", "{p}")])
    for stage, number in enumerate(stages):
        rules += under(f"network.{number}.{{i}}.", f"stages.{stage}.blocks.{{i}}.", _BLOCK)
    return rules


def _position(number: int, stage: int) -> list[Rule]:
    return [Rule(f"network.{number}.pos_embed", f"stages.{stage}.pos_embed", "channels_last")]


_NORM = [("norm.{p:weight|bias}", "head.norm.{p}")]
_HEAD = [*_NORM, ("head.{p:weight|bias}", "head.fc.{p}")]
# the dense-prediction form, whose norms have the numbers of the stages
_DENSE = [*under("", "body.", _body()), ("norm{2s}.{p:weight|bias}", "norms.{s}.{p}")]

_MARK = "network.0.{i}.mlp.fc1.weight"
_DENSE_MARK = "norm{2s}.weight"

_HF_BLOCK = [
    ("before_norm.{p:weight|bias}", "token.norm.{p}"),
    ("after_norm.{p:weight|bias}", "channel.norm.{p}"),
    ("layer_scale_1", "token.layer_scale"),
    ("layer_scale_2", "channel.layer_scale"),
    ("output.conv1.weight", "channel.op.fc1.weight", "pointwise"),
    ("output.conv1.bias", "channel.op.fc1.bias"),
    ("output.conv2.weight", "channel.op.fc2.weight", "pointwise"),
    ("output.conv2.bias", "channel.op.fc2.bias"),
]
_HF = [
    ("patch_embeddings.0.projection.{p:weight|bias}", "stem.conv.{p}"),
    ("patch_embeddings.{s}.projection.{p:weight|bias}", "stages.{s}.downsample.conv.{p}"),
    *under("block.{s}.{i}.", "stages.{s}.blocks.{i}.", _HF_BLOCK),
]

_DETECTOR = "neck|rpn_head|roi_head|bbox_head|mask_head|decode_head|auxiliary_head"

LAYOUTS = [
    Layout("sail", "sail-sg/poolformer, classification", (_MARK,), [*_body(), *_HEAD]),
    Layout(
        "sail",
        "sail-sg/poolformer, position embedding before stage 4 (pppa)",
        ("network.6.pos_embed",),
        [*_body(stages=(0, 2, 4, 7)), *_position(6, 3), *_HEAD],
    ),
    Layout(
        "sail",
        "sail-sg/poolformer, position embedding before stage 3 (ppaa)",
        ("network.4.pos_embed",),
        [*_body(stages=(0, 2, 5, 7), downsamplings=(1, 3, 6)), *_position(4, 2), *_HEAD],
    ),
    Layout("sail", "sail-sg/poolformer, dense prediction", (_MARK, _DENSE_MARK), _DENSE),
    Layout("sail", "sail-sg/poolformer, one block", ("mlp.fc1.weight", "layer_scale_1"), _BLOCK),
    Layout(
        "huggingface",
        "transformers PoolFormerForImageClassification",
        ("poolformer.encoder.block.{s}.{i}.before_norm.weight",),
        [*under("poolformer.encoder.", "", _HF), *_NORM, ("classifier.{p:weight|bias}", "head.fc.{p}")],
    ),
    Layout(
        "mmpretrain",
        "OpenMMLab, classification",
        (f"backbone.{_MARK}", "backbone.norm6.weight"),
        [
            *under("backbone.", "", _body()),
            ("backbone.norm6.{p:weight|bias}", "head.norm.{p}"),
            ("head.fc.{p:weight|bias}", "head.fc.{p}"),
        ],
    ),
    Layout(
        "mmdetection",
        "OpenMMLab, the backbone of a detector or segmenter",
        (f"backbone.{_MARK}", "backbone.norm2.weight"),
        [
            *under("backbone.", "", _DENSE),
            (f"{{part:{_DETECTOR}}}.{{rest:*}}", None, "not part of the backbone"),
        ],
    ),
    Layout(
        "classifier",
        "ImageNet weights for dense prediction",
        ("stages.0.blocks.0.channel.op.fc1.weight",),
        [
            ("stem.{rest:*}", "body.stem.{rest}"),
            ("stages.{rest:*}", "body.stages.{rest}"),
            ("head.{rest:*}", None, "dense prediction has no classifier"),
        ],
        fresh=[("norms.{s}.{p:weight|bias}", "ImageNet weights have no norms for dense prediction")],
        bridge=True,
    ),
]
register_layouts(LAYOUTS)
