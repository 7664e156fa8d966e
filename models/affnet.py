"""AFFNet: inverted residuals, and blocks of a convolution and an adaptive frequency filter.

Paper: arXiv:2307.14008. Checked against microsoft/TokenMixers at 99dbe38, in the configuration of the published models:
SiLU everywhere, also in the filters, batch norm after convolutions, group norm around the mixers.

    n <- GN(x);  u <- n + MBConv(n);  x <- x + filter(GN(u))        filter with its own skip
    stage: downsample; t <- blocks of these, GN, 1x1; x <- 1x1([x, t])

The convolution's skip starts at the norm, so a block is one residual branch. Convolutions see (B, C, H, W), filters the
channels-last view of the same memory. Images are scaled to 0..1 and not normalised further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.layers import ConvNormAct, calculate_drop_path_rates
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._manipulate import checkpoint_seq
from torch import Tensor

from ..mixers import TOKEN_MIXERS
from ..mixers._layers import InplaceSiLU, make_norm
from ..mixers._norm_silu_conv import norm_silu_conv
from ..mixers._registry import specs_per_block
from ._hierarchical import HierarchicalBackbone
from ._image import ClassifierHead, init_linear
from ._registry import register_models
from ._slicing import run_sliced
from .block import ResidualBranch

_NORM_EPS = 1e-5


class LeanInvertedResidual(InvertedResidual):
    """timm's inverted residual with SiLU; in training on a CPU one of three wide maps is kept, see `norm_silu_conv`."""

    def __init__(self, in_chans: int, out_chans: int, *, stride: int = 1, expansion: float, device=None, dtype=None):
        # its options for other parts in between are left out, since they would be passed over
        options = {"stride": stride, "exp_ratio": expansion, "act_layer": InplaceSiLU}
        super().__init__(in_chans, out_chans, **options, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = norm_silu_conv(self.conv_pw(x), self.bn1, self.conv_dw)
        y = self.bn3(norm_silu_conv(y, self.bn2, self.conv_pwl))
        return x + self.drop_path(y) if self.has_skip else y


class AFFStem(nn.Module):
    """First convolution: ``(B, in_chans, H, W) -> (B, C, H/2, W/2)``, channels last in memory, as all that follows."""

    def __init__(self, in_chans: int, width: int, *, device=None, dtype=None):
        super().__init__()
        self.embed = ConvNormAct(in_chans, width, 3, stride=2, act_layer=InplaceSiLU, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x.contiguous(memory_format=torch.channels_last))


class LocalThenMix(nn.Module):
    """Inverted residual, norm, token mixer: ``(B, H, W, C) -> (B, H, W, C)``."""

    def __init__(self, local: nn.Module, norm: nn.Module, token: nn.Module):
        super().__init__()
        self.local = local
        self.norm = norm
        self.token = token

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.token(self.norm(x))


class AFFMixingBlock(nn.Module):
    """One residual branch around an inverted residual and a token mixer.

    Args:
        dim: channels C.
        token_mixer: a name or ``(name, {options})``.
        grid_size: the grid, for mixers whose parameters depend on it.
        expansion: hidden width of the inverted residual over C.
        drop_path: see `ResidualBranch`.

    Shapes: ``(B, H, W, C) -> (B, H, W, C)``.
    """

    def __init__(
        self,
        dim: int,
        *,
        token_mixer: Any = "aff",
        grid_size: Sequence[int] | None = None,
        expansion: float = 2.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        local = LeanInvertedResidual(dim, dim, expansion=expansion, **dd)
        first, second = (make_norm("group", dim, eps=_NORM_EPS, **dd) for _ in range(2))
        token = TOKEN_MIXERS.create(token_mixer, dim, grid_size=grid_size, **dd)
        self.branch = ResidualBranch(first, LocalThenMix(local, second, token), drop_path=drop_path)
        self._needs_grid = TOKEN_MIXERS.needs_grid(token_mixer)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize the mixer if its parameters depend on the grid."""
        if self._needs_grid:
            self.branch.op.token.set_grid_size(grid_size)


class AFFBlock(nn.Module):
    """Mixing blocks, beside their input or alone: ``(B, C, H, W) -> (B, C, H, W)``.

    Args:
        dim: channels C.
        depth: number of blocks.
        token_mixers: one for each block.
        grid_size, drop_paths: see `AFFMixingBlock`, one rate for each block.
        fuse: join what comes out with the input; without, it is the result.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        token_mixers: Sequence[Any] | None = None,
        grid_size: Sequence[int] | None = None,
        drop_paths: Sequence[float] | None = None,
        fuse: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        mixers = token_mixers or ["aff"] * depth
        rates = drop_paths or [0.0] * depth
        blocks = [
            AFFMixingBlock(dim, token_mixer=mixer, grid_size=grid_size, drop_path=rate, **dd)
            for mixer, rate in zip(mixers, rates, strict=True)
        ]
        self.blocks = nn.Sequential(*blocks, make_norm("group", dim, eps=_NORM_EPS, **dd))
        self.proj = ConvNormAct(dim, dim, 1, apply_act=False, **dd)
        self.fuse = ConvNormAct(2 * dim, dim, 1, act_layer=InplaceSiLU, **dd) if fuse else None
        self.hidden = 2 * dim
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        t = x.permute(0, 2, 3, 1)
        if torch.jit.is_scripting():
            t = self.blocks(t)
        elif self.grad_checkpointing:
            t = checkpoint_seq(self.blocks, t)
        else:
            t = run_sliced(self.blocks, t, self.hidden)
        t = self.proj(t.permute(0, 3, 1, 2))
        return t if self.fuse is None else self.fuse(torch.cat([x, t], 1))

    @torch.jit.ignore
    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize the mixers whose parameters depend on the grid."""
        for block in self.blocks[:-1]:
            block.set_grid_size(grid_size)


class AFFStage(nn.Module):
    """Inverted residuals, the first one downsampling, then mixing, then a widening 1 x 1 convolution, if any.

    ``(B, C, H, W) -> (B, C', H', W')``
    """

    def __init__(self, convs: Sequence[nn.Module], mix: nn.Module | None = None, expand: nn.Module | None = None):
        super().__init__()
        self.convs = nn.Sequential(*convs)
        self.mix = nn.Identity() if mix is None else mix
        self.expand = nn.Identity() if expand is None else expand
        self._mixes = mix is not None

    @property
    def grad_checkpointing(self) -> bool:
        return self._mixes and self.mix.grad_checkpointing

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        if self._mixes:
            self.mix.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.mix(self.convs(x)))

    @torch.jit.ignore
    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize the mixers whose parameters depend on the grid."""
        if self._mixes:
            self.mix.set_grid_size(grid_size)


class AFFNet(HierarchicalBackbone):
    """Five stages, the last three with token mixers.

    Args:
        in_chans, num_classes, global_pool, img_size, drop_rate, drop_path_rate: as in timm; ``drop_rate`` acts in the
            head, the drop path grows linearly over the mixing blocks.
        widths: channels of the five stages; the stem has 16.
        depths: mixing blocks of the last three stages.
        fuse: whether each of these joins its mixing blocks with their input, see `AFFBlock`.
        conv_depths: inverted residuals of the first two stages.
        expansion: hidden width of the inverted residuals outside mixing blocks, over their input's.
        max_head_width: the last stage is widened four times, to this at most.
        token_mixer: a name, ``(name, {options})``, or a list with one of these (or a list of one per block) for each
            of the last three stages.

    Shapes: images ``(B, in_chans, H, W)`` of any size to logits ``(B, num_classes)``. The maps have strides 2, 4, 8, 16
    and 32; the last one is the widened one.
    """

    # the stride of the stem
    smallest_side = 2

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | Sequence[int] = 256,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        widths: Sequence[int] = (32, 48, 64, 104, 144),
        depths: Sequence[int] = (2, 4, 3),
        fuse: Sequence[bool] = (True, True, True),
        conv_depths: Sequence[int] = (1, 3),
        expansion: float = 2.0,
        max_head_width: int = 960,
        token_mixer: Any = "aff",
        device=None,
        dtype=None,
    ):
        for name, value, number in (
            ("widths", widths, 5),
            ("depths", depths, 3),
            ("fuse", fuse, 3),
            ("conv_depths", conv_depths, 2),
        ):
            if len(value) != number:
                raise ValueError(f"{name} must have {number} entries, got {value!r}")
        specs = specs_per_block(token_mixer, depths, "token_mixer")
        head_width = min(4 * widths[-1], max_head_width)
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=head_width, img_size=img_size)
        self.check_side(self.img_size, "img_size")
        dd = {"device": device, "dtype": dtype}
        self.stem = AFFStem(in_chans, 16, **dd)

        def inverted(i: int, stride: int, first: bool = True) -> nn.Module:
            entry = (16, *widths)[i] if first else widths[i]
            return LeanInvertedResidual(entry, widths[i], stride=stride, expansion=expansion, **dd)

        stages = [
            AFFStage([inverted(i, 1 + i), *(inverted(i, 1, first=False) for _ in range(conv_depths[i] - 1))])
            for i in range(2)
        ]
        grids = self.grids(self.img_size)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for j, depth in enumerate(depths):
            i = j + 2
            places = {"grid_size": grids[i], "drop_paths": rates[j]}
            mix = AFFBlock(widths[i], depth=depth, token_mixers=specs[j], fuse=fuse[j], **places, **dd)
            expand = ConvNormAct(widths[i], head_width, 1, act_layer=InplaceSiLU, **dd) if i == 4 else None
            stages.append(AFFStage([inverted(i, 2)], mix, expand))
        self.stages = nn.Sequential(*stages)
        for i, width in enumerate((*widths[:-1], head_width)):
            self.feature_info.append({"num_chs": width, "reduction": 2 ** (i + 1), "module": f"stages.{i}"})
        # stages whose parameters depend on the grid
        self.bound = {j + 2: grids[j + 2] for j in range(3) if any(map(TOKEN_MIXERS.needs_grid, specs[j]))}
        self.apply(init_linear)
        pool = {"global_pool": global_pool, "drop_rate": drop_rate}
        self.head = ClassifierHead(head_width, num_classes, norm=None, norm_eps=_NORM_EPS, **pool, **dd)

    def grids(self, img_size: Sequence[int]) -> list[tuple[int, int]]:
        """(H, W) of every stage's map for images of ``img_size`` pixels."""
        return [tuple(-(-side // 2 ** (i + 1)) for side in img_size) for i in range(5)]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        blocks = [
            (r"^stages\.(\d+)\.convs\.(\d+)", None),
            (r"^stages\.(\d+)\.mix\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.(?:mix|expand)", (99,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}


_AFF = {"depths": (2, 4, 3), "token_mixer": "aff", "max_head_width": 960, "expansion": 4.0}
_BASE = _AFF | {"widths": (64, 128, 256, 512, 640), "fuse": (True, False, False)}
_EVALUATION = {
    "input_size": (3, 256, 256),
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "crop_pct": 0.889,
    "first_conv": "stem.embed.conv",
    "feature_levels": 5,
}

register_models(
    AFFNet,
    {
        "affnet_et": _AFF | {"widths": (32, 48, 64, 104, 144), "expansion": 2.0},
        "affnet_t": _AFF | {"widths": (32, 48, 96, 160, 192)},
        "affnet": _AFF | {"widths": (32, 64, 128, 256, 320)},
    },
    **_EVALUATION,
)
register_models(
    AFFNet,
    {
        "affnet_base": _BASE,
        "affnet_large": _BASE | {"widths": (64, 128, 256, 512, 768), "depths": (4, 18, 6), "conv_depths": (2, 6)},
    },
    note="in the authors' code, without published figures or weights",
    **_EVALUATION,
)
