"""Releases and key layouts of FNet (arXiv:2105.03824): Hugging Face transformers', with heads or without.

Files of either kind leave the tied matrix of the head out (safetensors) or hold it twice (.bin); both are read.
"""

from __future__ import annotations

from ..models._registry import Release, register_releases
from ._rules import Layout, register_layouts, under

_LICENCE = "apache-2.0"

register_releases(
    {
        "fnet_base.google": Release(hf_hub_id="google/fnet-base", licence=_LICENCE, params_m=83),
        "fnet_large.google": Release(hf_hub_id="google/fnet-large", licence=_LICENCE, params_m=238),
    }
)

_BLOCK = [
    ("fourier.output.LayerNorm.{p:weight|bias}", "token.norm.{p}"),
    ("intermediate.dense.{p:weight|bias}", "channel.op.fc1.{p}"),
    ("output.dense.{p:weight|bias}", "channel.op.fc2.{p}"),
    ("output.LayerNorm.{p:weight|bias}", "channel.norm.{p}"),
    ("fourier.self.{m:dft_mat_hidden|dft_mat_seq}", None, "a constant matrix of the form for TPUs"),
]
ENCODER = [
    ("embeddings.word_embeddings.weight", "embed.word.weight"),
    ("embeddings.position_embeddings.weight", "embed.position.weight"),
    ("embeddings.token_type_embeddings.weight", "embed.token_type.weight"),
    ("embeddings.LayerNorm.{p:weight|bias}", "embed.norm.{p}"),
    ("embeddings.position_ids", None, "counts the positions"),
    ("pooler.dense.{p:weight|bias}", "pooler.fc.{p}"),
]
# BERT's heads, which PoNet has too
HEADS = [
    ("cls.predictions.transform.dense.{p:weight|bias}", "mlm.fc.{p}"),
    ("cls.predictions.transform.LayerNorm.{p:weight|bias}", "mlm.norm.{p}"),
    ("cls.predictions.bias", "mlm.bias"),
    ("cls.predictions.decoder.{p:weight|bias}", "mlm.decoder.{p}"),
    ("cls.seq_relationship.{p:weight|bias}", "relation.{p}"),
    ("classifier.{p:weight|bias}", "head.fc.{p}"),
]
_FNET = [
    *ENCODER,
    ("embeddings.projection.{p:weight|bias}", "embed.proj.{p}"),
    *under("encoder.layer.{i}.", "blocks.{i}.", _BLOCK),
]

register_layouts(
    [
        Layout(
            "huggingface",
            "transformers' FNet with a head",
            ("fnet.encoder.layer.{i}.fourier.output.LayerNorm.weight",),
            [*under("fnet.", "", _FNET), *HEADS],
        ),
        Layout(
            "huggingface",
            "transformers' FNet without a head",
            ("encoder.layer.{i}.fourier.output.LayerNorm.weight",),
            _FNET,
        ),
    ]
)
