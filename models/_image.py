"""What every image backbone shares: timm's model contract over a stem, a chain of stages and a head.

Between modules maps are ``(B, C, H, W)`` in channels-last memory, so that hooks and feature extractors see what they
expect and the channels-last view ``(B, H, W, C)`` inside the stages costs nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn as nn
from timm.layers import SelectAdaptivePool2d, get_device_dtype, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor

from ..mixers._layers import SquaredReLU, is_symbolic, make_norm, undecayed


class MlpHead(nn.Module):
    """Classifier of two layers: Linear, SquaredReLU, LayerNorm, dropout, Linear. ``(..., C) -> (..., classes)``."""

    def __init__(self, dim: int, num_classes: int, *, ratio: float = 4.0, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = int(ratio * dim)
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.act = SquaredReLU()
        self.norm = nn.LayerNorm(hidden, eps=1e-5, **dd)
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, num_classes, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.norm(self.act(self.fc1(x)))))


class ImageHead(nn.Module):
    """Abstract head of an `ImageBackbone`: ``global_pool`` and classifier ``fc``, ``(B, C, H, W) -> (B, classes)``.

    A head also has ``norm``, which maps of features can have by themselves, and takes ``pre_logits``.

    Args:
        dim: channels that the classifier reads.
        global_pool: timm's pooling names that keep the channels; "" keeps the map.
    """

    norm: nn.Module

    def __init__(self, dim: int, global_pool: str):
        super().__init__()
        self.dim = dim
        self.global_pool = self._pool(global_pool)

    @staticmethod
    def _pool(global_pool: str) -> SelectAdaptivePool2d:
        pool = SelectAdaptivePool2d(pool_type=global_pool)
        if pool.feat_mult() != 1:
            raise ValueError(
                f"global_pool={global_pool!r} changes the number of channels, which the head does not allow"
            )
        return pool

    @abstractmethod
    def classifier(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        """A fresh classifier for at least one class."""

    @abstractmethod
    def remove_norm(self) -> None:
        """Leave maps as they are."""

    def reset(self, num_classes: int, global_pool: str | None = None, device=None, dtype=None) -> None:
        """New classifier, none for 0 classes, and new pooling unless ``global_pool`` is None."""
        if global_pool is not None:
            self.global_pool = self._pool(global_pool)
        self.fc = self.classifier(num_classes, device, dtype) if num_classes else nn.Identity()
        self.train(self.training)


class ClassifierHead(ImageHead):
    """Norm, pooling and classifier in either order: ``(B, C, H, W) -> (B, classes)``.

    Args:
        dim: channels C.
        num_classes: 0 leaves the pooled, normalised features.
        norm, norm_eps: the last norm, see `make_norm`.
        norm_first: norm over the map, then pooling; otherwise pooling, then norm. The two are different functions.
        kind: "linear" or "mlp".
        global_pool: timm's pooling names; "" keeps the map.
        drop_rate: dropout before the last linear layer.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        norm: str | None,
        norm_eps: float,
        norm_first: bool = False,
        kind: str = "linear",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        if kind not in ("linear", "mlp"):
            raise ValueError(f"head must be 'linear' or 'mlp', not {kind!r}")
        super().__init__(dim, global_pool)
        dd = {"device": device, "dtype": dtype}
        self.kind = kind
        self.norm_first = norm_first
        self.drop_rate = drop_rate
        self.norm = make_norm(norm, dim, eps=norm_eps, **dd)
        # the MLP head drops between its layers, as its authors do
        self.drop = nn.Dropout(drop_rate if kind == "linear" else 0.0)
        self.reset(num_classes, **dd)

    def classifier(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        """One linear layer, or the MLP."""
        dd = {"device": device, "dtype": dtype}
        if self.kind == "mlp":
            return MlpHead(self.dim, num_classes, drop=self.drop_rate, **dd).apply(init_linear)
        return nn.Linear(self.dim, num_classes, **dd).apply(init_linear)

    def remove_norm(self) -> None:
        """Leave maps as they are."""
        self.norm = nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.norm_first:
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.global_pool(x).permute(0, 2, 3, 1)  # (B, 1, 1, C), or (B, H, W, C) without pooling
        if not self.norm_first:
            x = self.norm(x)
        x = self.drop(x)
        if not pre_logits:
            x = self.fc(x)
        x = x.permute(0, 3, 1, 2)
        return x if self.global_pool.is_identity() else x.flatten(1)


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights (std 0.02, cut at 2), zero biases, on linear layers alone."""
    # without storage there is nothing to draw, and drawing is most of the time of building a meta model
    if isinstance(module, nn.Linear) and not module.weight.is_meta:
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_linear_and_conv(module: nn.Module) -> None:
    """`init_linear` on linear layers and convolutions."""
    init_linear(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not module.weight.is_meta:
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def to_size(img_size: int | Sequence[int], name: str = "img_size") -> tuple[int, int]:
    """``(H, W)`` in pixels from a side or a pair of sides.

    Raises:
        ValueError: not one or two positive integers.
    """
    sides = (img_size, img_size) if isinstance(img_size, int | float) else tuple(img_size)
    if len(sides) != 2 or any(isinstance(s, bool) or int(s) != s or s < 1 for s in sides):
        raise ValueError(f"{name} must be a side in pixels or a pair (H, W), not {img_size!r}")
    return int(sides[0]), int(sides[1])


def check_image(x: Tensor, model: ImageBackbone) -> None:
    """Raise unless ``x`` is a batch of images the model can take; graphs are captured without the check."""
    if is_symbolic(x):
        return
    if x.ndim != 4 or x.shape[1] != model.in_chans:
        raise ValueError(f"expected images (B, {model.in_chans}, H, W), got a tensor of shape {tuple(x.shape)}")
    model.check_input_size(tuple(x.shape[2:]))


def map_of(x: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The map of a stage's result, which may hand more than it to the next stage."""
    return x[0] if isinstance(x, tuple) else x


class ImageBackbone(nn.Module):
    """Abstract image model: ``stem``, ``stages`` (each ``(B, C, H, W)`` to ``(B, C', H', W')``), ``norm`` and ``head``.

    A stage may give a tuple that begins with its map; the next one takes it whole.

    A skeleton sets them, `feature_info`, and the attributes below in its constructor, and says which input sizes it
    takes. Everything timm asks of a model follows. The last norm is ``norm``, on the NCHW map and part of
    `forward_features`, or is inside the head, as its authors have it; there is no ``norm`` unless a skeleton sets one.

    Attributes:
        num_classes, in_chans: classes of the head, channels of the image.
        num_features, head_hidden_size: channels of `forward_features`, width of the classifier's input.
        img_size: (H, W) the model was built for; it takes others unless a parameter depends on the grid.
        config: name and options it was created with, written by `mixzoo.create_model`.
        class_names: names of the classes, or None.
    """

    modality = "image"

    stem: nn.Module
    stages: nn.Sequential
    norm: nn.Module
    head: ImageHead

    def __init__(self, *, in_chans: int, num_classes: int, num_features: int, img_size: int | Sequence[int]):
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = num_features
        self.img_size = to_size(img_size)
        self.feature_info: list[dict] = []
        self.config: dict = {}
        self.class_names: list[str] | None = None
        self.norm = nn.Identity()

    @abstractmethod
    def check_input_size(self, img_size: tuple[int, int]) -> None:
        """Raise ValueError, naming the nearest valid sizes, unless images of this size can be taken."""

    @abstractmethod
    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resize every parameter that depends on the grid; before optimizer, DDP or compile."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The module that makes logits of pooled features."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, device=None, dtype=None) -> None:
        """A fresh classifier; 0 classes leave the features, ``global_pool=None`` keeps the pooling."""
        dd = get_device_dtype(self, device=device, dtype=dtype)
        self.head.reset(num_classes, global_pool, **dd)
        self.num_classes = num_classes
        self.class_names = None

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay besides vectors and biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("pos_embed")} | undecayed(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)`` to the last map ``(B, num_features, H', W')``, before the head."""
        if not torch.jit.is_scripting():
            check_image(x, self)
        return self.norm(map_of(self.stages(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map to logits, or to the classifier's input ``(B, head_hidden_size)``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after chosen stages.

        Args:
            x: images ``(B, in_chans, H, W)``.
            indices: stages, negative ones from the end; an int takes the last n, None all.
            norm: apply the last norm to the last stage's map.
            stop_early: skip the stages after the last one taken.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: leave out the final map.

        Returns:
            ``(final, maps)``, or the maps alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', not {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        check_image(x, self)
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                last_norm = norm and i == len(self.stages) - 1
                y = (self.norm(map_of(x)) if last_norm else map_of(x)).permute(0, 2, 3, 1)
                y = self.head.norm(y) if last_norm else y
                maps.append(y if output_fmt == "NHWC" else y.permute(0, 3, 1, 2))
        return maps if intermediates_only else (self.norm(map_of(x)), maps)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen maps do not need; returns the absolute indices of the stages taken."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.head.dim = self.feature_info[last]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()
            self.head.remove_norm()
            # a head may have another width behind its norm
            self.head_hidden_size = self.head.dim = self.num_features
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take
