"""Image classification as a `Task` of the training loop: transforms, mixing, losses, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ._data import EpochSampler, ImageData, TransformedImages
from ._runs import leave_signals_to_parent
from ._training import Loaders

# fewer classes make a top-5 accuracy meaningless
_TOP5_FROM = 10


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image, in this order.

    Attributes:
        affine: (degrees, shift, scale): rotation within +-degrees, shift within +-shift of the side, zoom within
            1 +- scale; None for none.
        crop: smallest share of the area that a random crop keeps; 1 for no cropping.
        flip: probability of a horizontal flip.
        policy: timm's name of an automatic augmentation, such as "rand-m9-mstd0.5-inc1"; "" for none.
        jitter: strength of the colour jitter where there is no policy.
        erase: probability that a random rectangle is erased.
    """

    affine: tuple[float, float, float] | None = None
    crop: float = 1.0
    flip: float = 0.0
    policy: str = ""
    jitter: float = 0.0
    erase: float = 0.0


@dataclass(frozen=True)
class Pixels:
    """How images become tensors: the model's channels and size, and the values it was or will be trained with."""

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def eval_transform(self) -> Callable:
        """PIL image to (channels, H, W), the same every time."""
        return create_transform(
            (self.channels, *self.size),
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
        )

    def train_transform(self, augmentation: Augmentation) -> Callable:
        """PIL image to (channels, H, W), augmented."""
        from torchvision.transforms import Compose, InterpolationMode, RandomAffine

        common = {"mean": self.mean, "std": self.std, "interpolation": self.interpolation}
        if augmentation.affine is not None:
            degrees, shift, scale = augmentation.affine
            *resize, to_tensor, normalize = create_transform(
                (self.channels, *self.size), is_training=True, no_aug=True, **common
            ).transforms
            # after resizing: a shift by a fraction of a small image's pixel would be lost
            affine = RandomAffine(degrees, (shift, shift), (1 - scale, 1 + scale), None, InterpolationMode.BILINEAR)
            return Compose([*resize, affine, to_tensor, normalize])
        return create_transform(
            (self.channels, *self.size),
            is_training=True,
            scale=(augmentation.crop, 1.0),
            ratio=(3 / 4, 4 / 3) if augmentation.crop < 1 else (1.0, 1.0),
            hflip=augmentation.flip,
            auto_augment=augmentation.policy or None,
            color_jitter=augmentation.jitter or None,
            re_prob=augmentation.erase,
            re_mode="pixel",
            **common,
        )


def make_loaders(
    data: ImageData,
    pixels: Pixels,
    augmentation: Augmentation,
    *,
    batch_size: int,
    workers: int,
    seed: int,
    processes: int,
) -> Loaders:
    """Batches of (images (B, channels, H, W), labels (B,)).

    Args:
        batch_size: of one process.
        processes: that share the data.
    """
    mode = "L" if pixels.channels == 1 else "RGB"
    options = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": leave_signals_to_parent,
    }

    def fixed(images) -> DataLoader:
        return DataLoader(TransformedImages(images, pixels.eval_transform(), mode), batch_size, **options)

    sampler = EpochSampler(len(data.train), seed)
    train = DataLoader(
        TransformedImages(data.train, pixels.train_transform(augmentation), mode),
        batch_size,
        sampler=sampler,
        drop_last=len(data.train) >= batch_size * processes,
        **options,
    )
    return Loaders(
        train=train,
        val=fixed(data.val),
        test=fixed(data.test) if data.test is not None else None,
        sampler=sampler,
        batch_size=batch_size,
        val_name=data.val_name,
    )


class Classification:
    """Cross-entropy with label smoothing, on images mixed by mixup and cutmix if asked for.

    Args:
        mixup, cutmix: parameter of the Beta distribution that the share of the mixed-in image is drawn from; 0 for off.
        smoothing: probability taken from the label and spread over all classes.
        aux_weight: weight of the loss of further classifiers, for models that in training stack their logits behind
            the main ones, ``(K, B, classes)``.
    """

    metric = "top1"
    higher_is_better = True
    items = "images"

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.0,
        aux_weight: float = 0.0,
    ):
        self.num_classes, self.smoothing, self.aux_weight = num_classes, smoothing, aux_weight
        self._mix = None
        if mixup or cutmix:
            self._mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)
        self._soft_loss = SoftTargetCrossEntropy()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and accuracy; of a mixed image the class with the larger share counts as right."""
        images, targets = batch
        # mixing pairs the batch with its reverse; an odd last batch, where none is dropped, stays as it is
        mixed = self._mix is not None and len(images) % 2 == 0
        if mixed:
            images, targets = self._mix(images, targets)
        logits = model(images)  # (B, classes), or (K, B, classes)
        main, *others = logits if logits.ndim == 3 else (logits,)
        loss = self._cross_entropy(main, targets)
        for further in others:
            loss = loss + self.aux_weight * self._cross_entropy(further, targets)
        labels = targets.argmax(1) if mixed else targets
        return loss, {"top1": (main.detach().argmax(1) == labels).float().mean() * 100}

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss for labels ``(B,)`` or, smoothed already, shares ``(B, classes)``."""
        if targets.ndim == 2:
            return self._soft_loss(logits.float(), targets)
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.smoothing)

    def measure(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Loss, label and rank of the label among the classes (0: the model's first choice), each (B,)."""
        images, labels = batch
        logits = model(images).float()  # (B, classes)
        own = logits.gather(1, labels[:, None])
        classes = torch.arange(logits.shape[1], device=logits.device)
        # equal logits rank by index, as argmax has it: a model that tells nothing apart is not right everywhere
        ahead = (logits > own) | ((logits == own) & (classes < labels[:, None]))
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "label": labels,
            "rank": torch.where(logits.isnan().any(1), self.num_classes, ahead.sum(1)),
        }

    def summarize(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean loss, accuracy in percent, top-5 accuracy from ten classes on."""
        rank = measured["rank"]
        values = {"loss": measured["loss"].double().mean().item(), "top1": _percent(rank == 0)}
        return values | ({"top5": _percent(rank < 5)} if self.num_classes >= _TOP5_FROM else {})

    def describe(self, values: Mapping[str, float]) -> str:
        parts = [f"loss {values['loss']:.3f}"]
        parts += [f"top-{k} {values[f'top{k}']:.2f} %" for k in (1, 5) if f"top{k}" in values]
        return ", ".join(parts)


def _percent(right: Tensor) -> float:
    return right.double().mean().item() * 100


def per_class(measured: Mapping[str, Tensor], names: list[str]) -> list[tuple[str, int, float]]:
    """(class, images, top-1 in percent) for every class that occurs."""
    rank, label = measured["rank"], measured["label"]
    rows = []
    for index, name in enumerate(names):
        of_class = rank[label == index]
        if len(of_class):
            rows.append((name, len(of_class), _percent(of_class == 0)))
    return rows
