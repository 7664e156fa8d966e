"""Releases and key layouts of OverLoCK (LMMMEng/OverLoCK at 2c8ab3b, arXiv:2502.20087).

The code is under Apache-2.0; no licence is stated for the weights. Published parameters are those of the folded models
without auxiliary head; published multiply-adds fit neither form exactly.
"""

from __future__ import annotations

from ..models._registry import Release, register_releases
from ._rules import Layout, Transform, register_layouts, under

_URL = "https://github.com/LMMMEng/OverLoCK/releases/download/v1/{}.pth"

# size: published parameters (M), multiply-adds (G), ImageNet-1k top-1, crop
_PUBLISHED = {
    "xt": (16, 2.6, 82.7, 0.925),
    "t": (33, 5.5, 84.2, 0.95),
    "s": (56, 9.7, 84.8, 0.95),
    "b": (95, 16.7, 85.1, 0.975),
}


def _release(size: str, suffix: str) -> Release:
    params_m, gmacs, top1, crop_pct = _PUBLISHED[size]
    return Release(
        url=_URL.format(f"overlock_{size}_in1k_224{suffix}"),
        licence="not stated (code: apache-2.0)",
        crop_pct=crop_pct,
        top1=top1,
        params_m=params_m,
        gmacs=gmacs,
        macs_rule="matmul+norm",
        note="published parameters are those of the folded model without auxiliary head, multiply-adds lie between "
        "the two forms",
        aliases=(f"overlock_{size}_in1k_224{suffix}",),
    )


register_releases(
    {f"overlock_{size}{suffix}.in1k": _release(size, suffix) for size in _PUBLISHED for suffix in ("", "_reparam")}
)

_N = "{n:weight|bias|running_mean|running_var|num_batches_tracked}"
_P = "{p:weight|bias}"
# one number a channel, which the authors store as the kernel of a grouped 1x1 convolution, or as a map of one pixel
_KERNEL = Transform(lambda t: t.flatten(), lambda t: t[:, None, None, None])
_PIXEL = Transform(lambda t: t.flatten(), lambda t: t[None, :, None, None])


def _pointwise(theirs: str, ours: str, bias: bool = True) -> list[tuple]:
    weight = (f"{theirs}.weight", f"{ours}.weight", "pointwise")
    return [weight, (f"{theirs}.bias", f"{ours}.bias")] if bias else [weight]


def _linear_norm(theirs: str, ours: str, first: int = 0) -> list[tuple]:
    """Of a 1x1 convolution without bias and its batch norm, numbered from ``first``."""
    return [
        *_pointwise(f"{theirs}.{first}", f"{ours}.fc", bias=False),
        (f"{theirs}.{first + 1}.{_N}", f"{ours}.norm.{{n}}"),
    ]


def _conv_norm(theirs: str, ours: str) -> list[tuple]:
    return [(f"{theirs}.0.weight", f"{ours}.conv.weight"), (f"{theirs}.1.{_N}", f"{ours}.norm.{{n}}")]


def _scale(theirs: str, weight: str, bias: str) -> list[tuple]:
    return [(f"{theirs}.weight", weight, _KERNEL), (f"{theirs}.bias", bias)]


def _response_norm(theirs: str, ours: str) -> list[tuple]:
    return [(f"{theirs}.{k}", f"{ours}.{k}", _PIXEL) for k in ("gamma", "beta")]


_SIZES = ("3_1", "3_2", "3_3", "3_4", "3_5", "3_7", "5_1", "5_2", "7_1", "7_2", "9_1", "9_2")
_BRANCH = "{b:" + "|".join(f"k{size}" for size in _SIZES) + "}"
_DILATED = [
    (f"lk_origin.{_P}", "conv.{p}"),
    (f"origin_bn.{_N}", "norm.{n}"),
    (f"dil_conv_{_BRANCH}.weight", "branches.{b}.conv.weight"),
    (f"dil_bn_{_BRANCH}.{_N}", "branches.{b}.norm.{n}"),
]


def _local_mlp(theirs: str, first: int, ours: str) -> list[tuple]:
    """Of the layers fc1, GELU, depthwise convolution, response norm, fc2, numbered from ``first``."""
    return [
        *_pointwise(f"{theirs}.{first}", f"{ours}.fc1"),
        (f"{theirs}.{first + 2}.{_P}", f"{ours}.local.conv.{{p}}"),
        *_response_norm(f"{theirs}.{first + 3}", f"{ours}.norm"),
        *_pointwise(f"{theirs}.{first + 4}", f"{ours}.fc2"),
    ]


