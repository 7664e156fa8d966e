"""TextEncoder: embeddings, then blocks of one width over a sequence of tokens, then a head.

Papers: arXiv:1810.04805 (the shape), arXiv:2105.03824 (FNet), arXiv:2110.02442 (PoNet), arXiv:2011.04006 (Long Range
Arena).

    ids: (B, N) -> words + positions + types -> depth blocks on (B, N, C) -> norm -> head

Heads, by name:

    classification   one vector for the sequence to classes                           (B, num_classes)
    tokens           every token to classes                                           (B, N, num_classes)
    pairs            two sequences to classes, by their vectors a, b, a b and a - b   (B, num_classes)
    mlm              every token to scores of the words                               (B, N, vocab_size)
    pretraining      mlm, and the relation of two parts of the text by one vector     `PretrainingOutput`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.layers import calculate_drop_path_rates
from torch import Tensor

from ..mixers import CHANNEL_MIXERS, TOKEN_MIXERS
from ..mixers._layers import is_symbolic, undecayed
from ..mixers._registry import split_spec
from ._text import (
    ClassHead,
    MaskedLMHead,
    MeanPool,
    Pooler,
    PretrainingOutput,
    TextEmbedding,
    pair_features,
)
from .block import MetaFormerBlock
from .isotropic import _specs

HEADS = ("classification", "tokens", "pairs", "mlm", "pretraining")
POOLS = ("first", "mean", "mean_padded")
DROPOUTS = ("embed", "token", "channel", "hidden", "head")


def init_normal(module: nn.Module) -> None:
    """Normal weights (std 0.02) and zero biases on linear layers and embeddings, as BERT has it."""
    init_embedding(module)
    if isinstance(module, nn.Linear) and not module.weight.is_meta:
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_embedding(module: nn.Module) -> None:
    """`init_normal` on embeddings alone; linear layers keep torch's values."""
    if isinstance(module, nn.Embedding) and not module.weight.is_meta:
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx] = 0


