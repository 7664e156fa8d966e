"""SVT: scattering in the first stages, attention in the later ones, a class token in the end.

Paper: arXiv:2311.01310 (Scattering Vision Transformer). Checked against badripatro/svt at fcbc9b3.

    x <- x + mixer(LN(x));  x <- x + mlp(LN(x))        mlp with a depthwise convolution inside
    c <- mean x;  c <- c + attend(c; LN([c, x]));  c <- c + mlp(LN(c))
    logits = head(LN c) + 0.5 max over positions of aux(LN x)

``svt_s``, ``svt_b`` and ``svt_l`` are what the authors' code builds: scattering of form "channel" in the first stage.
The published figures belong to ``svt_*_paper``: form "channel_token" in the first two stages. The authors released no
weights, and their repository has no licence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ConvNormAct, calculate_drop_path_rates
from torch import Tensor

from ..mixers import CHANNEL_MIXERS, TOKEN_MIXERS
from ..mixers._channel_mlp import ChannelMlp
from ..mixers._registry import specs_per_block
from ._hierarchical import HierarchicalBackbone, stage_groups
from ._image import ImageHead, check_image, init_linear
from ._registry import register_models
from .block import MetaFormerBlock
from .metaformer import MetaFormerStage


def init_svt(module: nn.Module) -> None:
    """`init_linear`, and convolutions from N(0, 2 / fan_out)."""
    init_linear(module)
    if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class SVTStem(nn.Module):
    """Three convolutions with batch norm and ReLU, and one that embeds: ``(B, in_chans, H, W) -> (B, C, H/4, W/4)``.

    Sides are divided by 2 twice and rounded up.
    """

    def __init__(self, in_chans: int, width: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.convs = nn.Sequential(
            ConvNormAct(in_chans, width, 7, stride=2, **dd),
            ConvNormAct(width, width, 3, **dd),
            ConvNormAct(width, width, 3, **dd),
        )
        self.proj = nn.Conv2d(width, dim, 3, 2, 1, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(self.convs(x.contiguous(memory_format=torch.channels_last)))
        return self.norm(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


class SVTDownsampling(nn.Module):
    """Norm, convolution of stride 2, norm: ``(B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2))``."""

    def __init__(self, in_chans: int, out_chans: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.last_norm = nn.LayerNorm(in_chans, eps=1e-6, **dd)
        self.conv = nn.Conv2d(in_chans, out_chans, 3, 2, 1, **dd)
        self.norm = nn.LayerNorm(out_chans, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.conv(x).permute(0, 2, 3, 1).contiguous()  # (B, H', W', C')
        return self.norm(x).permute(0, 3, 1, 2)


class ClassAttention(nn.Module):
    """Attention of the first token to all: ``(B, N, C) -> (B, 1, C)``."""

    def __init__(self, dim: int, head_dim: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.head_dim = head_dim
        self.num_heads = max(1, dim // head_dim)
        inner = self.num_heads * head_dim
        self.q = nn.Linear(dim, inner, **dd)
        self.kv = nn.Linear(dim, 2 * inner, **dd)
        self.proj = nn.Linear(inner, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        G, D = self.num_heads, self.head_dim
        q = self.q(x[:, :1]).reshape(B, 1, G, D).transpose(1, 2)  # (B, G, 1, D)
        k, v = self.kv(x).reshape(B, N, 2, G, D).permute(2, 0, 3, 1, 4).unbind(0)  # 2 x (B, G, N, D)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, 1, G * D))


class ClassBlock(nn.Module):
    """A class token learns from all tokens, which stay as they are: ``(B, 1, C), (B, N, C) -> (B, 1, C)``."""

    def __init__(self, dim: int, head_dim: int, ratio: float, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = ClassAttention(dim, head_dim, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ChannelMlp(dim, rank=1, ratio=ratio, **dd)

    def forward(self, token: Tensor, tokens: Tensor) -> Tensor:
        token = token + self.attn(self.norm1(torch.cat([token, tokens], 1)))
        return token + self.mlp(self.norm2(token))


class TokenLabelClassifier(nn.Module):
    """Logits of the class token, and half of the largest ones of all positions: ``(B, C), (B, N, C) -> (B, classes)``.

    Args:
        token_label: whether positions are classified too; without, the class token alone counts.
    """

    def __init__(self, dim: int, num_classes: int, token_label: bool, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cls = nn.Linear(dim, num_classes, **dd)
        self.aux = nn.Linear(dim, num_classes, **dd) if token_label else None

    @property
    def class_layers(self) -> tuple[str, ...]:
        """Layers with one row a class."""
        return ("cls",) if self.aux is None else ("cls", "aux")

    def forward(self, token: Tensor, tokens: Tensor) -> Tensor:
        logits = self.cls(token)
        return logits if self.aux is None else logits + 0.5 * self.aux(tokens).amax(1)


class ClassTokenHead(ImageHead):
    """Class token, norm and classifier over the last map: ``(B, C, H, W) -> (B, classes)``.

    Args:
        dim, num_classes: channels, classes; 0 classes leave the class token.
        head_dim, ratio: heads and hidden width of the class block.
        token_label: classify positions too, see `TokenLabelClassifier`.
        global_pool: how the class token begins; "" keeps the normalised map.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        head_dim: int = 32,
        ratio: float = 4.0,
        token_label: bool = True,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, global_pool)
        dd = {"device": device, "dtype": dtype}
        self.token_label = token_label
        self.class_block = ClassBlock(dim, head_dim, ratio, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, **dd)

    def classifier(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        """Of the class token and, with ``token_label``, of positions."""
        dd = {"device": device, "dtype": dtype}
        return TokenLabelClassifier(self.dim, num_classes, self.token_label, **dd).apply(init_linear)

    def remove_norm(self) -> None:
        """Leave maps as they are: neither the norm nor the class token is learned any more."""
        self.norm = nn.Identity()
        self.class_block = None

    def tokens(self, x: Tensor) -> Tensor:
        """Class token and positions after the norm, ``(B, 1 + H W, C)``."""
        positions = x.flatten(2).transpose(1, 2)  # (B, N, C)
        token = self.global_pool(x).flatten(1).unsqueeze(1)  # (B, 1, C)
        if self.class_block is not None:
            token = self.class_block(token, positions)
        return self.norm(torch.cat([token, positions], 1))

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool.is_identity():
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        tokens = self.tokens(x)
        token, positions = self.drop(tokens[:, 0]), tokens[:, 1:]
        if pre_logits or isinstance(self.fc, nn.Identity):
            return token
        return self.fc(token, self.drop(positions))


class SVT(HierarchicalBackbone):
    """Four stages of blocks with any registered mixers, and a class token.

    Args:
        in_chans, num_classes, img_size, drop_rate, drop_path_rate: as in timm; ``drop_rate`` acts in the head.
        global_pool: how the class token begins, as its authors do by the mean.
        stem_dim: width of the stem's convolutions.
        depths, dims: blocks and channels of each stage.
        token_mixer, channel_mixer: a name, ``(name, {options})``, or a list with one of these (or a list of one per
            block) for every stage.
        head_dim: head width of the class token's attention.
        token_label: classify positions too, which the authors train with dense labels.

    Shapes: images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``, in training too; `forward_token_labels` gives
    what a loss on dense labels needs.
    """

    # fills one position of the first stage
    smallest_side = 4

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | Sequence[int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        stem_dim: int = 32,
        depths: Sequence[int] = (3, 4, 6, 3),
        dims: Sequence[int] = (64, 128, 320, 448),
        token_mixer: Any = "attention",
        channel_mixer: Any = "conv_mlp",
        head_dim: int = 32,
        token_label: bool = True,
        device=None,
        dtype=None,
    ):
        stages = len(depths)
        if stages == 0 or len(dims) != stages:
            raise ValueError(f"depths and dims must have one entry per stage, got {depths!r} and {dims!r}")
        token_specs = specs_per_block(token_mixer, depths, "token_mixer")
        channel_specs = specs_per_block(channel_mixer, depths, "channel_mixer")
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=dims[-1], img_size=img_size)
        self._stages = stages
        self.check_side(self.img_size, "img_size")
        dd = {"device": device, "dtype": dtype}
        self.stem = SVTStem(in_chans, stem_dim, dims[0], **dd)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        grids, built = self.grids(self.img_size), []
        for i in range(stages):
            blocks = [
                MetaFormerBlock(
                    dims[i], token_mixer=token, channel_mixer=channel, grid_size=grids[i], drop_path=rate, **dd
                )
                for token, channel, rate in zip(token_specs[i], channel_specs[i], drop_paths[i], strict=True)
            ]
            downsample = SVTDownsampling(dims[i - 1], dims[i], **dd) if i else nn.Identity()
            built.append(MetaFormerStage(downsample, None, blocks, hidden=8 * dims[i]))
            self.feature_info.append({"num_chs": dims[i], "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*built)
        # stages whose parameters depend on the grid
        self.bound = {
            i: grids[i]
            for i in range(stages)
            if any(map(TOKEN_MIXERS.needs_grid, token_specs[i]))
            or any(map(CHANNEL_MIXERS.needs_grid, channel_specs[i]))
        }
        options = {"head_dim": head_dim, "token_label": token_label, "global_pool": global_pool, "drop_rate": drop_rate}
        self.apply(init_svt)
        self.head = ClassTokenHead(dims[-1], num_classes, **options, **dd)
        self.head.class_block.apply(init_svt)

    def grids(self, img_size: Sequence[int]) -> list[tuple[int, int]]:
        """(H, W) of every stage's map for images of ``img_size`` pixels."""
        return [tuple(-(-side // (4 * 2**i)) for side in img_size) for i in range(self._stages)]

    def forward_token_labels(self, x: Tensor, box: tuple[int, int, int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the class token ``(B, classes)`` and of every position ``(B, H' W', classes)``, for training.

        Args:
            x: images.
            box: MixToken (arXiv:2104.10858): top, left, bottom and right in positions of the last map. After the stem
                the box of every image is replaced by that of its mirror in the batch, and the positions' logits are
                put back, so that they belong to the labels of their own image. Sides must be multiples of 32 pixels.
        """
        if self.head.fc.aux is None:
            raise ValueError("the model was created with token_label=False and does not classify positions")
        check_image(x, self)
        if box is not None and any(side % 32 for side in x.shape[2:]):
            raise ValueError(f"box needs images whose sides are multiples of 32, not {tuple(x.shape[2:])}")
        x = self.stem(x)
        if box is not None:
            x = _swap(x, [8 * edge for edge in box])
        x = self.stages(x)
        tokens = self.head.drop(self.head.tokens(x))
        dense = self.head.fc.aux(tokens[:, 1:])
        if box is not None:
            maps = dense.transpose(1, 2).unflatten(2, x.shape[2:])
            dense = _swap(maps, box).flatten(2).transpose(1, 2)
        return self.head.fc.cls(tokens[:, 0]), dense

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        return stage_groups(coarse, last="norm|class_block")


def _swap(x: Tensor, box: Sequence[int]) -> Tensor:
    """``(B, C, H, W)`` with the box of every sample replaced by that of its mirror in the batch."""
    top, left, bottom, right = box
    inside = torch.zeros(x.shape[2:], dtype=torch.bool, device=x.device)
    inside[top:bottom, left:right] = True
    return torch.where(inside, x.flip(0), x)


_ATTENTION = ("attention", {"qkv_bias": True, "proj_bias": True, "separate_q": True})
_TOKEN = ("scattering", {"form": "channel_token"})
_WIDE, _NARROW = ("conv_mlp", {"ratio": 8.0}), ("conv_mlp", {"ratio": 4.0})
_RELEASED = {
    "token_mixer": ("scattering", _ATTENTION, _ATTENTION, _ATTENTION),
    "channel_mixer": (_WIDE, _WIDE, _NARROW, _NARROW),
}
_PAPER = _RELEASED | {"token_mixer": (_TOKEN, _TOKEN, _ATTENTION, _ATTENTION)}
_SIZES = {
    "s": {"stem_dim": 32, "depths": (3, 4, 6, 3), "dims": (64, 128, 320, 448)},
    "b": {"stem_dim": 64, "depths": (3, 4, 12, 3), "dims": (64, 128, 320, 512)},
    "l": {"stem_dim": 64, "depths": (3, 6, 18, 3), "dims": (96, 192, 384, 512)},
}
_COMMON = {
    "classifier": "head.fc.cls",
    "first_conv": "stem.convs.0.conv",
    "crop_pct": 0.96,
    "fixed_input_size": True,
}

register_models(
    SVT,
    {f"svt_{size}": _RELEASED | row for size, row in _SIZES.items()},
    note="as the authors' code builds it, which is not the published model; no weights were released",
    **_COMMON,
)
register_models(
    SVT,
    {f"svt_{size}_paper": _PAPER | row for size, row in _SIZES.items()},
    note="the configuration that the published figures belong to",
    **_COMMON,
)
