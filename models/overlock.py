"""OverLoCK: a look at the whole image first, whose outcome then guides dynamic convolutions over the details.

Paper: arXiv:2502.20087. Checked against LMMMEng/OverLoCK at 2c8ab3b.

    base:      stem, stages 1 to 3 of `RepConvBlock` (strides 4, 8, 16)                x
    overview:  convolution of stride 2 and `RepConvBlock` at stride 32, projected      ctx0, also read by the aux head
    focus:     `FocusBlock` on x and ctx at stride 16, then at stride 32               [x, ctx], to the head

Both large kernels and the batch norms behind them fold to single convolutions, see `mixzoo.reparameterize`. The
aggregation needs no extension of torch, see `mixzoo.neighborhood_apply`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..mixers import TOKEN_MIXERS
from ..mixers._conv_parts import LinearNorm, normed
from ..mixers._layers import Linear
from ..mixers._registry import specs_per_block, split_spec
from ..mixers.contmix import RelativeBias
from ._image import ImageBackbone, ImageHead, check_image, init_linear, init_linear_and_conv, to_size
from ._overlock_blocks import ContMixBlock as ContMixBlock  # not in the network: the authors' block by itself
from ._overlock_blocks import FocusBlock, RepConvBlock
from ._registry import register_models
from .metaformer import MetaFormerStage


class ConvNorm(nn.Module):
    """3x3 convolution without bias and batch norm, and an activation if one is given.

    Shapes: ``(B, C, H, W) -> (B, C', H / stride, W / stride)``, rounded up.
    """

    folds = (("conv", "norm"),)

    def __init__(self, in_chans: int, out_chans: int, stride: int = 2, *, device=None, dtype=None):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 3, stride, 1, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_chans, device=device, dtype=dtype)

    def forward(self, x: Tensor, act: nn.Module | None = None) -> Tensor:
        return self.norm(self.conv(x)) if act is None else normed(x, self.conv, self.norm, act)


class OverLoCKStem(nn.Module):
    """Four convolutions, two of stride 2: ``(B, in_chans, H, W) -> (B, C, H / 4, W / 4)``, rounded up."""

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        widths = (in_chans, dim // 2, dim // 2, dim, dim)
        self.convs = nn.ModuleList(
            ConvNorm(*pair, stride, **dd) for *pair, stride in zip(widths, widths[1:], (2, 1, 2, 1), strict=False)
        )
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for conv in self.convs[:-1]:
            x = conv(x, self.act)
        return self.convs[-1](x)


def _run_focus(blocks: nn.ModuleList, x: Tensor, overview: Tensor, checkpointed: bool) -> Tensor:
    for block in blocks:
        x = checkpoint(block, x, overview, use_reentrant=False) if checkpointed else block(x, overview)
    return x


class OverviewStage(nn.Module):
    """Base blocks, the overview, and the focus on the base's map.

    Shapes: ``(B, C2, H, W)`` to a tuple of the map ``(B, C3 + Cc, H', W')``, the overview's context
    ``(B, Cc, H'', W'')``, and its map ``(B, C4, H'', W'')``.
    """

    def __init__(
        self, base: MetaFormerStage, overview: MetaFormerStage, context_proj: nn.Module, focus: Sequence[nn.Module]
    ):
        super().__init__()
        self.base = base
        self.overview = overview
        self.context_proj = context_proj
        self.focus = nn.ModuleList(focus)
        self.map = nn.Identity()  # where feature extractors find the map by itself

    @property
    def grad_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return self.base.grad_checkpointing

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        self.base.grad_checkpointing = self.overview.grad_checkpointing = enable

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.base(x)
        seen = self.overview(x)  # (B, C4, H'', W'')
        context = self.context_proj(seen.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        size = (x.shape[2], x.shape[3])
        spread = F.interpolate(context, size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        x = torch.cat([x.permute(0, 2, 3, 1), spread], -1)  # (B, H', W', C3 + Cc)
        x = _run_focus(self.focus, x, spread, self.grad_checkpointing)
        return self.map(x.permute(0, 3, 1, 2)), context, seen


class FocusStage(nn.Module):
    """The focus at stride 32, on what `OverviewStage` gives: the map ``(B, C4 + Cc, H, W)`` and the overview's map."""

    def __init__(
        self, widths: Sequence[int], downsample: nn.Module, context_down: nn.Module, focus: Sequence[nn.Module]
    ):
        super().__init__()
        self.widths = list(widths)
        self.downsample = downsample
        self.context_down = context_down
        self.focus = nn.ModuleList(focus)
        self.map = nn.Identity()
        self.grad_checkpointing = False

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, context0, seen = inputs
        x, context = x.split(self.widths, 1)
        x = torch.cat([self.downsample(x), self.context_down(context)], 1).permute(0, 2, 3, 1)
        x = _run_focus(self.focus, x, context0.permute(0, 2, 3, 1), self.grad_checkpointing)
        return self.map(x.permute(0, 3, 1, 2)), seen


class ProjectedHead(ImageHead):
    """Linear layer, batch norm and SiLU, pooling and classifier: ``(B, C, H, W) -> (B, classes)``.

    Args:
        dim: channels C. hidden: width after the linear layer.
        num_classes: 0 leaves the pooled map.
        global_pool: timm's pooling names that keep the channels; "" keeps the map.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_classes: int,
        *,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(hidden, global_pool)
        dd = {"device": device, "dtype": dtype}
        self.proj = LinearNorm(dim, hidden, **dd)
        self.act = nn.SiLU()
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, **dd)
        # the last norm of the map is the projection's, and so not one that a map of features can have by itself
        self.norm = nn.Identity()

    def classifier(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        """One linear layer."""
        return nn.Linear(self.dim, num_classes, device=device, dtype=dtype).apply(init_linear)

    def remove_norm(self) -> None:
        """Leave maps as they are."""
        self.proj, self.act = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.act(self.proj(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = self.global_pool(x)
        if self.global_pool.is_identity():
            return x if pre_logits else self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.drop(x.flatten(1))
        return x if pre_logits else self.fc(x)


class AuxiliaryHead(nn.Module):
    """Batch norm, mean and classifier of the overview's map: ``(B, C, H, W) -> (B, classes)``."""

    folds_ahead = (("norm", "fc"),)

    def __init__(self, dim: int, num_classes: int, *, device=None, dtype=None):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.fc = nn.Linear(dim, num_classes, device=device, dtype=dtype).apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x).mean((2, 3)))


