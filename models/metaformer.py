"""MetaFormer: the hierarchical backbone of stem, four stages of blocks, and head.

Papers: arXiv:2111.11418 (MetaFormer is actually what you need for vision), arXiv:2210.13452 (MetaFormer baselines for
vision).

    x: (B, in_chans, H, W) -> stem -> stages, each but the first entered by a downsampling -> head -> (B, classes)

With the default stem and downsampling the maps have strides 4, 8, 16, 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.layers import calculate_drop_path_rates
from timm.models._manipulate import checkpoint_seq
from torch import Tensor

from ..mixers import CHANNEL_MIXERS, TOKEN_MIXERS
from ..mixers._layers import make_norm, resample
from ..mixers._registry import specs_per_block
from ._averaging import WeightedAverages
from ._hierarchical import HierarchicalBackbone, stage_groups
from ._image import ClassifierHead, init_linear, init_linear_and_conv
from ._slicing import run_sliced
from .block import MetaFormerBlock


class Downsampling(nn.Module):
    """Overlapping convolution with a norm before or after it: ``(B, C, H, W) -> (B, C', H', W')``.

    Args:
        norm: see `make_norm`; None for none.
        norm_first: norm before the convolution rather than after it.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel: int,
        stride: int,
        padding: int,
        *,
        norm: str | None,
        norm_eps: float,
        norm_first: bool,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm_first = norm_first
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, padding, **dd)
        self.norm = make_norm(norm, in_chans if norm_first else out_chans, eps=norm_eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self.norm_first:
            x = self.norm(x)
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()  # (B, H', W', C')
        if not self.norm_first:
            x = self.norm(x)
        return x.permute(0, 3, 1, 2)


class MetaFormerStage(nn.Module):
    """Downsampling, optional position embedding, blocks: ``(B, C, H, W) -> (B, C', H', W')``.

    With ``averages`` the branches of all blocks are one chain, see `WeightedAverages`.
    """

    def __init__(
        self,
        downsample: nn.Module,
        pos_embed: nn.Parameter | None,
        blocks: Sequence[nn.Module],
        hidden: int,
        averages: WeightedAverages | None = None,
    ):
        super().__init__()
        self.downsample = downsample
        self.pos_embed = pos_embed  # (1, H', W', C') or None
        self.blocks = nn.Sequential(*blocks)
        self.averages = averages
        self.hidden = hidden
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)  # (B, H', W', C')
        if self.pos_embed is not None:
            x = x + self.pos_embed
        if torch.jit.is_scripting():
            x = self.blocks(x)
        elif self.averages is not None:
            x = self.averages(x, self.blocks, recompute=self.grad_checkpointing)
        elif self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)
        else:
            x = run_sliced(self.blocks, x, self.hidden)
        return x.permute(0, 3, 1, 2)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize the position embedding and every mixer whose parameters depend on the grid."""
        if self.pos_embed is not None:
            embed = resample(self.pos_embed.data.permute(0, 3, 1, 2), grid_size, "cubic").permute(0, 2, 3, 1)
            self.pos_embed = nn.Parameter(embed.contiguous(), requires_grad=self.pos_embed.requires_grad)
        for block in self.blocks:
            block.set_grid_size(grid_size)


class MetaFormer(HierarchicalBackbone):
    """Hierarchical MetaFormer with any registered mixers.

    Args:
        in_chans, num_classes, global_pool, img_size, drop_rate, drop_path_rate: as in timm; ``drop_rate`` acts in the
            head, the drop path grows linearly over the blocks to ``drop_path_rate``.
        depths, dims: blocks and channels of each stage.
        token_mixer, channel_mixer: a name, ``(name, {options})``, or a list with one of these (or a list of one per
            block) for every stage.
        norm, norm_eps: norm of the blocks, see `make_norm`.
        layer_scale, res_scale: initial value of the scales, None for none; one value or one per stage.
        pos_embed: stages that add a learned position embedding on entry.
        stem_kernel, stem_stride, stem_padding: first convolution; small images want (3, 1, 1) or (3, 2, 1).
        stem_norm, down_norm: "none", "pre" or "post": a channel norm before or after the convolution.
        down_norm_kind, down_norm_eps: that norm.
        down_kernel, down_padding: of the convolutions between stages, whose stride is 2.
        downsampling: makes the entry of a stage but the first, from the arguments of `Downsampling`.
        weighted_average: give every branch a learned combination of all results of its stage so far, see
            `WeightedAverages`.
        block: makes a block that keeps the shape of a channels-last map and has ``set_grid_size``, from the arguments
            of `MetaFormerBlock`; for ``weighted_average`` it has ``branches`` and takes a ``chain`` too.
        head: "linear" or "mlp".
        head_norm, head_norm_eps, head_norm_first: norm of the head, before the pooling or after it.
        init_convs: draw convolutions from the truncated normal too, rather than leave torch's default.

    Shapes: images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``. Any size the strides leave a position of,
    unless a mixer or position embedding depends on the grid; then the grid of ``img_size``, see `set_input_size`.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | Sequence[int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        token_mixer: Any = "pooling",
        channel_mixer: Any = "mlp",
        norm: str = "group",
        norm_eps: float = 1e-5,
        layer_scale: float | Sequence[float | None] | None = None,
        res_scale: float | Sequence[float | None] | None = None,
        pos_embed: Sequence[int] = (),
        stem_kernel: int = 7,
        stem_stride: int = 4,
        stem_padding: int = 2,
        stem_norm: str = "none",
        down_norm: str = "none",
        down_norm_kind: str = "layer_nobias",
        down_norm_eps: float = 1e-6,
        down_kernel: int = 3,
        down_padding: int = 1,
        downsampling: Callable[..., nn.Module] = Downsampling,
        weighted_average: bool = False,
        block: Callable[..., nn.Module] = MetaFormerBlock,
        head: str = "linear",
        head_norm: str = "layer",
        head_norm_eps: float = 1e-6,
        head_norm_first: bool = False,
        init_convs: bool = False,
        device=None,
        dtype=None,
    ):
        stages = len(depths)
        if stages == 0 or len(dims) != stages:
            raise ValueError(f"depths and dims must have one entry per stage, got {depths!r} and {dims!r}")
        if any(stage not in range(stages) for stage in pos_embed):
            raise ValueError(f"pos_embed must name stages 0 to {stages - 1}, got {pos_embed!r}")
        token_specs = specs_per_block(token_mixer, depths, "token_mixer")
        channel_specs = specs_per_block(channel_mixer, depths, "channel_mixer")
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=dims[-1], img_size=img_size)
        dd = {"device": device, "dtype": dtype}

        self._strides = ((stem_kernel, stem_stride, stem_padding), *[(down_kernel, 2, down_padding)] * (stages - 1))
        grids = self.grids(self.img_size)
        if min(grids[-1]) < 1:
            raise ValueError(f"img_size={self.img_size} is too small: sides must be at least {self.smallest_side}")

        def down(i: int) -> nn.Module:
            placement = {"none": None, "pre": down_norm_kind, "post": down_norm_kind}
            entry, name = (stem_norm, "stem_norm") if i == 0 else (down_norm, "down_norm")
            if entry not in placement:
                raise ValueError(f"{name} must be 'none', 'pre' or 'post', not {entry!r}")
            norm_args = {"norm": placement[entry], "norm_eps": down_norm_eps, "norm_first": entry == "pre"}
            part, width = (Downsampling, in_chans) if i == 0 else (downsampling, dims[i - 1])
            return part(width, dims[i], *self._strides[i], **norm_args, **dd)

        self.stem = down(0)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        layer_scales, res_scales = _per_stage(layer_scale, stages), _per_stage(res_scale, stages)

        built = []
        for i in range(stages):
            common = {"norm": norm, "norm_eps": norm_eps, "layer_scale": layer_scales[i], "res_scale": res_scales[i]}
            blocks = [
                block(
                    dims[i],
                    token_mixer=token_specs[i][j],
                    channel_mixer=channel_specs[i][j],
                    grid_size=grids[i],
                    drop_path=drop_paths[i][j],
                    **common,
                    **dd,
                )
                for j in range(depths[i])
            ]
            embed = nn.Parameter(torch.zeros(1, *grids[i], dims[i], **dd)) if i in pos_embed else None
            kinds = [kind for made in blocks for kind, _ in made.branches] if weighted_average else None
            averages = None if kinds is None else WeightedAverages(kinds, **dd)
            entry = down(i) if i > 0 else nn.Identity()
            built.append(MetaFormerStage(entry, embed, blocks, hidden=4 * dims[i], averages=averages))
            self.feature_info.append({"num_chs": dims[i], "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*built)
        # stages whose parameters depend on the grid, and so bind the input size
        self.bound = {
            i: grids[i]
            for i in range(stages)
            if i in pos_embed
            or any(map(TOKEN_MIXERS.needs_grid, token_specs[i]))
            or any(map(CHANNEL_MIXERS.needs_grid, channel_specs[i]))
        }
        self.apply(init_linear_and_conv if init_convs else init_linear)
        self.head = ClassifierHead(
            dims[-1],
            num_classes,
            norm=head_norm,
            norm_eps=head_norm_eps,
            norm_first=head_norm_first,
            kind=head,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    @property
    def smallest_side(self) -> int:
        """Smallest side in pixels that leaves a position at every stage."""
        side = 1
        for kernel, stride, padding in reversed(self._strides):
            side = max(1, (side - 1) * stride + kernel - 2 * padding)
        return side

    def grids(self, img_size: Sequence[int]) -> list[tuple[int, int]]:
        """(H, W) of every stage's map for images of ``img_size`` pixels."""
        grids, sides = [], tuple(img_size)
        for kernel, stride, padding in self._strides:
            sides = tuple((side + 2 * padding - kernel) // stride + 1 for side in sides)
            grids.append(sides)
        return grids

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        return stage_groups(coarse, "downsample|pos_embed|averages")


def _per_stage(value: Any, stages: int) -> list[float | None]:
    """One value for every stage from one for all or a sequence."""
    if isinstance(value, Sequence):
        if len(value) != stages:
            raise ValueError(f"expected one value per stage ({stages}), got {value!r}")
        return list(value)
    return [value] * stages
