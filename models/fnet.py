"""FNet: BERT with Fourier transforms in place of attention.

Paper: arXiv:2105.03824. Checked against transformers 5.23.0, models/fnet.

    x <- norm(x + Re F x);  x <- norm(x + mlp(x))

Padding is mixed into every token: its authors padded to 512 in training, and advise the same afterwards.
"""

from __future__ import annotations

from ._registry import register_models
from .text_encoder import TextEncoder

_FNET = {
    "vocab_size": 32000,
    "type_vocab_size": 4,
    "max_length": 512,
    "pad_token_id": 3,
    "relation_classes": 2,
    "token_mixer": "fourier",
    "channel_mixer": ("mlp", {"ratio": 4.0}),
    "act": "gelu_tanh",
    "norm_eps": 1e-12,
    "post_norm": True,
    "embed_norm": True,
    "embed_proj": True,
    "drop_rate": 0.1,
    "dropout_in": ("embed", "channel", "head"),
}

register_models(
    TextEncoder,
    {
        "fnet_base": _FNET | {"dim": 768, "depth": 12},
        "fnet_large": _FNET | {"dim": 1024, "depth": 24},
    },
    modality="text",
    timm=False,
)
