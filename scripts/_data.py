"""Images to train on, from three kinds of source, in one form.

    digits           scikit-learn's 1,797 real handwritten digits, 8x8; nothing is downloaded
    DIR              folders in ImageFolder layout: DIR/train/<class>/*, DIR/val/<class>/* and/or DIR/test/<class>/*,
                     or only DIR/<class>/*
    torch/NAME       a data set of torchvision, as timm names it (torch/cifar10)
    hfds/NAME        a data set of the Hugging Face hub, through timm

Where a source has one split only, part of it is held out: the same number of images of every class (as far as it goes),
always the same ones, whatever the seed of the run.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler, Subset

DIGITS = "digits"
_TRAIN_FOLDERS = ("train", "training")
_VAL_FOLDERS = ("val", "valid", "validation")
_TEST_FOLDERS = ("test", "testing")
_STREAMS = ("tfds", "wds", "hfids")
# one split for all runs: a model tuned from a run's checkpoint must not meet that run's held-out images in training
_SPLIT_SEED = 0
_HELD_OUT = 0.2


@dataclass(frozen=True)
class ImageData:
    """Splits of labelled images.

    Attributes:
        name: what to call it, without separators.
        train, val: data sets of (PIL image, label); ``val`` is measured after every epoch.
        val_name: what the source calls ``val``.
        test: a third split, measured once at the end, or None.
        class_names: name of every label.
        channels: 1 for grey images, 3 for colour.
        size: (H, W) of a typical image.
        note: a sentence for the user about how the splits came about.
    """

    name: str
    train: Dataset
    val: Dataset
    val_name: str
    test: Dataset | None
    class_names: list[str]
    channels: int
    size: tuple[int, int]
    note: str = ""


class ArrayImages(Dataset):
    """Images held in memory: ``pixels`` (N, H, W) or (N, H, W, 3), uint8."""

    def __init__(self, pixels: np.ndarray, targets: Sequence[int]):
        self.pixels = pixels
        self.targets = [int(t) for t in targets]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), self.targets[index]


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's random numbers start from ``seed`` inside and are as before afterwards."""
    python, numpy, generator = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the transforms draw from the global generator
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(generator)


def seed_of(*parts: int) -> int:
    """A 32-bit seed that depends on every part."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class TransformedImages(Dataset):
    """Images of a data set as tensors: item ``index``, or ``(index, seed)`` with the transform's draws fixed by it.

    Args:
        mode: PIL mode the images are brought to, "L" or "RGB".
    """

    def __init__(self, images: Dataset, transform: Callable[[Image.Image], torch.Tensor], mode: str):
        self.images, self.transform, self.mode = images, transform, mode

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        index, seed = item if isinstance(item, tuple) else (item, None)
        image, label = self.images[index]
        image = image.convert(self.mode)
        if seed is None:
            return self.transform(image), label
        with drawing_from(seed):
            return self.transform(image), label


class EpochSampler(Sampler[tuple[int, int]]):
    """Every item once in an order drawn for the epoch, each as ``(index, seed)``.

    Order and seeds are functions of (seed, epoch) alone, so workers, interruptions and earlier epochs change nothing.

    Attributes:
        epoch: the epoch to draw for.
        start: items at the front to leave out, because a run goes on in the middle of an epoch.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.length - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order, seeds = rng.permutation(self.length), rng.integers(2**32, size=self.length)
        yield from zip(order[self.start :].tolist(), seeds[self.start :].tolist(), strict=True)


