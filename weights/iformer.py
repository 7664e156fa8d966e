"""Releases and key layout of iFormer (sail-sg/iFormer at 725d8e7, arXiv:2205.12956).

The code is under Apache-2.0; no licence is stated for the weights. The files for 384 pixels hold position grids for 224.
"""

from __future__ import annotations

from ..models._registry import Release, register_releases
from ._rules import Layout, register_layouts, under

_URL = "https://huggingface.co/sail/dl2/resolve/main/iformer/{}.pth"

# architecture: published parameters (M), multiply-adds (G), ImageNet-1k top-1
_PUBLISHED = {
    "iformer_small": (20, 4.8, 83.4),
    "iformer_base": (48, 9.4, 84.6),
    "iformer_large": (87, 14.0, 84.8),
    "iformer_small_384": (20, 16.1, 84.6),
    "iformer_base_384": (48, 30.5, 85.7),
    "iformer_large_384": (87, 45.3, 85.8),
}


def _release(arch: str) -> Release:
    params_m, gmacs, top1 = _PUBLISHED[arch]
    large = arch.endswith("_384")
    return Release(
        url=_URL.format(arch),
        licence="not stated (code: apache-2.0)",
        input_size=(3, 384, 384) if large else (3, 224, 224),
        crop_pct=1.0 if large else 0.9,
        top1=top1,
        params_m=params_m,
        gmacs=gmacs,
        macs_rule="matmul+norm",
        note="fine-tuned from 224 pixels, whose position grids it keeps" if large else "",
    )


register_releases({f"{arch}.sail_in1k": _release(arch) for arch in _PUBLISHED})

_NORM = "{n:weight|bias|running_mean|running_var|num_batches_tracked}"
_MIXER = [
    ("high_mixer.conv1.weight", "conv_fc.weight", "pointwise"),
    ("high_mixer.proj1.weight", "conv.weight"),
    ("high_mixer.proj2.weight", "pool_fc.weight", "pointwise"),
    ("high_mixer.proj2.bias", "pool_fc.bias"),
    ("low_mixer.qkv.{p:weight|bias}", "attention.qkv.{p}"),
    ("conv_fuse.weight", "fuse.conv.weight"),
    ("proj.weight", "proj.weight", "pointwise"),
    ("proj.bias", "proj.bias"),
]
_BLOCK = [
    ("norm1.{p:weight|bias}", "token.norm.{p}"),
    *under("attn.", "token.op.", _MIXER),
    ("layer_scale_1", "token.layer_scale"),
    ("norm2.{p:weight|bias}", "channel.norm.{p}"),
    ("mlp.{l:fc1|fc2}.{p:weight|bias}", "channel.op.{l}.{p}"),
    ("layer_scale_2", "channel.layer_scale"),
]

register_layouts(
    [
        Layout(
            "iformer",
            "sail-sg/iFormer",
            ("patch_embed.proj1.weight", "blocks{s+1}.{i}.attn.conv_fuse.weight"),
            [
                *(
                    (f"patch_embed.{theirs}{k}.{names}", f"stem.{ours}{k}.{names}")
                    for k in (1, 2)
                    for theirs, ours, names in (("proj", "conv", "{p:weight|bias}"), ("norm", "norm", _NORM))
                ),
                ("patch_embed{s+1}.proj.{p:weight|bias}", "stages.{s}.downsample.conv.{p}"),
                (f"patch_embed{{s+1}}.norm.{_NORM}", "stages.{s}.downsample.norm.{n}"),
                ("pos_embed{s+1}", "stages.{s}.downsample.pos_embed"),
                *under("blocks{s+1}.{i}.", "stages.{s}.blocks.{i}.", _BLOCK),
                ("norm.{p:weight|bias}", "head.norm.{p}"),
                ("head.{p:weight|bias}", "head.fc.{p}"),
            ],
        ),
        Layout("iformer", "one mixer of sail-sg/iFormer", ("high_mixer.conv1.weight",), _MIXER),
    ]
)
