"""Releases and key layouts of FNet (arXiv:2105.03824): Hugging Face transformers', with heads or without.

Files of either kind leave the tied matrix of the head out (safetensors) or hold it twice (.bin); both are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..models._registry import Release, register_releases
from ._folders import register_config
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

# configurations of BERT's shape

# what its classes are called behind the name of the family, and the heads they have; None: no head
_HEADS_OF_CONFIG = {
    "Model": None,
    "ForPreTraining": "pretraining",
    "ForMaskedLM": "mlm",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tokens",
}
_SAME = {
    "vocab_size": "vocab_size",
    "type_vocab_size": "type_vocab_size",
    "max_position_embeddings": "max_length",
    "pad_token_id": "pad_token_id",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "layer_norm_eps": "norm_eps",
    "hidden_dropout_prob": "drop_rate",
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def encoder_options(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a text encoder from a ``config.json`` whose classes begin with ``family``.

    Raises:
        ValueError: a class or an activation that is not known here. KeyError: a size is missing.
    """
    name = str((config.get("architectures") or [f"{family}Model"])[0])
    if name.removeprefix(family) not in _HEADS_OF_CONFIG:
        known = ", ".join(family + ending for ending in _HEADS_OF_CONFIG)
        raise ValueError(f"architectures={name!r}: expected one of {known}")
    if config["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"hidden_act={config['hidden_act']!r}: expected one of {', '.join(_ACTIVATIONS)}")
    head = _HEADS_OF_CONFIG[name.removeprefix(family)]
    options = {ours: config[theirs] for theirs, ours in _SAME.items() if theirs in config}
    options["channel_mixer"] = ("mlp", {"ratio": config["intermediate_size"] / config["hidden_size"]})
    options["act"] = _ACTIVATIONS[config["hidden_act"]]
    if head is None:
        return options | {"num_classes": 0}
    if head in ("classification", "tokens"):
        options["num_classes"] = len(config.get("id2label") or range(config.get("num_labels", 2)))
    return options | {"head": head}


register_config("fnet", "fnet_base", lambda config: encoder_options("FNet", config))