def _mixing(ours: str, output: str) -> list[tuple]:
    """Of `GatedContextMixing`; ``output`` is the authors' name of the projection behind the aggregation."""
    return [
        ("rpb1", f"{ours}kernels.bias.0.table"),
        ("rpb2", f"{ours}kernels.bias.1.table"),
        *_linear_norm("weight_query", f"{ours}kernels.query"),
        *_linear_norm("weight_key", f"{ours}kernels.key", 1),
        *_linear_norm("weight_value", f"{ours}kernels.value"),
        *_pointwise("weight_proj", f"{ours}kernels.kernel_proj"),
        *_linear_norm(output, f"{ours}fuse"),
        *under("lepe.0.", f"{ours}lepe.", _DILATED),
        (f"lepe.1.{_N}", f"{ours}lepe_norm.{{n}}"),
        *_pointwise("se_layer.proj.1", f"{ours}se.fc1"),
        *_pointwise("se_layer.proj.3", f"{ours}se.fc2"),
        *_linear_norm("gate", f"{ours}gate"),
        (f"proj.0.{_N}", f"{ours}norm.{{n}}"),
        *_pointwise("proj.1", f"{ours}proj"),
    ]


_AROUND = [
    (f"dwconv1.{_P}", "local1.conv.{p}"),
    (f"norm1.{_P}", "token.norm.{p}"),
    *_scale("ls1", "token.res_scale", "token.res_bias"),
    (f"dwconv2.{_P}", "local2.conv.{p}"),
    (f"norm2.{_P}", "channel.norm.{p}"),
    *_local_mlp("mlp", 0, "channel.op"),
    *_scale("ls2", "channel.res_scale", "channel.res_bias"),
]
_CONTMIX = [*_AROUND, *_mixing("token.op.mix.", "fusion_proj")]
_FOCUS = [
    *_AROUND,
    *_scale("x_scale", "context_scale.weight", "context_scale.bias"),
    *_scale("h_scale", "overview_scale.weight", "overview_scale.bias"),
    (f"fusion.0.{_P}", "token.op.fuse_conv.{p}"),
    (f"fusion.1.{_N}", "token.op.fuse_norm.{n}"),
    *_pointwise("fusion.3", "token.op.fuse_fc"),
    *_response_norm("fusion.4", "token.op.norm"),
    *_mixing("token.op.mix.", "dyconv_proj"),
]
_REP = [
    (f"dwconv.{_P}", "local.conv.{p}"),
    (f"proj.0.{_P}", "branch.norm.{p}"),
    *under("proj.1.", "branch.op.mix.conv.", _DILATED),
    (f"proj.2.{_N}", "branch.op.norm.{n}"),
    *_pointwise("proj.3.proj.1", "branch.op.se.fc1"),
    *_pointwise("proj.3.proj.3", "branch.op.se.fc2"),
    *_local_mlp("proj", 4, "branch.op.mlp"),
    *_scale("ls", "branch.res_scale", "branch.res_bias"),
]
# where each part of the authors' model is in ours
_MODEL = [
    ("patch_embed1.{3i}.weight", "stem.convs.{i}.conv.weight"),
    (f"patch_embed1.{{3i+1}}.{_N}", "stem.convs.{i}.norm.{n}"),
    *_conv_norm("patch_embed2", "stages.1.downsample"),
    *_conv_norm("patch_embed3", "stages.2.base.downsample"),
    *_conv_norm("patch_embed4", "stages.2.overview.downsample"),
    *under("blocks1.{i}.", "stages.0.blocks.{i}.", _REP),
    *under("blocks2.{i}.", "stages.1.blocks.{i}.", _REP),
    *under("blocks3.{i}.", "stages.2.base.blocks.{i}.", _REP),
    *under("blocks4.{i}.", "stages.2.overview.blocks.{i}.", _REP),
    *_pointwise("high_level_proj", "stages.2.context_proj"),
    *under("sub_blocks3.{i}.", "stages.2.focus.{i}.", _FOCUS),
    *_conv_norm("patch_embedx.x_proj", "stages.3.downsample"),
    *_conv_norm("patch_embedx.h_proj", "stages.3.context_down"),
    *under("sub_blocks4.{i}.", "stages.3.focus.{i}.", _FOCUS),
    *_linear_norm("head", "head.proj"),
    *_pointwise("head.4", "head.fc"),
    (f"aux_head.0.{_N}", "aux_head.norm.{n}"),
    *_pointwise("aux_head.2", "aux_head.fc"),
]

register_layouts(
    [
        Layout("overlock", "LMMMEng/OverLoCK", ("patch_embed1.0.weight", "sub_blocks3.{i}.weight_proj.weight"), _MODEL),
        Layout("overlock", "LMMMEng/OverLoCK, one focus block", ("weight_proj.weight", "dyconv_proj.0.weight"), _FOCUS),
        Layout(
            "overlock", "LMMMEng/OverLoCK, one ContMix block", ("weight_proj.weight", "weight_value.0.weight"), _CONTMIX
        ),
        Layout("overlock", "LMMMEng/OverLoCK, one RepConv block", ("proj.1.lk_origin.weight", "proj.4.weight"), _REP),
        Layout("overlock", "LMMMEng/OverLoCK, one large kernel", ("lk_origin.weight",), under("", "conv.", _DILATED)),
    ]
)