class OverLoCK(ImageBackbone):
    """Base-Net, Overview-Net and Focus-Net.

    Args:
        in_chans, num_classes, global_pool, img_size, drop_rate, drop_path_rate: as in timm; ``drop_rate`` acts in the
            head, the drop path grows linearly over base, overview and focus blocks.
        depths: blocks of base stages 1, 2, 3 and of the overview. focus_depths: focus blocks at strides 16 and 32.
        dims: channels C1 to C4; the context has C4 // 4.
        token_mixer: of the base stages and the overview: a name, ``(name, {options})``, or a list with one of these
            (or a list of one per block) for each of the four.
        focus_kernels, focus_heads: large kernel and half the number of heads of the focus at both strides.
        mlp_ratio, focus_mlp_ratio: hidden widths over the channels.
        res_scale: initial value of the scales on the skips of base stages and overview, None for none.
        hidden: width of the head.
        aux_head: a second classifier on the overview, in training alone.
        deploy: have the folded form of large kernels, for weights that were folded.

    Shapes: images ``(B, in_chans, H, W)`` of any size to logits ``(B, num_classes)``. In training, with the auxiliary
    head, to ``(2, B, num_classes)``: ``main, aux = model(x)``, of which the authors' loss is CE(main) + 0.4 CE(aux).
    """

    # weight of the second logits in the loss
    aux_weight = 0.4
    optional_parts = ("aux_head",)

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | Sequence[int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (4, 4, 6, 2),
        focus_depths: Sequence[int] = (12, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        token_mixer: Any = "large_kernel_conv",
        focus_kernels: Sequence[int] = (13, 7),
        focus_heads: Sequence[int] = (4, 8),
        mlp_ratio: float = 4.0,
        focus_mlp_ratio: float = 3.0,
        res_scale: Sequence[float | None] = (None, None, 1.0, 1.0),
        hidden: int = 1024,
        aux_head: bool = True,
        deploy: bool = False,
        device=None,
        dtype=None,
    ):
        for name, value, length in (
            ("depths", depths, 4),
            ("dims", dims, 4),
            ("res_scale", res_scale, 4),
            ("focus_depths", focus_depths, 2),
            ("focus_kernels", focus_kernels, 2),
            ("focus_heads", focus_heads, 2),
        ):
            if len(value) != length:
                raise ValueError(f"{name} must have {length} entries, got {value!r}")
        specs = specs_per_block(token_mixer, depths, "token_mixer")
        context = dims[3] // 4
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=dims[3] + context, img_size=img_size)
        self.head_hidden_size = hidden
        dd = {"device": device, "dtype": dtype}
        total = sum(depths) + sum(focus_depths)
        rates = iter([drop_path_rate * i / max(1, total - 1) for i in range(total)])
        grids = [tuple(-(-side // (4 * 2**i)) for side in self.img_size) for i in range(4)]

        def base(i: int, downsample: nn.Module) -> MetaFormerStage:
            options = {"mlp_ratio": mlp_ratio, "res_scale": res_scale[i], "grid_size": grids[i], **dd}
            blocks = [
                RepConvBlock(dims[i], token_mixer=_with_deploy(spec, deploy), drop_path=next(rates), **options)
                for spec in specs[i]
            ]
            return MetaFormerStage(downsample, None, blocks, hidden=int(mlp_ratio * dims[i]))

        def focus(i: int, first: bool) -> list[nn.Module]:
            options = {"kernel_size": focus_kernels[i], "num_heads": focus_heads[i], "mlp_ratio": focus_mlp_ratio, **dd}
            return [
                FocusBlock(
                    dims[2 + i], context, first=first and j == 0, drop_path=next(rates), deploy=deploy, **options
                )
                for j in range(focus_depths[i])
            ]

        self.stem = OverLoCKStem(in_chans, dims[0], **dd)
        first, second, third, overview = (
            base(i, ConvNorm(dims[i - 1], dims[i], **dd) if i else nn.Identity()) for i in range(4)
        )
        middle = OverviewStage(third, overview, Linear(dims[3], context, **dd), focus(0, True))
        downs = ConvNorm(dims[2], dims[3], **dd), ConvNorm(context, context, **dd)
        last = FocusStage((dims[2], context), *downs, focus(1, False))
        self.stages = nn.Sequential(first, second, middle, last)
        widths = (dims[0], dims[1], dims[2] + context, dims[3] + context)
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": f"stages.{i}" + (".map" if i > 1 else "")}
            for i, width in enumerate(widths)
        ]
        self._aux_dim = dims[3] if aux_head else None
        self.apply(_init)
        options = {"global_pool": global_pool, "drop_rate": drop_rate}
        self.head = ProjectedHead(self.num_features, hidden, num_classes, **options, **dd)
        self.aux_head = AuxiliaryHead(dims[3], num_classes, **dd) if aux_head and num_classes else None

    def check_input_size(self, img_size: Sequence[int]) -> None:
        """Any size of at least one pixel can be taken."""

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Record the size of images, on which no parameter depends."""
        self.img_size = to_size(img_size)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, device=None, dtype=None) -> None:
        """A fresh classifier, and a fresh auxiliary one if there is one; see `ImageBackbone`."""
        super().reset_classifier(num_classes, global_pool, device=device, dtype=dtype)
        if self._aux_dim is not None:
            weight = next(self.stem.parameters())
            dd = {"device": device or weight.device, "dtype": dtype or weight.dtype}
            self.aux_head = AuxiliaryHead(self._aux_dim, num_classes, **dd) if num_classes else None
            self.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.aux_head is None:
            return self.forward_head(self.forward_features(x))
        check_image(x, self)
        x, seen = self.stages(self.stem(x))
        return torch.stack([self.forward_head(self.norm(x)), self.aux_head(seen)])

    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        blocks = [
            (r"^stages\.([01])\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.(?:downsample|context_down)", (0,)),
            (r"^stages\.2\.base", (0,)),
            (r"^stages\.2\.(?:overview|context_proj)", (1,)),
            (r"^stages\.([23])\.focus\.(\d+)", None),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}


def _with_deploy(spec: Any, deploy: bool) -> Any:
    """The mixer in its folded form, if it has one."""
    name, options = split_spec(spec)
    return (name, {"deploy": deploy, **options}) if "deploy" in TOKEN_MIXERS[name].options else spec


def _init(module: nn.Module) -> None:
    init_linear_and_conv(module)
    if isinstance(module, RelativeBias) and not module.table.is_meta:
        nn.init.zeros_(module.table)


_COMMON = {
    "token_mixer": [("large_kernel_conv", {"kernel_size": k}) for k in (17, 15, 13, 7)],
    "focus_kernels": (13, 7),
}
_SIZES = {
    "xt": {"depths": (2, 2, 3, 2), "focus_depths": (6, 2), "dims": (56, 112, 256, 336), "focus_heads": (4, 6)},
    "t": {"depths": (4, 4, 6, 2), "focus_depths": (12, 2), "dims": (64, 128, 256, 512), "focus_heads": (4, 8)},
    "s": {"depths": (6, 6, 8, 3), "focus_depths": (16, 3), "dims": (64, 128, 320, 512), "focus_heads": (8, 16)},
    "b": {"depths": (8, 8, 10, 4), "focus_depths": (20, 4), "dims": (80, 160, 384, 576), "focus_heads": (6, 9)},
}
_CROP = {"xt": 0.925, "t": 0.95, "s": 0.95, "b": 0.975}
for _size, _row in _SIZES.items():
    register_models(
        OverLoCK,
        {f"overlock_{_size}": _COMMON | _row, f"overlock_{_size}_reparam": _COMMON | _row | {"deploy": True}},
        first_conv="stem.convs.0.conv",
        crop_pct=_CROP[_size],
    )
