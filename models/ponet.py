"""PoNet: BERT with multi-granularity pooling in place of attention.

Paper: arXiv:2110.02442. Checked against lxchtan/PoNet at 8139037 (tag v1.0).

    x <- norm(x + ponet(x));  x <- norm(x + mlp(x))

Segments are given, one for each sentence, or lie between the words [CLS] and [SEP], 101 and 102. For texts longer than
512 its authors repeat the position table: ``create_model("ponet_base_uncased", max_length=4096, pretrained=True)``.
"""

from __future__ import annotations

from ._registry import register_models
from .text_encoder import TextEncoder

_PONET = {
    "dim": 768,
    "depth": 12,
    "type_vocab_size": 2,
    "max_length": 512,
    "pad_token_id": 0,
    "special_ids": (101, 102),
    "relation_classes": 3,
    "token_mixer": ("ponet", {"head_dim": 64}),
    "channel_mixer": ("mlp", {"ratio": 4.0}),
    "act": "gelu",
    "norm_eps": 1e-12,
    "post_norm": True,
    "embed_norm": True,
    "drop_rate": 0.1,
    "dropout_in": ("embed", "token", "channel", "head"),
}

register_models(
    TextEncoder,
    {
        "ponet_base_uncased": _PONET | {"vocab_size": 30522},
        "ponet_base_chinese": _PONET | {"vocab_size": 21128},
    },
    modality="text",
    timm=False,
)
