"""iFormer, the Inception Transformer: convolution, max-pooling and attention side by side, four stages.

Paper: arXiv:2205.12956. Checked against sail-sg/iFormer at 725d8e7. timm's ``iformer_t`` to ``iformer_h`` are another
paper's models (ICLR 2025), and its ``inception_next_*`` a third's.

    stem:   BN(conv3x3/2) GELU BN(conv3x3/2);  between stages BN(conv3x3/2)
    stage:  x + P, then blocks of `mixzoo.mixers.inception` and MLP       P: position grid, (1, g, g, C)
    head:   norm, mean, classifier

Position grids are laid out for one image size and are resized bilinearly to the map in every forward pass, as the
authors do; the files for 384 pixels hold the grids of 224.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, register_notrace_function
from torch import Tensor

from ..mixers._conv_parts import normed
from ..mixers._registry import specs_per_block
from ._hierarchical import stage_groups
from ._image import ClassifierHead, ImageBackbone, init_linear_and_conv, to_size
from ._registry import register_models
from .block import MetaFormerBlock
from .metaformer import MetaFormerStage


class InceptionStem(nn.Module):
    """Two convolutions of stride 2 with batch norms: ``(B, in_chans, H, W) -> (B, C, H / 4, W / 4)``, rounded up."""

    folds = (("conv1", "norm1"), ("conv2", "norm2"))

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = normed(x.contiguous(memory_format=torch.channels_last), self.conv1, self.norm1, self.act)
        return self.norm2(self.conv2(x))


@register_notrace_function
def add_position(x: Tensor, grid: Tensor) -> Tensor:
    """``x (B, C, H, W)`` plus a position grid ``(1, g, g, C)``, resized bilinearly where the map has another size."""
    embed = grid.permute(0, 3, 1, 2)
    if tuple(x.shape[2:]) != tuple(embed.shape[2:]):
        embed = F.interpolate(embed, size=(x.shape[2], x.shape[3]), mode="bilinear", align_corners=False)
    return x + embed


class PositionedEntry(nn.Module):
    """What a stage begins with: convolution of stride 2 and batch norm, unless it is the first, and a position grid.

    Shapes: ``(B, C, H, W) -> (B, C', H / 2, W / 2)``, rounded up, or the same size at the first stage.
    """

    folds = (("conv", "norm"),)

    def __init__(self, in_chans: int | None, dim: int, grid: Sequence[int], *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Identity() if in_chans is None else nn.Conv2d(in_chans, dim, 3, 2, 1, **dd)
        self.norm = nn.Identity() if in_chans is None else nn.BatchNorm2d(dim, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, *grid, dim, **dd))
        nn.init.normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return add_position(self.norm(self.conv(x)), self.pos_embed)


class InceptionTransformer(ImageBackbone):
    """iFormer with any registered mixers.

    Args:
        in_chans, num_classes, global_pool, img_size, drop_rate, drop_path_rate: as in timm; ``drop_rate`` acts in the
            head, the drop path grows linearly over the blocks.
        pos_size: side in pixels, or (H, W), of the images that position grids are laid out for.
        depths, dims: blocks and channels of each stage.
        token_mixer, channel_mixer: a name, ``(name, {options})``, or a list with one of these (or a list of one per
            block) for every stage.
        layer_scale: initial value of the scales of each stage, None for none.
        norm_eps: of all layer norms.

    Shapes: images ``(B, in_chans, H, W)`` of any size to logits ``(B, num_classes)``.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | Sequence[int] = 224,
        pos_size: int | Sequence[int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 320, 384),
        token_mixer: Any = "inception",
        channel_mixer: Any = "mlp",
        layer_scale: Sequence[float | None] = (None, None, 1e-6, 1e-6),
        norm_eps: float = 1e-6,
        device=None,
        dtype=None,
    ):
        stages = len(depths)
        if stages == 0 or len(dims) != stages or len(layer_scale) != stages:
            raise ValueError(
                "depths, dims and layer_scale must have one entry per stage, "
                f"got {depths!r}, {dims!r} and {layer_scale!r}"
            )
        token_specs = specs_per_block(token_mixer, depths, "token_mixer")
        channel_specs = specs_per_block(channel_mixer, depths, "channel_mixer")
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=dims[-1], img_size=img_size)
        dd = {"device": device, "dtype": dtype}
        self.stem = InceptionStem(in_chans, dims[0], **dd)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        # grids of positions, and of the features, for mixers that depend on them
        positions, grids = self.grids(to_size(pos_size, "pos_size")), self.grids(self.img_size)
        built = []
        for i in range(stages):
            entry = PositionedEntry(dims[i - 1] if i else None, dims[i], positions[i], **dd)
            common = {"grid_size": grids[i], "norm": "layer", "norm_eps": norm_eps, "layer_scale": layer_scale[i]}
            blocks = [
                MetaFormerBlock(
                    dims[i], token_mixer=token, channel_mixer=channel, drop_path=drop_paths[i][j], **common, **dd
                )
                for j, (token, channel) in enumerate(zip(token_specs[i], channel_specs[i], strict=True))
            ]
            built.append(MetaFormerStage(entry, None, blocks, hidden=4 * dims[i]))
            self.feature_info.append({"num_chs": dims[i], "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*built)
        self.apply(init_linear_and_conv)
        self.head = ClassifierHead(
            dims[-1],
            num_classes,
            norm="layer",
            norm_eps=norm_eps,
            norm_first=True,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    def grids(self, img_size: Sequence[int]) -> list[tuple[int, int]]:
        """(H, W) of every stage's map for images of ``img_size`` pixels."""
        return [tuple(-(-side // (4 * 2**i)) for side in img_size) for i in range(4)]

    def check_input_size(self, img_size: Sequence[int]) -> None:
        """Any size of at least one pixel can be taken."""

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Record the size of images; a mixer whose parameters depend on the grid follows, position grids stay."""
        img_size = to_size(img_size)
        for stage, grid in zip(self.stages, self.grids(img_size), strict=False):
            stage.set_grid_size(grid)
        self.img_size = img_size

    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        return stage_groups(coarse)


def _heads(pool: int, *heads: tuple[int, int]) -> list[tuple[str, dict]]:
    """Mixers of a stage from pairs (heads of the low path, blocks)."""
    return [
        ("inception", {"low_heads": n, "head_dim": 32, "pool_size": pool}) for n, times in heads for _ in range(times)
    ]


_COMMON = {"pos_size": 224, "layer_scale": (None, None, 1e-6, 1e-6), "channel_mixer": "mlp"}
_SMALL = _COMMON | {
    "depths": (3, 3, 9, 3),
    "dims": (96, 192, 320, 384),
    "token_mixer": [_heads(2, (1, 3)), _heads(2, (3, 3)), _heads(1, (7, 4), (9, 5)), _heads(1, (11, 3))],
}
_BASE = _COMMON | {
    "depths": (4, 6, 14, 6),
    "dims": (96, 192, 384, 512),
    "token_mixer": [_heads(2, (1, 4)), _heads(2, (3, 6)), _heads(1, (8, 7), (10, 7)), _heads(1, (15, 6))],
}
_LARGE = _COMMON | {
    "depths": (4, 6, 18, 8),
    "dims": (96, 192, 448, 640),
    "token_mixer": [_heads(2, (1, 4)), _heads(2, (3, 6)), _heads(1, (10, 9), (12, 9)), _heads(1, (19, 8))],
}

_PARTS = {"first_conv": "stem.conv1"}
register_models(
    InceptionTransformer, {"iformer_small": _SMALL, "iformer_base": _BASE, "iformer_large": _LARGE}, **_PARTS
)
register_models(
    InceptionTransformer,
    {
        "iformer_small_384": _SMALL | {"img_size": 384},
        "iformer_base_384": _BASE | {"img_size": 384},
        "iformer_large_384": _LARGE | {"img_size": 384},
    },
    input_size=(3, 384, 384),
    crop_pct=1.0,
    **_PARTS,
)
