"""The open text encoders: any mixer of sequences, in the widths of the small vision transformers.

Pre-norm blocks on bytes or any other words, 0 being padding; the vector of a sequence is the mean of its valid tokens.
"""

from __future__ import annotations

from ._registry import register_models
from .text_encoder import TextEncoder

_S = {
    "vocab_size": 512,
    "max_length": 1024,
    "pad_token_id": 0,
    "derive_mask": True,
    "dim": 384,
    "depth": 12,
    "token_mixer": "pooling",
    "pool": "mean",
    "norm_eps": 1e-6,
    "post_norm": False,
    "embed_norm": False,
    "final_norm": True,
}

register_models(
    TextEncoder,
    {"seqformer_s": _S, "seqformer_b": _S | {"dim": 768}},
    modality="text",
    timm=False,
    note="open: any token_mixer",
)
