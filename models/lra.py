"""Encoders of Long Range Arena's size, equal but for the token mixer.

Papers: arXiv:2011.04006 (the tasks), arXiv:2110.02442 (PoNet), arXiv:2105.03824 (FNet). Checked against the harness of
lxchtan/PoNet at cc9a29a, a fork of mlpen/Nystromformer's.

    x <- x + mixer(norm(x));  x <- x + mlp(norm(x));  mean of norm(x) over all positions, Linear, ReLU, Linear

Word 0 is padding, in images too, where it is a black pixel. The mean divides by the padded length. The harness gives
"softmax" (attention), "fnet" and "ponet"; any other mixer of sequences takes their place by ``token_mixer=``. The task
retrieval compares two texts, (B, 2, N). PoNet's authors tuned the number of segments for each task.
"""

from __future__ import annotations

from ._registry import register_models
from .text_encoder import TextEncoder, init_embedding

_LRA = {
    "dim": 64,
    "depth": 2,
    "pad_token_id": 0,
    "derive_mask": True,
    "zero_pad": False,
    "head_hidden": 128,
    "pool": "mean_padded",
    "channel_mixer": ("mlp", {"ratio": 2.0}),
    "act": "gelu",
    "norm_eps": 1e-5,
    "post_norm": False,
    "embed_norm": False,
    "final_norm": True,
    "mask_output": True,
    "drop_rate": 0.1,
    "dropout_in": ("embed", "token", "hidden"),
    "init": init_embedding,
}
_LISTOPS = _LRA | {"vocab_size": 32, "max_length": 2048, "num_classes": 10}
_TEXT = _LRA | {"vocab_size": 512, "max_length": 4096, "num_classes": 2}
_RETRIEVAL = _TEXT | {"head": "pairs"}
_IMAGE = _LRA | {"vocab_size": 512, "max_length": 1024, "num_classes": 10}
_PATHFINDER = _IMAGE | {"num_classes": 2}

_FNET = {"token_mixer": "fourier"}
_SOFTMAX = {
    "token_mixer": (
        "attention",
        {"head_dim": 32, "qkv_bias": True, "proj_bias": True, "attn_drop": 0.1, "separate_qkv": True},
    )
}


def _ponet(num_segments: int) -> dict:
    return {"token_mixer": ("ponet", {"head_dim": 32, "num_segments": num_segments})}


register_models(
    TextEncoder,
    {
        "lra_ponet_listops": _LISTOPS | _ponet(64),
        "lra_ponet_text": _TEXT | _ponet(4096),
        "lra_ponet_retrieval": _RETRIEVAL | _ponet(64),
        "lra_ponet_image": _IMAGE | _ponet(32),
        "lra_ponet_pathfinder": _PATHFINDER | _ponet(1),
        "lra_fnet_listops": _LISTOPS | _FNET,
        "lra_fnet_text": _TEXT | _FNET,
        "lra_fnet_retrieval": _RETRIEVAL | _FNET,
        "lra_fnet_image": _IMAGE | _FNET,
        "lra_fnet_pathfinder": _PATHFINDER | _FNET,
        "lra_softmax_listops": _LISTOPS | _SOFTMAX,
        "lra_softmax_text": _TEXT | _SOFTMAX,
        "lra_softmax_retrieval": _RETRIEVAL | _SOFTMAX,
        "lra_softmax_image": _IMAGE | _SOFTMAX,
        "lra_softmax_pathfinder": _PATHFINDER | _SOFTMAX,
    },
    modality="text",
    timm=False,
)
