"""Releases and key layout of GFNet (raoyongming/GFNet at 2de48b6, arXiv:2107.00645).

The files are on Google Drive, which asks before it sends large files, with mirrors at Tsinghua Cloud. The repository is
under the MIT licence, which does not mention the weights. No weights for 384 pixels were released.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..models._registry import Release, register_releases
from ._rules import Layout, Transform, register_layouts, under

_MIRROR = "https://cloud.tsinghua.edu.cn/f/{}/?dl=1"

# architecture: file at the mirror, published parameters (M), multiply-adds (G), ImageNet-1k top-1
_FILES = {
    "gfnet_ti": ("3d0c1579aa524a0a99dd", 7, 1.3, 74.6),
    "gfnet_xs": ("e0ab5b1583954a1fa9b2", 16, 2.8, 78.6),
    "gfnet_s": ("e5561fa070c44d9399bf", 25, 4.5, 80.0),
    "gfnet_b": ("2fbf264597af4d72afb3", 43, 7.9, 80.7),
    "gfnet_h_ti": ("b22dd45eccbe462cbbfb", 15, 2.0, 80.1),
    "gfnet_h_s": ("5229cb4d1daf48e69675", 32, 4.5, 81.5),
    "gfnet_h_b": ("954c5af21e824ba6b40c", 54, 8.4, 82.9),
}

register_releases(
    {
        f"{arch}.gfnet_in1k": Release(
            url=_MIRROR.format(file),
            licence="mit",
            crop_pct=0.875,
            top1=top1,
            params_m=params_m,
            gmacs=gmacs,
            macs_rule="matmul+norm+transform",
            note="published multiply-adds were counted by hand for some variants and leave out the complex products",
        )
        for arch, (file, params_m, gmacs, top1) in _FILES.items()
    }
)


def _to_grid(tokens: Tensor) -> Tensor:
    """Position embedding ``(1, N, C)`` of a square grid as ``(1, H, W, C)``."""
    side = math.isqrt(tokens.shape[1])
    return tokens.unflatten(1, (side, side)) if side * side == tokens.shape[1] else tokens.unsqueeze(1)


_POSITION = Transform(_to_grid, lambda grid: grid.flatten(1, 2))

_BLOCK = [
    ("norm1.{p:weight|bias}", "branch.norm.{p}"),
    ("filter.complex_weight", "branch.op.token.complex_weight"),
    ("norm2.{p:weight|bias}", "branch.op.norm.{p}"),
    ("mlp.{l:fc1|fc2}.{p:weight|bias}", "branch.op.channel.{l}.{p}"),
    ("gamma", "branch.layer_scale"),
]
_HEAD = [("head.{p:weight|bias}", "head.fc.{p}")]

register_layouts(
    [
        Layout(
            "gfnet",
            "raoyongming/GFNet, isotropic",
            ("patch_embed.proj.weight", "blocks.{i}.filter.complex_weight"),
            [
                ("patch_embed.proj.{p:weight|bias}", "stem.conv.{p}"),
                ("pos_embed", "stages.0.pos_embed", _POSITION),
                *under("blocks.{i}.", "stages.{i}.blocks.0.", _BLOCK),
                ("norm.{p:weight|bias}", "norm.{p}"),
                *_HEAD,
            ],
        ),
        Layout(
            "gfnet",
            "raoyongming/GFNet, hierarchical",
            ("patch_embed.0.proj.weight", "blocks.{s}.{i}.filter.complex_weight"),
            [
                ("patch_embed.0.proj.{p:weight|bias}", "stem.conv.{p}"),
                ("patch_embed.{s}.proj.{p:weight|bias}", "stages.{s}.downsample.conv.{p}"),
                ("pos_embed", "stages.0.pos_embed", _POSITION),
                *under("blocks.{s}.{i}.", "stages.{s}.blocks.{i}.", _BLOCK),
                ("norm.{p:weight|bias}", "head.norm.{p}"),
                *_HEAD,
            ],
        ),
        Layout("gfnet", "raoyongming/GFNet, one block", ("filter.complex_weight", "mlp.fc1.weight"), _BLOCK),
    ]
)
