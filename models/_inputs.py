"""Inputs that a model can take, made up from its attributes: for counting, timing and tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor


def example_inputs(
    model: nn.Module,
    batch: int = 1,
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    size: int | Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Random inputs of a registered model by the names of its forward's arguments.

    Args:
        model: a model of the zoo; its attribute ``modality`` is "image", "text" or "series".
        batch: samples.
        device, dtype: of the inputs, default the model's; words are integers whatever the dtype.
        size: a side or (H, W) of images, tokens of texts; default the model's own. Series have one size.

    Raises:
        ValueError: another modality, or a size for series.

    >>> {name: tuple(x.shape) for name, x in example_inputs(mixzoo.create_model("fnet_base"), 2, size=77).items()}
    {'input_ids': (2, 77)}
    """
    modality = getattr(model, "modality", None)
    if modality not in _MAKERS:
        raise ValueError(f"model has modality {modality!r}; inputs are known for {', '.join(_MAKERS)}")
    first = next(model.parameters(), torch.empty(0))
    placement = {"device": first.device if device is None else device, "dtype": dtype or first.dtype}
    return _MAKERS[modality](model, batch, placement, size)


def _image(model: nn.Module, batch: int, placement: dict[str, Any], size: int | Sequence[int] | None) -> dict:
    sides = model.img_size if size is None else (size, size) if isinstance(size, int) else size
    return {"x": torch.randn(batch, model.in_chans, *sides, **placement)}


def _text(model: nn.Module, batch: int, placement: dict[str, Any], size: int | Sequence[int] | None) -> dict:
    length = model.max_length if size is None else size if isinstance(size, int) else size[0]
    # two sequences a sample, where these are compared
    shape = (batch, 2, length) if model.head_kind == "pairs" else (batch, length)
    words = torch.randint(model.vocab_size, shape, device=placement["device"])
    other = (model.pad_token_id + 1) % model.vocab_size
    return {"input_ids": words.masked_fill(words == model.pad_token_id, other)}


def _series(model: nn.Module, batch: int, placement: dict[str, Any], size: int | Sequence[int] | None) -> dict:
    if size is not None:
        raise ValueError(f"series models have one size; create the model with another context_length, not size={size}")
    inputs = {"past_values": torch.randn(batch, model.context_length, model.num_channels, **placement)}
    if "past_time_features" in model.forward_inputs:
        # between 0 and 4, which calendar fields of any kind can be too
        inputs["past_time_features"] = 4 * torch.rand(batch, model.context_length, model.num_marks, **placement)
    return inputs


_MAKERS: dict[str, Callable] = {"image": _image, "text": _text, "series": _series}