class TextEncoder(nn.Module):
    """Blocks of one width over tokens, with any registered mixers.

    Args:
        vocab_size: words. type_vocab_size: token types, 0 for none.
        max_length: longest sequence; mixers with a fixed grid take this length alone. See `set_input_size`.
        pad_token_id: the word that fills up shorter sequences.
        special_ids: words that separate segments, such as [CLS] and [SEP], for mixers with segments.
        derive_mask: without an attention mask, words other than ``pad_token_id`` are valid; otherwise all are.
        zero_pad: the padding word's vector is zero and stays so.
        head, num_classes: see the head of this module. Without a head, "classification" where ``num_classes`` is given,
            else "pretraining", or "mlm" where ``relation_classes`` is 0. 0 classes give the vector itself.
        relation_classes: classes of the second part of the head "pretraining".
        head_hidden: width of a hidden layer of the classifier, None for none.
        tie_embeddings: the head "mlm" scores words by their embeddings.
        pool: the vector of a sequence: "first", a linear layer and tanh of the first token, "mean", over valid tokens,
            or "mean_padded", over all.
        dim, depth: channels C and number of blocks.
        token_mixer, channel_mixer: a name, ``(name, {options})``, or a list with one of these for every block.
        act: activation inside the mixers, of those that leave the choice, and of the head "mlm"; see `make_activation`.
        norm, norm_eps, layer_scale, post_norm: of the blocks, see `MetaFormerBlock`.
        embed_norm, embed_proj, final_norm: layer norm and linear layer after the embeddings, layer norm after the last
            block.
        mask_output: padding is zero after the last norm.
        drop_rate: dropout in the places that ``dropout_in`` names: "embed", "token" and "channel" (results of the
            mixers), "hidden" (inside mixers with an option ``drop``) and "head".
        drop_path_rate: grows linearly over the blocks.
        init: draws the initial values, applied to every module.

    Inputs of `forward`, all but ``input_ids`` optional; for the head "pairs" every shape (B, N) is (B, 2, N):
        input_ids: (B, N). inputs_embeds: (B, N, C), in place of the words' vectors.
        attention_mask: (B, N), 0 at padding. Mixers that cannot honour it mix padding in; a warning tells so once.
        token_type_ids: (B, N), default 0.
        segment_ids: (B, N), numbers of segments from 0; default: a segment for every run of words between
            ``special_ids`` and for every one of these, or what the mixer does without.
        special_mask: (B, N), true at separators; default: where ``input_ids`` are ``special_ids``.
    """

    modality = "text"
    # modules that not every head has; see `load_checkpoint`
    optional_parts = ("pooler", "mlm", "relation", "head")
    # key of an untied model -> key whose values it has otherwise
    tied_keys = {"mlm.decoder.weight": "embed.word.weight", "mlm.decoder.bias": "mlm.bias"}  # noqa: RUF012

    def __init__(
        self,
        *,
        vocab_size: int = 512,
        type_vocab_size: int = 0,
        max_length: int = 512,
        pad_token_id: int = 0,
        special_ids: Sequence[int] = (),
        derive_mask: bool = False,
        zero_pad: bool = True,
        head: str | None = None,
        num_classes: int | None = None,
        relation_classes: int = 0,
        head_hidden: int | None = None,
        tie_embeddings: bool = True,
        pool: str = "first",
        dim: int = 768,
        depth: int = 12,
        token_mixer: Any = "pooling",
        channel_mixer: Any = "mlp",
        act: str = "gelu",
        norm: str = "layer",
        norm_eps: float = 1e-12,
        layer_scale: float | None = None,
        post_norm: bool = True,
        embed_norm: bool = True,
        embed_proj: bool = False,
        final_norm: bool = False,
        mask_output: bool = False,
        drop_rate: float = 0.1,
        dropout_in: Sequence[str] = ("embed", "token", "channel", "head"),
        drop_path_rate: float = 0.0,
        init: Callable[[nn.Module], None] = init_normal,
        device=None,
        dtype=None,
    ):
        counts = {"vocab_size": vocab_size, "max_length": max_length, "dim": dim, "depth": depth}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        unknown = set(dropout_in) - set(DROPOUTS)
        if pool not in POOLS or unknown:
            raise ValueError(f"pool must be one of {POOLS}, not {pool!r}, and dropout_in some of {DROPOUTS}")
        super().__init__()
        drops = {place: drop_rate if place in dropout_in else 0.0 for place in DROPOUTS}
        self.vocab_size, self.max_length, self.pad_token_id = vocab_size, max_length, pad_token_id
        self.special_ids, self.derive_mask, self.mask_output = tuple(special_ids), derive_mask, mask_output
        self.num_features, self.pool, self.tie_embeddings = dim, pool, tie_embeddings
        self.config: dict = {}
        self.class_names: list[str] | None = None
        self._head_options = {"hidden": head_hidden, "drop": drops["head"]}
        self._mlm_options = {"act": act, "norm_eps": norm_eps}
        self._relation_classes, self._init, self._warned = relation_classes, init, False

        dd = {"device": device, "dtype": dtype}
        tables = (vocab_size, max_length, type_vocab_size, dim)
        eps = norm_eps if embed_norm else None
        zero_row = pad_token_id if zero_pad else None
        self.embed = TextEmbedding(*tables, zero_row=zero_row, norm_eps=eps, proj=embed_proj, drop=drops["embed"], **dd)
        defaults = {"drop": drops["hidden"], "act": act}
        token_specs = _specs(TOKEN_MIXERS, token_mixer, depth, defaults, "token_mixer")
        channel_specs = _specs(CHANNEL_MIXERS, channel_mixer, depth, defaults, "channel_mixer")
        self._mixer_names = sorted({split_spec(spec)[0] for spec in token_specs})
        self._bound = any(map(TOKEN_MIXERS.needs_grid, token_specs)) or any(
            map(CHANNEL_MIXERS.needs_grid, channel_specs)
        )
        common = {"rank": 1, "grid_size": (max_length,), "norm": norm, "norm_eps": norm_eps, "layer_scale": layer_scale}
        common |= {"post_norm": post_norm, "drop": (drops["token"], drops["channel"])}
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            MetaFormerBlock(dim, token_mixer=token, channel_mixer=channel, drop_path=rate, **common, **dd)
            for token, channel, rate in zip(token_specs, channel_specs, rates, strict=True)
        )
        self._extra_inputs = {name for block in self.blocks for names in block.extra_inputs for name in names}
        self.norm = nn.LayerNorm(dim, eps=norm_eps, **dd) if final_norm else nn.Identity()
        nn.init.normal_(self.embed.position.weight, std=0.02)
        self.apply(init)
        self._set_head(head, num_classes, **dd)

    def _set_head(self, head: str | None, num_classes: int | None, device=None, dtype=None) -> None:
        """Fresh parts for a head, those that the present one has are kept."""
        if head is None:
            without = "pretraining" if self._relation_classes else "mlm"
            head = without if num_classes is None else "classification"
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, not {head!r}")
        lm = head in ("mlm", "pretraining")
        if lm and num_classes is not None:
            raise ValueError(f"the head {head!r} has no classes; leave num_classes={num_classes} out")
        if head == "pretraining" and not self._relation_classes:
            raise ValueError("the head 'pretraining' needs relation_classes; use 'mlm'")
        num_classes = 2 if num_classes is None and not lm else num_classes
        if not lm and (isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0):
            raise ValueError(f"num_classes must be 0 or a positive integer, not {num_classes!r}")
        dd = {"device": device, "dtype": dtype}
        dim, pooled = self.num_features, head not in ("mlm", "tokens")
        self.head_kind, self.num_classes = head, num_classes
        made = {
            "pooler": pooled and (Pooler(dim, **dd) if self.pool == "first" else MeanPool(self.pool == "mean")),
            "mlm": lm and MaskedLMHead(dim, self.vocab_size, tied=self.tie_embeddings, **self._mlm_options, **dd),
            "relation": head == "pretraining" and nn.Linear(dim, self._relation_classes, **dd),
            "head": not lm and ClassHead(4 * dim if head == "pairs" else dim, num_classes, **self._head_options, **dd),
        }
        for name, module in made.items():
            kept = getattr(self, name, None) if module and name != "head" else None
            setattr(self, name, kept or (module.apply(self._init) if module else None))
        self.train(self.training)

    def get_classifier(self) -> nn.Module | None:
        """The last linear layer of the classifier; None where the head has no classes."""
        return None if self.head is None else self.head.fc

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay besides vectors and biases."""
        return undecayed(self)

    def reset_classifier(self, num_classes: int, head: str | None = None) -> None:
        """New classifier, of the present kind or of another; of a head without classes it becomes "classification"."""
        present = self.head_kind if self.head is not None else "classification"
        word = self.embed.word.weight
        self._set_head(head or present, num_classes, device=word.device, dtype=word.dtype)

    def untie(self) -> None:
        """Give the head "mlm" a matrix of its own, with the values of the words' embeddings."""
        word = self.embed.word.weight
        if self.mlm is not None and self.mlm.decoder is None:
            self.mlm.decoder = nn.Linear(*reversed(word.shape), bias=False, device=word.device, dtype=word.dtype)
            with torch.no_grad():
                self.mlm.decoder.weight.copy_(word)
        self.tie_embeddings = False

    def takes(self, length: int) -> bool:
        """Whether sequences of this length can be given; after `set_input_size` they can."""
        return length == self.max_length or (length < self.max_length and not self._bound)

    def set_input_size(self, length: int) -> None:
        """Make this the longest sequence: positions are repeated or cut, mixers with a fixed grid resized.

        Must run before the optimizer, DDP or `torch.compile` sees the parameters.
        """
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"length must be a positive integer, not {length!r}")
        self.embed.position.set_grid_size((length,))
        for block in self.blocks:
            block.set_grid_size((length,))
        self.max_length = length

    def forward_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        special_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens after the last norm, ``(B, N, C)``, padding included."""
        self._check(input_ids, inputs_embeds, token_type_ids, segment_ids, special_mask)
        mask = self._valid(input_ids, attention_mask)
        extras = self._extras(input_ids, mask, segment_ids, special_mask)
        x = self.embed(input_ids, inputs_embeds, token_type_ids)  # (B, N, C)
        for block in self.blocks:
            x = block(x, extras)
        x = self.norm(x)
        return x.masked_fill(~mask.unsqueeze(-1), 0) if self.mask_output and mask is not None else x

    def forward_head(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor | PretrainingOutput:
        """The head's result for the tokens of `forward_features`."""
        if self.head_kind == "tokens":
            return self.head(x)
        scores = None if self.mlm is None else self.mlm(x, self.embed.word.weight)
        if self.head_kind == "mlm":
            return scores
        pooled = self.pooler(x, None if attention_mask is None else attention_mask.bool())  # (B, C)
        if self.head_kind == "pretraining":
            return PretrainingOutput(scores, self.relation(pooled))
        return self.head(pair_features(pooled) if self.head_kind == "pairs" else pooled)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        special_mask: Tensor | None = None,
    ) -> Tensor | PretrainingOutput:
        inputs = (input_ids, attention_mask, token_type_ids, segment_ids, inputs_embeds, special_mask)
        if self.head_kind == "pairs":
            inputs = tuple(None if t is None else _unpaired(t) for t in inputs)
        x = self.forward_features(*inputs)
        return self.forward_head(x, self._valid(inputs[0], inputs[1]))

    def _check(self, ids, embeds, types, segments, special) -> None:
        """Raise unless these are inputs the model can take; graphs are captured without the check."""
        if (ids is None) == (embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = ids if embeds is None else embeds
        if is_symbolic(x):
            return
        wanted = "input_ids (B, N)" if embeds is None else f"inputs_embeds (B, N, {self.num_features})"
        if x.ndim != 2 + (embeds is not None) or x.shape[2:] not in ((), (self.num_features,)):
            raise ValueError(f"expected {wanted}, got a tensor of shape {tuple(x.shape)}")
        length = x.shape[1]
        if not self.takes(length):
            most = f"{'exactly' if self._bound else 'at most'} {self.max_length}"
            raise ValueError(
                f"the sequence has {length} tokens, the model takes {most}: create it with "
                f"max_length={length}, or call set_input_size({length}) first"
            )
        if types is not None and self.embed.token_type is None:
            raise ValueError("token_type_ids were given, but the model has no token types")
        for name, given, key in (("segment_ids", segments, "segments"), ("special_mask", special, "special")):
            if given is not None and key not in self._extra_inputs:
                raise ValueError(f"{name} was given, but no mixer of the model uses it: {', '.join(self._mixer_names)}")
        if segments is not None and segments.numel() and not segments.is_meta and int(segments.min()) < 0:
            raise ValueError(f"segment_ids must not be negative; the smallest is {int(segments.min())}")

    def _valid(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """Which tokens are valid, ``(B, N)``; None where all are."""
        if attention_mask is not None:
            mask = attention_mask.bool()
        elif self.derive_mask and input_ids is not None:
            mask = input_ids != self.pad_token_id
        else:
            return None
        return None if not is_symbolic(mask) and not mask.is_meta and bool(mask.all()) else mask

    def _extras(self, ids, mask, segments, special) -> dict[str, Tensor]:
        """What the mixers take besides the tokens."""
        if ids is not None and self.special_ids and special is None:
            special = (ids.unsqueeze(-1) == torch.tensor(self.special_ids, device=ids.device)).any(-1)
        if segments is None and special is not None:
            segments = segments_between(special)
        elif segments is not None and not is_symbolic(segments) and segments.numel() and not segments.is_meta:
            segments = ranks(segments) if int(segments.max()) >= segments.shape[1] else segments
        if mask is not None:
            self._warn_of_padding(mask)
        extras = {"mask": mask, "segments": segments, "special": special}
        return {key: t for key, t in extras.items() if t is not None and key in self._extra_inputs}

    def _warn_of_padding(self, mask: Tensor) -> None:
        deaf = [name for name in self._mixer_names if not TOKEN_MIXERS[name].honours_mask]
        if not deaf or self._warned or is_symbolic(mask):
            return
        self._warned = True
        warnings.warn(
            f"the batch is padded, and the token mixer {', '.join(deaf)} mixes padding into every token: results "
            "depend on the padded length; pad training and evaluation alike",
            stacklevel=4,
        )


def segments_between(special: Tensor) -> Tensor:
    """Numbers of segments ``(B, N)``: one for every special token, and one for every run of tokens between them."""
    before = torch.cat([torch.zeros_like(special[:, :1]), special[:, :-1]], 1)
    starts = special.bool() | before.bool()
    return starts.long().cumsum(1) - starts[:, :1].long()


def ranks(segments: Tensor) -> Tensor:
    """The same segments ``(B, N)`` by numbers below N."""
    values, order = segments.sort(1)
    steps = (values[:, 1:] != values[:, :-1]).long()
    dense = torch.cat([torch.zeros_like(values[:, :1]), steps.cumsum(1)], 1)
    return torch.empty_like(segments).scatter_(1, order, dense)


def _unpaired(tensor: Tensor) -> Tensor:
    """``(B, 2, N, ...) -> (2 B, N, ...)``."""
    if not is_symbolic(tensor) and (tensor.ndim < 3 or tensor.shape[1] != 2):
        raise ValueError(
            f"the head 'pairs' takes two sequences, (B, 2, N), got a tensor of shape {tuple(tensor.shape)}"
        )
    return tensor.flatten(0, 1)
