"""RaftMLP: raft token mixing in levels of growing width, or at one resolution.

Paper: arXiv:2108.04384. Checked against okojoalg/raft-mlp at 6060d5d.

    x <- x + V(LN(x));  x <- x + H(LN(x));  x <- x + mlp(LN(x))        V, H: see `mixzoo.mixers.raft`

Token weights are laid out for one image size, 224. Images of other sizes pass through the same weights: a level
resizes its input up to whole patches, and every block resizes its features to the grid of its weights for the token
branches and back for the channel MLP, all bicubically. That costs two passes a block and smooths the residual stream.

The published models embed patches at several scales, a sum of convolutions with one stride. It is computed as one
convolution, whose kernel is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..mixers import TOKEN_MIXERS
from ..mixers._registry import specs_per_block
from ..mixers.raft import BicubicResize
from ._hierarchical import stage_groups
from ._image import ClassifierHead, ImageBackbone, check_image, to_size
from ._registry import register_models
from .block import MetaFormerBlock
from .metaformer import MetaFormerStage


class ScaledPatches(nn.Module):
    """Patches embedded at several scales: ``(B, C, H, W) -> (B, C', ceil(H/p), ceil(W/p))``.

    Args:
        in_chans, dim: channels C and C'.
        kernels: sides of the windows around a patch, ascending multiples of the first, which is the patch size p.

    An input that is not made of whole patches is resized up to them.
    """

    def __init__(self, in_chans: int, dim: int, kernels: Sequence[int], *, device=None, dtype=None):
        super().__init__()
        p = kernels[0]
        if list(kernels) != sorted(set(kernels)) or any((k - p) % 2 or k % p for k in kernels):
            raise ValueError(f"embed_kernels must be ascending multiples of the first, even apart, got {kernels!r}")
        self.patch_size = p
        self.padding = (kernels[-1] - p) // 2
        self.edges = [(kernels[-1] - k) // 2 for k in kernels]
        # parameters of one convolution; only the first has the bias
        self.convs = nn.ModuleList(
            nn.Conv2d(in_chans, dim, k, p, (k - p) // 2, bias=i == 0, device=device, dtype=dtype)
            for i, k in enumerate(kernels)
        )
        self.resize = BicubicResize()

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        height, width = (x.shape[2] + p - 1) // p * p, (x.shape[3] + p - 1) // p * p
        x = self.resize(x.permute(0, 2, 3, 1), height, width).permute(0, 3, 1, 2)
        y = F.conv2d(x, self._kernel(), self.convs[0].bias, stride=p, padding=self.padding)
        return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

    def _kernel(self) -> Tensor:
        """The sum of all windows' kernels, centred."""
        kernel = F.pad(self.convs[0].weight, [self.edges[0]] * 4)
        for i, conv in enumerate(self.convs):
            if i > 0:
                kernel = kernel + F.pad(conv.weight, [self.edges[i]] * 4)
        return kernel


class RaftMLPBlock(nn.Module):
    """Token mixing on the grid of its weights, then a channel branch on the grid of the map.

    Args:
        dim: channels C.
        weight_grid: (H, W) that the token mixer is built for; maps of another grid are resized to it and back, unless
            the mixer takes any grid.
        token_mixer, channel_mixer, norm, norm_eps, drop_path: see `MetaFormerBlock`.

    Shapes: ``(B, H, W, C) -> (B, H, W, C)``, any grid.
    """

    def __init__(
        self,
        dim: int,
        *,
        weight_grid: Sequence[int],
        token_mixer: Any = "raft",
        channel_mixer: Any = "mlp",
        norm: str = "layer",
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        parts = MetaFormerBlock(
            dim,
            token_mixer=token_mixer,
            channel_mixer=channel_mixer,
            grid_size=weight_grid,
            norm=norm,
            norm_eps=norm_eps,
            drop_path=drop_path,
            device=device,
            dtype=dtype,
        )
        self.token, self.channel = parts.token, parts.channel
        self.height, self.width = weight_grid
        self.resize = BicubicResize() if TOKEN_MIXERS.needs_grid(token_mixer) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.resize is None:
            return self.channel(self.token(x))
        tokens = self.token(self.resize(x, self.height, self.width))
        return self.channel(self.resize(tokens, x.shape[1], x.shape[2]))


class RaftMLP(ImageBackbone):
    """Levels of RaftMLP blocks, with any registered mixers.

    Args:
        in_chans, num_classes, global_pool, img_size, drop_rate: as in timm; images may have any size.
        drop_path_rate: one rate for all branches, as the authors have it.
        weight_size: side in pixels, or (H, W), of the images that token weights are laid out for.
        depths, dims: blocks and channels of each stage.
        patch_sizes: stride of each stage; 1 continues at the same resolution, as do stages beyond the last one given.
        embed_kernels: sides of the windows that a stage embeds around each patch, ascending from its patch size; None
            for the patches alone.
        token_mixer, channel_mixer: a name, ``(name, {options})``, or a list with one of these (or a list of one per
            block) for every stage.
        norm, norm_eps: norm of the blocks; norm_eps is also the head's.

    Shapes: images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``.
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
        weight_size: int | Sequence[int] = 224,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        embed_kernels: Sequence[Sequence[int]] | None = None,
        token_mixer: Any = "raft",
        channel_mixer: Any = "mlp",
        norm: str = "layer",
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        stages = len(depths)
        if stages == 0 or len(dims) != stages:
            raise ValueError(f"depths and dims must have one entry per stage, got {depths!r} and {dims!r}")
        kernels = _kernels(patch_sizes, embed_kernels, stages)
        token_specs = specs_per_block(token_mixer, depths, "token_mixer")
        channel_specs = specs_per_block(channel_mixer, depths, "channel_mixer")
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=dims[-1], img_size=img_size)
        dd = {"device": device, "dtype": dtype}
        self.stem = ScaledPatches(in_chans, dims[0], kernels[0], **dd)
        self.check_input_size(self.img_size)
        grid, reduction, built = to_size(weight_size, "weight_size"), 1, []
        for i in range(stages):
            p = kernels[i][0]
            grid, reduction = tuple(-(-side // p) for side in grid), reduction * p
            own = {"weight_grid": grid, "norm": norm, "norm_eps": norm_eps, "drop_path": drop_path_rate, **dd}
            specs = zip(token_specs[i], channel_specs[i], strict=True)
            blocks = [RaftMLPBlock(dims[i], token_mixer=token, channel_mixer=ch, **own) for token, ch in specs]
            embed = i > 0 and (p > 1 or dims[i] != dims[i - 1])
            entry = ScaledPatches(dims[i - 1], dims[i], kernels[i], **dd) if embed else nn.Identity()
            built.append(MetaFormerStage(entry, None, blocks, hidden=4 * dims[i]))
            self.feature_info.append({"num_chs": dims[i], "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*built)
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

    def check_input_size(self, img_size: Sequence[int]) -> None:
        """Raise ValueError unless images of this size can be taken; see `ImageBackbone`."""
        p = self.stem.patch_size
        if min(img_size) < p:
            raise ValueError(f"img_size {tuple(img_size)} is too small: sides must be at least {p}, one patch")

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Record the size of images; no parameter depends on it, features are resized on the way."""
        img_size = to_size(img_size)
        self.check_input_size(img_size)
        self.img_size = img_size

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        return stage_groups(coarse)


def _kernels(
    patch_sizes: Sequence[int], embed_kernels: Sequence[Sequence[int]] | None, stages: int
) -> list[tuple[int, ...]]:
    """Windows of every stage, the patch first."""
    patches = (list(patch_sizes) + [1] * stages)[:stages]
    windows = [(p,) for p in patches] if embed_kernels is None else list(map(tuple, embed_kernels))
    windows = (windows + [(1,)] * stages)[:stages]
    if any(window[:1] != (p,) for window, p in zip(windows, patches, strict=True)):
        raise ValueError(f"embed_kernels must begin with the patch sizes {patches} of their stages: {embed_kernels!r}")
    return windows


class RaftMLPBackbone(nn.Module):
    """Maps for dense prediction as the authors take them: images to a list of ``(B, C, H, W)``, without norms.

    Args:
        taps: stages whose output is taken after the first map, which is the embedding of the patches, before any block.
        in_chans, img_size, weight_size, drop_path_rate and all further ones: see `RaftMLP`; it has no head.
    """

    modality = "image"

    def __init__(
        self,
        *,
        taps: Sequence[int] = (1, 2, 3),
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        weight_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        embed_kernels: Sequence[Sequence[int]] | None = None,
        token_mixer: Any = "raft",
        channel_mixer: Any = "mlp",
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.config: dict = {}
        self.class_names = None
        self.num_classes = 0
        self.taps = tuple(taps)
        self.body = RaftMLP(
            in_chans=in_chans,
            num_classes=0,
            global_pool="",
            img_size=img_size,
            weight_size=weight_size,
            drop_path_rate=drop_path_rate,
            depths=depths,
            dims=dims,
            patch_sizes=patch_sizes,
            embed_kernels=embed_kernels,
            token_mixer=token_mixer,
            channel_mixer=channel_mixer,
            device=device,
            dtype=dtype,
        )
        self.body.head.norm = nn.Identity()
        info = self.body.feature_info
        self.feature_info = [info[0] | {"module": "body.stem"}] + [info[i] for i in taps]

    @property
    def in_chans(self) -> int:
        return self.body.in_chans

    @property
    def img_size(self) -> tuple[int, int]:
        return self.body.img_size

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """See `RaftMLP.set_input_size`."""
        self.body.set_input_size(img_size)

    def forward(self, x: Tensor) -> list[Tensor]:
        check_image(x, self.body)
        x = self.body.stem(x)
        maps = [x]
        for i, stage in enumerate(self.body.stages):
            x = stage(x)
            if i in self.taps:
                maps.append(x)
        return maps


class RaftMLPShortcut(nn.Module):
    """RaftMLP whose classifier reads every level: the pooled maps scale and shift the last one's features.

        a = mean(LN(x_last));  for i = last-1 .. 0:  [s, t] = film_i(mean(LN_i(x_i))),  a <- s a + t;  logits = fc(a)

    Args:
        num_classes: of the classifier.
        all further ones: see `RaftMLP`, whose head is left out.
    """

    modality = "image"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        weight_size: int | Sequence[int] = 224,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        embed_kernels: Sequence[Sequence[int]] | None = None,
        token_mixer: Any = "raft",
        channel_mixer: Any = "mlp",
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.config: dict = {}
        self.class_names = None
        self.num_classes = num_classes
        self.body = RaftMLP(
            in_chans=in_chans,
            num_classes=0,
            global_pool="",
            img_size=img_size,
            weight_size=weight_size,
            drop_path_rate=drop_path_rate,
            depths=depths,
            dims=dims,
            patch_sizes=patch_sizes,
            embed_kernels=embed_kernels,
            token_mixer=token_mixer,
            channel_mixer=channel_mixer,
            **dd,
        )
        # of all levels but the last, whose norm the body's head has
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-5, **dd) for dim in dims[:-1])
        self.films = nn.ModuleList(nn.Linear(dim, 2 * dims[-1], **dd) for dim in dims[:-1])
        self.fc = nn.Linear(dims[-1], num_classes, **dd) if num_classes > 0 else nn.Identity()

    @property
    def in_chans(self) -> int:
        return self.body.in_chans

    @property
    def img_size(self) -> tuple[int, int]:
        return self.body.img_size

    @property
    def feature_info(self) -> list[dict]:
        return self.body.feature_info

    def get_classifier(self) -> nn.Module:
        """The module that makes logits."""
        return self.fc

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """See `RaftMLP.set_input_size`."""
        self.body.set_input_size(img_size)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last map, before norm and pooling."""
        return self.body.forward_features(x)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.body.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        pooled = self.body.head.norm(maps[-1]).mean((1, 2))  # (B, D)
        for y, norm, film in zip(maps[-2::-1], reversed(self.norms), reversed(self.films), strict=True):
            scale, shift = film(norm(y).mean((1, 2))).chunk(2, dim=1)
            pooled = scale * pooled + shift
        return self.fc(pooled)


def _rafts(size: int) -> tuple[str, dict]:
    return ("raft", {"raft_size": size, "expansion": 2.0})


_S = {
    "weight_size": 224,
    "depths": (2, 2, 6, 2),
    "dims": (64, 128, 256, 512),
    "patch_sizes": (4, 2, 2, 2),
    "embed_kernels": ((4, 8), (2, 4), (2, 4), (2,)),
    "token_mixer": _rafts(2),
}
_M = _S | {"dims": (96, 192, 384, 768)}
_L = _S | {"dims": (128, 192, 512, 1024)}
# levels of one resolution are stages of one block, so that there are maps to take
_12 = {
    "weight_size": 224,
    "depths": (1,) * 12,
    "dims": (768,) * 12,
    "patch_sizes": (16,),
    "token_mixer": _rafts(4),
}
_12_MS = _12 | {"token_mixer": _rafts(2), "embed_kernels": ((16, 32),)}
# the authors' MLP-Mixer; its hidden width is twice the tokens, not half the channels
_ORG = _12 | {"token_mixer": ("mlp", {"hidden": 2 * 14**2})}
# its maps for dense prediction come after blocks 4, 10 and 12
_ORG_DENSE = _ORG | {"depths": (4, 6, 2), "dims": (768,) * 3, "taps": (0, 1, 2)}
_HIERARCHY_M = _M | {"embed_kernels": None}
_LEVELS = {
    "raftmlp_s": _S,
    "raftmlp_m": _M,
    "raftmlp_l": _L,
}
_ISOTROPIC = {
    "raftmlp_12": _12,
    "raftmlp_36": _12 | {"depths": (1,) * 36, "dims": (384,) * 36, "token_mixer": _rafts(2)},
    "raftmlp_12_r1": _12 | {"token_mixer": _rafts(1)},
    "raftmlp_12_r2": _12 | {"token_mixer": _rafts(2)},
    "raftmlp_org_mixer_b16": _ORG,
}
# for 32 x 32 images, with token weights laid out for 224
_CIFAR = {
    "img_size": 32,
    "weight_size": 224,
    "depths": (1,) * 4,
    "dims": (128, 128, 256, 256),
    "patch_sizes": (2, 1, 2, 1),
    "embed_kernels": ((2, 4, 8), (1,), (2, 4), (1,)),
    "token_mixer": _rafts(4),
}
_CIFAR_ORG = {
    "img_size": 32,
    "weight_size": 224,
    "depths": (1,) * 4,
    "dims": (256,) * 4,
    "patch_sizes": (4,),
    "token_mixer": ("mlp", {"hidden": 2 * 56**2}),
}
_TINY_SHORTCUT = {
    "img_size": 32,
    "weight_size": 32,
    "depths": (1, 1),
    "dims": (32, 48),
    "patch_sizes": (4, 2),
    "embed_kernels": ((4, 8), (2, 4)),
    "token_mixer": (_rafts(2), _rafts(4)),
}

_COMMON = {"crop_pct": 0.875, "interpolation": "bilinear", "first_conv": "stem.convs.0"}
_CIFAR10 = {"input_size": (3, 32, 32), "mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}
_DENSE = {"timm": False, "classifier": None, "first_conv": "body.stem.convs.0"}

_FOLDED = "windows of several sizes counted as the one convolution that computes them"

register_models(RaftMLP, _LEVELS, **_COMMON, note=_FOLDED)
register_models(RaftMLP, {"raftmlp_hierarchy_m": _HIERARCHY_M}, **_COMMON)
register_models(RaftMLP, _ISOTROPIC, **_COMMON, reduction=16)
register_models(RaftMLP, {"raftmlp_12_r2_ms": _12_MS}, **_COMMON, reduction=16, note=_FOLDED)
register_models(RaftMLP, {"raftmlp_cifar10": _CIFAR}, **_COMMON | _CIFAR10, num_classes=10, reduction=4)
register_models(RaftMLP, {"raftmlp_cifar10_org_mixer": _CIFAR_ORG}, **_COMMON | _CIFAR10, num_classes=10, reduction=4)
register_models(
    RaftMLPBackbone,
    {f"{name}_backbone": row for name, row in _LEVELS.items()} | {"raftmlp_hierarchy_m_backbone": _HIERARCHY_M},
    **_DENSE,
    note="four maps for dense prediction; the first is the embedding of the patches",
)
register_models(
    RaftMLPBackbone,
    {"raftmlp_org_mixer_b16_backbone": _ORG_DENSE},
    **_DENSE,
    note="four maps of stride 16 for dense prediction; the first is the embedding of the patches",
)
register_models(
    RaftMLPShortcut,
    {"raftmlp_tiny_shortcut": _TINY_SHORTCUT},
    **_CIFAR10 | _DENSE | {"classifier": "fc"},
    num_classes=10,
    note="the head over all levels, which no published model has",
)
