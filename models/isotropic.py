"""IsotropicMetaFormer: patches, then blocks of one width at one resolution, then the head.

Papers: arXiv:2010.11929 (the shape), arXiv:2105.01601 (with a token mixer that is not attention), arXiv:2111.11418.

    x: (B, in_chans, H, W) -> patch stem -> depth blocks on (B, H/p, W/p, C) -> norm -> mean over the grid -> classes

Families with a block of their own pass it in as ``block``; one whose block is a token and a channel branch passes the
names of its mixers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from torch import Tensor

from ..mixers import CHANNEL_MIXERS, TOKEN_MIXERS
from ..mixers._layers import make_activation
from ..mixers._registry import Registry, specs_per_block, split_spec
from ._image import ClassifierHead, ImageBackbone, init_linear, to_size
from ._registry import register_models
from .block import MetaFormerBlock
from .metaformer import MetaFormerStage


class PatchStem(nn.Module):
    """Linear embedding of patches that do not overlap: ``(B, in_chans, H, W) -> (B, C, H/p, W/p)``, channels last."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, *, device=None, dtype=None):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, patch_size, patch_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class IsotropicMetaFormer(ImageBackbone):
    """Blocks of one width over the patches of an image, with any registered mixers.

    Args:
        in_chans, num_classes, global_pool, img_size, drop_rate, drop_path_rate: as in timm; ``drop_rate`` acts in the
            head, the drop path grows linearly over the blocks to ``drop_path_rate``.
        proj_drop_rate: dropout inside the mixers, of those with an option ``drop``.
        patch_size: side p of a patch in pixels; sides of images are multiples of it.
        dim, depth: channels C and number of blocks.
        token_mixer, channel_mixer: a name, ``(name, {options})``, or a list with one of these for every block.
        act: activation inside the mixers, of those that leave the choice, see `make_activation`; None for their own.
        norm, norm_eps: norm of the blocks, see `make_norm`.
        layer_scale: initial value of the blocks' layer scale, None for none.
        pos_embed: add a learned position embedding to the patches.
        final_norm_eps: of the layer norm after the last block, None for no norm.
        block: makes a block that keeps the shape of a channels-last map and has ``set_grid_size``. It is called as
            ``block(dim, token_mixer=, channel_mixer=, grid_size=, norm=, norm_eps=, layer_scale=, drop_path=, device=,
            dtype=)``.
        init: draws the initial values, applied to every module but the classifier.

    Shapes: images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``. Every block is a stage of ``feature_info``,
    and all maps are ``(B, C, H/p, W/p)``. If a mixer or the position embedding depends on the grid, images have the
    size ``img_size``, see `set_input_size`.
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
        proj_drop_rate: float = 0.0,
        patch_size: int = 16,
        dim: int = 384,
        depth: int = 12,
        token_mixer: Any = "pooling",
        channel_mixer: Any = "mlp",
        act: str | None = None,
        norm: str = "layer",
        norm_eps: float = 1e-6,
        layer_scale: float | None = None,
        pos_embed: bool = False,
        final_norm_eps: float | None = 1e-6,
        block: Callable[..., nn.Module] = MetaFormerBlock,
        init: Callable[[nn.Module], None] = init_linear,
        device=None,
        dtype=None,
    ):
        for name, value in (("patch_size", patch_size), ("depth", depth)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        defaults = {"drop": proj_drop_rate} | ({} if act is None else {"act": act})
        token_specs = _specs(TOKEN_MIXERS, token_mixer, depth, defaults, "token_mixer")
        channel_specs = _specs(CHANNEL_MIXERS, channel_mixer, depth, defaults, "channel_mixer")
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=dim, img_size=img_size)
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.act = act
        grid = self._grid(self.img_size, "img_size")

        self.stem = PatchStem(in_chans, dim, patch_size, **dd)
        drop_paths = calculate_drop_path_rates(drop_path_rate, depth)
        common = {"grid_size": grid, "norm": norm, "norm_eps": norm_eps, "layer_scale": layer_scale}
        stages = []
        for i in range(depth):
            mixers = {"token_mixer": token_specs[i], "channel_mixer": channel_specs[i]}
            embed = nn.Parameter(torch.zeros(1, *grid, dim, **dd)) if pos_embed and i == 0 else None
            made = block(dim, **mixers, **common, drop_path=drop_paths[i], **dd)
            stages.append(MetaFormerStage(nn.Identity(), embed, [made], hidden=4 * dim))
            self.feature_info.append({"num_chs": dim, "reduction": patch_size, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        # the grid that parameters are bound to, if any are
        bound = pos_embed or any(map(TOKEN_MIXERS.needs_grid, token_specs))
        self._bound = grid if bound or any(map(CHANNEL_MIXERS.needs_grid, channel_specs)) else None
        self.apply(init)
        self.norm = nn.Identity() if final_norm_eps is None else LayerNorm2d(dim, eps=final_norm_eps, **dd)
        self.head = ClassifierHead(
            dim, num_classes, norm=None, norm_eps=norm_eps, global_pool=global_pool, drop_rate=drop_rate, **dd
        )

    def _grid(self, img_size: Sequence[int], name: str) -> tuple[int, int]:
        """(H, W) of the maps for images of ``img_size`` pixels."""
        p = self.patch_size
        if any(side % p for side in img_size):
            below, above = (tuple(max(1, n) * p for n in sides) for sides in _neighbours(img_size, p))
            raise ValueError(
                f"{name} {tuple(img_size)} is not made of whole patches: sides must be multiples of {p}, at least {p}; "
                f"the nearest valid sizes are {above if below == above else f'{below} and {above}'}"
            )
        return img_size[0] // p, img_size[1] // p

    def check_input_size(self, img_size: Sequence[int]) -> None:
        """Raise ValueError unless images of this size can be taken; see `ImageBackbone`."""
        grid = self._grid(img_size, "input size")
        if self._bound is not None and grid != self._bound:
            raise ValueError(
                f"input size {tuple(img_size)} gives the grid {grid}, but parameters are bound to {self._bound}: give "
                f"images of {self.img_size} pixels, or call set_input_size({tuple(img_size)}) first"
            )

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resize every parameter that depends on the grid to images of ``img_size`` pixels.

        Mixers follow their authors' procedure where there is one; others, such as token MLPs, are resampled, which is
        an approximation to be fine-tuned. Position embeddings are resampled bicubically. Must run before the optimizer,
        DDP or `torch.compile` sees the parameters.
        """
        img_size = to_size(img_size)
        grid = self._grid(img_size, "img_size")
        if self._bound is not None and self._bound != grid:
            for stage in self.stages:
                stage.set_grid_size(grid)
            self._bound = grid
        self.img_size = img_size

    def set_activation(self, act: str) -> None:
        """Replace every GELU by another activation, see `make_activation`: weights decide which form they need."""
        for module in list(self.stages.modules()):
            if isinstance(getattr(module, "act", None), nn.GELU):
                module.act = make_activation(act)
        self.act = act

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        blocks = [(r"^stages\.(\d+)\.blocks", None), (r"^stages\.0\.pos_embed", (0,)), (r"^norm", (99999,))]
        return {"stem": r"^stem|^stages\.0\.pos_embed", "blocks": blocks}


def _specs(
    registry: Registry, mixer: Any, depth: int, defaults: Mapping[str, Any], argument: str
) -> list[tuple[str, dict]]:
    """One spec for every block, with the defaults where the mixer has the option and the spec leaves it open."""
    specs = []
    for (spec,) in specs_per_block(mixer, [1] * depth, argument):
        name, options = split_spec(spec)
        accepted = {key: value for key, value in defaults.items() if key in registry[name].options}
        specs.append((name, accepted | options))
    return specs


def _neighbours(sides: Sequence[int], step: int) -> tuple[list[int], list[int]]:
    """Numbers of whole steps in the sides, rounded down and rounded up."""
    return [side // step for side in sides], [-(-side // step) for side in sides]


_S16 = {"patch_size": 16, "dim": 384, "depth": 12, "token_mixer": "pooling"}

# the open names: any mixer, in the widths of the small vision transformers
register_models(
    IsotropicMetaFormer,
    {"isoformer_ti16": _S16 | {"dim": 192}, "isoformer_s16": _S16, "isoformer_b16": _S16 | {"dim": 768}},
    reduction=16,
    note="open: any token_mixer",
)
