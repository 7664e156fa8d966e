"""Releases and key layouts of PoNet (arXiv:2110.02442) and of its Long Range Arena harness.

The authors' v1.0, their files on the Hub, and ModelScope's name the tensors alike. v1.0 and ModelScope tie the matrix
of the masked-language head to the words' embeddings; on the Hub it is a tensor of its own, and a model that loads it
with other values than the embeddings' gets one too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..models._registry import Release, register_releases
from ._folders import register_config
from ._rules import Layout, register_layouts, under
from .fnet import ENCODER, HEADS, encoder_options

register_releases(
    {
        "ponet_base_uncased.chtan": Release(
            hf_hub_id="chtan/ponet-base-uncased",
            licence="apache-2.0",
            params_m=124.281,
            note="v1.0 is on Google Drive, id 1gfV5lpg-3JW9ZgbgXOyyAmHqA7Q4OEJk",
        ),
        "ponet_base_chinese.damo": Release(
            licence="apache-2.0",
            note="on ModelScope, damo/nlp_ponet_fill-mask_chinese-base, to be downloaded by hand",
        ),
    }
)

_MIXER = [("dense_{l:q|k|o|segment|local}.{p:weight|bias}", "{l}.{p}")]
_BLOCK = [
    *under("attention.self.", "token.op.", _MIXER),
    ("attention.output.dense.{p:weight|bias}", "token.op.proj.{p}"),
    ("attention.output.LayerNorm.{p:weight|bias}", "token.norm.{p}"),
    ("intermediate.dense.{p:weight|bias}", "channel.op.fc1.{p}"),
    ("output.dense.{p:weight|bias}", "channel.op.fc2.{p}"),
    ("output.LayerNorm.{p:weight|bias}", "channel.norm.{p}"),
]
_PONET = [*ENCODER, *under("encoder.layer.{i}.", "blocks.{i}.", _BLOCK)]

# in the harness the layer W_v gives o
_LRA_PONET = [
    *((f"W_{theirs}.{{p:weight|bias}}", f"{ours}.{{p}}") for theirs, ours in (("q", "q"), ("k", "k"), ("v", "o"))),
    ("W_{l:local|segment}.{p:weight|bias}", "{l}.{p}"),
    ("ff.{p:weight|bias}", "proj.{p}"),
]
_LRA_SOFTMAX = [
    ("W_{l:q|k|v}.{p:weight|bias}", "{l}.{p}"),
    ("ff.{p:weight|bias}", "proj.{p}"),
]
_LRA_FNET = [
    ("W_{l:q|k|v}.{p:weight|bias}", None, "the Fourier transform has no projections"),
    ("ff.{p:weight|bias}", None, "the Fourier transform has no projections"),
]


def _lra(mixer: list) -> list:
    """The whole model of the harness around one mixer."""
    block = [
        ("norm1.{p:weight|bias}", "token.norm.{p}"),
        *under("mha.", "token.op.", mixer),
        ("norm2.{p:weight|bias}", "channel.norm.{p}"),
        ("mlpblock.0.{p:weight|bias}", "channel.op.fc1.{p}"),
        ("mlpblock.3.{p:weight|bias}", "channel.op.fc2.{p}"),
    ]
    return [
        ("model.embeddings.word_embeddings.weight", "embed.word.weight"),
        ("model.embeddings.position_embeddings.weight", "embed.position.weight"),
        *under("model.transformer_{i}.", "blocks.{i}.", block),
        ("model.norm.{p:weight|bias}", "norm.{p}"),
        # sic
        ("seq_classifer.mlpblock.0.{p:weight|bias}", "head.hidden.{p}"),
        ("seq_classifer.mlpblock.2.{p:weight|bias}", "head.fc.{p}"),
    ]


register_layouts(
    [
        Layout(
            "ponet",
            "lxchtan/PoNet, v1.0 and on the Hub, and ModelScope",
            ("ponet.encoder.layer.{i}.attention.self.dense_segment.weight",),
            [*under("ponet.", "", _PONET), *HEADS],
        ),
        Layout(
            "ponet",
            "lxchtan/PoNet without a head",
            ("encoder.layer.{i}.attention.self.dense_segment.weight",),
            _PONET,
        ),
        Layout("ponet", "one mixer of lxchtan/PoNet", ("dense_segment.weight",), _MIXER),
        Layout(
            "lra",
            "PoNet in the Long Range Arena harness of lxchtan/PoNet",
            ("model.transformer_{i}.mha.W_segment.weight",),
            _lra(_LRA_PONET),
        ),
        Layout(
            "lra",
            "attention in the Long Range Arena harness of lxchtan/PoNet",
            ("model.transformer_{i}.mha.W_q.weight", "model.transformer_{i}.mha.ff.weight"),
            _lra(_LRA_SOFTMAX),
        ),
        Layout(
            "lra",
            "FNet in the Long Range Arena harness of lxchtan/PoNet",
            ("model.transformer_{i}.mha.W_q.weight",),
            _lra(_LRA_FNET),
        ),
        Layout("lra", "one PoNet mixer of the Long Range Arena harness", ("W_segment.weight",), _LRA_PONET),
    ]
)


def options_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the model ``ponet_base_uncased`` from a ``config.json`` of the Hub's form."""
    mixer = {
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "special_pooling": config.get("clsgsepg", True),
    }
    return encoder_options("PoNet", config) | {"token_mixer": ("ponet", mixer)}


# v1.0 says "bert"
register_config("ponet", "ponet_base_uncased", options_of_config)