def stratified_holdout(targets: Sequence[int], fraction: float = _HELD_OUT) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out: of each class ``fraction``, rounded; a class keeps one to train on."""
    rng = np.random.default_rng(_SPLIT_SEED)
    targets = np.asarray(targets)
    kept, held = [], []
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        cut = min(round(len(members) * fraction), len(members) - 1)
        held.extend(members[:cut].tolist())
        kept.extend(members[cut:].tolist())
    if not held:
        raise ValueError(f"--data: {len(targets)} images are too few to hold some out; give a val or test split")
    return sorted(kept), sorted(held)


def load_images(source: str, *, data_dir: str | None = None, download: bool = False) -> ImageData:
    """Open ``source`` (see the module's text).

    Args:
        data_dir: where the files of ``torch/...`` are, or the cache of ``hfds/...``.
        download: fetch files of ``torch/...`` that are not there.

    Raises:
        ValueError: nothing usable there; the message names the source and what it should be.
    """
    prefix, slash, _ = source.partition("/")
    if source == DIGITS:
        return _digits()
    # an existing folder wins over a name with a prefix, "torch/photos" may be both
    if Path(source).is_dir():
        return _folder(Path(source))
    if slash and prefix.lower() in _STREAMS:
        raise ValueError(
            f"--data {source}: streamed data sets ({', '.join(s + '/' for s in _STREAMS)}) are not supported; "
            "use hfds/NAME, torch/NAME, or export the images to folders"
        )
    if slash and prefix.lower() in ("torch", "hfds"):
        return _named(source, prefix.lower(), data_dir, download)
    raise ValueError(f"--data {source}: no such folder; give a folder, torch/NAME, hfds/NAME or {DIGITS}")


def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("--data digits needs scikit-learn: pip install 'mixzoo[digits]'") from None
    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)  # (N, 8, 8)
    images = ArrayImages(pixels, bunch.target)
    kept, held = stratified_holdout(images.targets)
    return ImageData(
        name=DIGITS,
        train=Subset(images, kept),
        val=Subset(images, held),
        val_name="test",
        test=None,
        class_names=[str(name) for name in bunch.target_names],
        channels=1,
        size=(8, 8),
        note="20 % of every digit are held out as the test split",
    )


def _subfolder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _open_image(path: str) -> Image.Image:
    try:
        with open(path, "rb") as file:
            image = Image.open(file)
            image.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all of them for damaged files
        raise OSError(f"--data: image {path} cannot be read: {error}") from None
    return image


def _image_folder(root: Path, class_to_idx: dict[str, int] | None = None) -> Dataset:
    """Images of ``root``/<class>/**, labelled by ``class_to_idx`` if given."""
    from torchvision.datasets import ImageFolder

    try:
        images = ImageFolder(str(root), loader=_open_image)
    except (FileNotFoundError, OSError) as error:
        raise ValueError(
            f"--data: {root} is not in ImageFolder layout ({root.name}/<class>/<image>): {error}"
        ) from None
    if class_to_idx is not None and images.class_to_idx != class_to_idx:
        unknown = sorted(set(images.classes) - set(class_to_idx))
        if unknown:
            raise ValueError(f"--data: {root} has classes that the training split lacks: {', '.join(unknown)}")
        labels = [class_to_idx[images.classes[t]] for t in images.targets]
        images.samples = [(path, label) for (path, _), label in zip(images.samples, labels, strict=True)]
        images.targets = labels
    return images


def _folder(root: Path) -> ImageData:
    train, val, test = (_subfolder(root, names) for names in (_TRAIN_FOLDERS, _VAL_FOLDERS, _TEST_FOLDERS))
    if train is None and (val or test):
        raise ValueError(f"--data {root}: there is {(val or test).name} but no train folder")
    images = _image_folder(train or root)
    names, labels = list(images.classes), dict(images.class_to_idx)
    if len(names) < 2:
        raise ValueError(f"--data {train or root}: one class only ({names[0]}); classification needs two")
    splits = [_image_folder(folder, labels) for folder in (val, test) if folder]
    size, channels = _survey(images)
    val_name, note = (val or test).name if splits else "held-out", ""
    if not splits:
        kept, held = stratified_holdout(images.targets)
        images, splits = Subset(images, kept), [Subset(images, held)]
        note = f"no val or test folder: {len(held)} of {len(kept) + len(held)} images (20 % of each class) are held out"
    return ImageData(
        name=root.resolve().name,
        train=images,
        val=splits[0],
        val_name=val_name,
        test=splits[1] if len(splits) == 2 else None,
        class_names=names,
        channels=channels,
        size=size,
        note=note,
    )


def _survey(images: Dataset, look_at: int = 16) -> tuple[tuple[int, int], int]:
    """Median (H, W) and channels of some images, spread evenly."""
    picked = [images[i][0] for i in np.linspace(0, len(images) - 1, min(look_at, len(images))).astype(int).tolist()]
    width, height = (int(np.median([image.size[axis] for image in picked])) for axis in (0, 1))
    return (height, width), 1 if all(image.mode in ("1", "L", "I", "I;16", "F") for image in picked) else 3


def _named(source: str, kind: str, data_dir: str | None, download: bool) -> ImageData:
    if kind == "torch":
        train = _timm_split(source, "train", data_dir or "data", download)
        val, val_name = _timm_split(source, "validation", data_dir or "data", download), "test"
    else:
        train = _timm_split(source, "train", data_dir, False)
        val, val_name = _hub_val_split(source, data_dir)
    names = _class_names(source, train)
    size, channels = _survey(train)
    note = ""
    if val is None:
        kept, held = stratified_holdout(_targets(train))
        train, val, val_name = Subset(train, kept), Subset(train, held), "held-out"
        note = f"no validation or test split: {len(held)} images (20 % of each class) are held out"
    name = source.replace("/", "-")
    return ImageData(name, train, val, val_name, None, names, channels, size, note)


def _timm_split(source: str, split: str, data_dir: str | None, download: bool) -> Dataset:
    from timm.data import create_dataset

    options = {"download": download} if source.lower().startswith("torch/") else {}
    try:
        # images stay in their own mode, so that grey ones are noticed
        return create_dataset(source, root=data_dir, split=split, input_img_mode=None, **options)
    except ImportError:
        raise ValueError(f"--data {source} needs the package 'datasets': pip install datasets") from None
    except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = "; --download fetches it, --data-dir says where it is" if source.lower().startswith("torch/") else ""
        raise ValueError(f"--data {source}, split {split}: {reason}{advice}") from None


def _hub_val_split(source: str, data_dir: str | None) -> tuple[Dataset | None, str]:
    for split in ("validation", "test"):
        try:
            return _timm_split(source, split, data_dir, False), split
        except ValueError as error:
            if "nknown split" not in str(error):
                raise
    return None, ""


def _targets(images: Dataset) -> list[int]:
    reader = getattr(images, "reader", None)
    return list(images.targets if reader is None else reader.iter_targets())


def _class_names(source: str, images: Dataset) -> list[str]:
    """Names from the data set where it has them, else the labels as text."""
    reader = getattr(images, "reader", None)
    if reader is not None and reader.class_to_idx:
        return [name for name, _ in sorted(reader.class_to_idx.items(), key=lambda pair: pair[1])]
    if reader is None and getattr(images, "classes", None):
        return [str(name) for name in images.classes]
    labels = _targets(images)
    if not labels or not all(isinstance(label, int) for label in labels):
        raise ValueError(f"--data {source}: labels must be whole numbers from 0")
    return [str(label) for label in range(max(labels) + 1)]
