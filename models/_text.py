"""Parts of text encoders: embeddings, pooling, heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..mixers._layers import Linear, make_activation


class PositionTable(nn.Module):
    """A learned vector for every position, extended by repetition, as PoNet's authors do for long texts.

    Args:
        max_length: positions. dim: channels C.
    """

    def __init__(self, max_length: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(max_length, dim, device=device, dtype=dtype))

    @property
    def grid_size(self) -> tuple[int]:
        """The number of positions."""
        return (self.weight.shape[0],)

    @staticmethod
    def grid_of_state(state: dict[str, Tensor]) -> tuple[int]:
        """The number of positions of a state dict."""
        return (state["weight"].shape[0],)

    @staticmethod
    def resize_grid_state(state: dict[str, Tensor], old: Sequence[int], new: Sequence[int]) -> dict[str, Tensor]:
        """The state dict for another number of positions: row n is row n modulo the old number."""
        rows = torch.arange(new[0], device=state["weight"].device) % old[0]
        return {**state, "weight": state["weight"][rows]}

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Repeat the table, or cut it."""
        state = self.resize_grid_state({"weight": self.weight.data}, self.grid_size, grid_size)
        self.weight = nn.Parameter(state["weight"], requires_grad=self.weight.requires_grad)

    def forward(self, length: int) -> Tensor:
        return self.weight[:length]  # (N, C)


class TextEmbedding(nn.Module):
    """Sum of word, position and type embeddings, then norm, linear layer and dropout, as far as there are any.

    Args:
        vocab_size, max_length, type_vocab_size: rows of the three tables; without types there is no third.
        dim: channels C.
        zero_row: word whose vector is zero at first and gets no gradient, None for none.
        norm_eps: of a layer norm of the sum; None for no norm.
        proj: a linear layer C to C after it.
        drop: dropout at the end.

    Shapes: ids ``(B, N)``, or vectors in place of the words' ``(B, N, C)``, to ``(B, N, C)``.
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        type_vocab_size: int,
        dim: int,
        *,
        zero_row: int | None = None,
        norm_eps: float | None = None,
        proj: bool = False,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.word = nn.Embedding(vocab_size, dim, padding_idx=zero_row, **dd)
        self.position = PositionTable(max_length, dim, **dd)
        self.token_type = nn.Embedding(type_vocab_size, dim, **dd) if type_vocab_size else None
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.proj = Linear(dim, dim, **dd) if proj else nn.Identity()
        self.drop = nn.Dropout(drop)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
        x = self.word(input_ids) if inputs_embeds is None else inputs_embeds
        place = self.position(x.shape[1])  # (N, C)
        if self.token_type is not None:
            place = place + (self.token_type.weight[0] if token_type_ids is None else self.token_type(token_type_ids))
        return self.drop(self.proj(self.norm(x + place)))


class Pooler(nn.Module):
    """tanh of a linear layer of the first token: ``(B, N, C) -> (B, C)``."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.fc = Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.tanh(self.fc(x[:, 0]))


class MeanPool(nn.Module):
    """Mean over the tokens: ``(B, N, C) -> (B, C)``.

    Args:
        valid: over the valid ones; otherwise over all, of which padding may be zero.
    """

    def __init__(self, valid: bool):
        super().__init__()
        self.valid = valid

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None or not self.valid:
            return x.mean(1)
        # half precision may not hold the sum of a long text
        valid = mask.to(torch.promote_types(x.dtype, torch.float32))
        shares = (valid / valid.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)
        return torch.einsum("bn,bnc->bc", shares, x)


class ClassHead(nn.Module):
    """Dropout, a hidden layer with ReLU if there is one, and the classifier: ``(..., C) -> (..., classes)``.

    Args:
        num_classes: 0 gives back the input.
        hidden: width of the hidden layer, None for none.
    """

    def __init__(
        self, dim: int, num_classes: int, *, hidden: int | None = None, drop: float = 0.0, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.drop = nn.Dropout(drop)
        self.hidden = Linear(dim, hidden, **dd) if hidden and num_classes else None
        width = dim if self.hidden is None else hidden
        self.fc = Linear(width, num_classes, **dd) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        return self.fc(x if self.hidden is None else torch.relu(self.hidden(x)))


class MaskedLMHead(nn.Module):
    """Linear layer, activation and layer norm, then scores of the words: ``(..., C) -> (..., vocab_size)``.

    Args:
        act: activation, see `make_activation`.
        tied: the words' scores are products with their embeddings; otherwise with a matrix of its own.
    """

    def __init__(
        self, dim: int, vocab_size: int, *, act: str, norm_eps: float, tied: bool = True, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc = Linear(dim, dim, **dd)
        self.act = make_activation(act, **dd)
        self.norm = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.decoder = None if tied else Linear(dim, vocab_size, bias=False, **dd)
        self.bias = nn.Parameter(torch.zeros(vocab_size, **dd))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Scores of tokens ``x``; ``words`` is the table (vocab_size, C) of the embeddings."""
        x = self.norm(self.act(self.fc(x)))
        return F.linear(x, words if self.decoder is None else self.decoder.weight, self.bias)


class PretrainingOutput(NamedTuple):
    """Scores of the words ``(B, N, vocab_size)``, and of the relation of two parts of the text ``(B, classes)``."""

    logits: Tensor
    relation_logits: Tensor


def pair_features(pooled: Tensor) -> Tensor:
    """Two sequences beside each other: ``(2 B, C) -> (B, 4 C)``, the vectors a and b, a b and a - b."""
    a, b = pooled.unflatten(0, (-1, 2)).unbind(1)  # 2 x (B, C)
    return torch.cat([a, b, a * b, a - b], -1)
