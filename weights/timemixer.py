"""Key layout of TimeMixer (kwuking/TimeMixer at 8d230b7, and thuml/Time-Series-Library at 4e938a1, which has the same).

No weights were released; the layout is that of ``checkpoint.pth`` files that users trained with either repository. The
authors' network holds parameters it never uses, which ours does not have. They are left out, and made anew on export.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.timemixer import sinusoids
from ._rules import Layout, Rule, register_layouts, under

_UNUSED = "the authors' network has it and never uses it"
_NO_MARKS = "the model was created without time marks"
_NO_NORM = "the model was created without instance norm"
_CROSS = "with mixed channels the authors' network has it and never uses it"

_MLP = [("0.{p:weight|bias}", "fc1.{p}"), ("2.{p:weight|bias}", "fc2.{p}")]
_BLOCK = [
    *under("mixing_multi_scale_season.down_sampling_layers.{i}.", "down.{i}.", _MLP),
    *under("mixing_multi_scale_trend.up_sampling_layers.{i}.", "up.{i}.", _MLP),
    *under("cross_layer.", "cross.", _MLP),
    *(Rule(rule.theirs, rule.ours, why=_CROSS) for rule in under("out_cross_layer.", "out.", _MLP)),
    ("layer_norm.{p:weight|bias}", None, _UNUSED),
]
_FIELDS = "month|day|weekday|hour|minute"
_RULES = [
    *under("pdm_blocks.{b}.", "blocks.{b}.", _BLOCK),
    ("enc_embedding.value_embedding.tokenConv.weight", "embedding.weight"),
    Rule("enc_embedding.temporal_embedding.embed.weight", "marks.weight", why=_NO_MARKS),
    Rule(
        f"enc_embedding.temporal_embedding.{{f:{_FIELDS}}}_embed.emb.weight", "marks.tables.{f}.weight", why=_NO_MARKS
    ),
    Rule(f"enc_embedding.temporal_embedding.{{f:{_FIELDS}}}_embed.weight", "marks.tables.{f}.weight", why=_NO_MARKS),
    ("enc_embedding.position_embedding.pe", None, _UNUSED),
    Rule("normalize_layers.{i}.affine_{p:weight|bias}", "norms.{i}.{p}", why=_NO_NORM),
    ("predict_layers.{i}.{p:weight|bias}", "head.time.{i}.{p}"),
    ("projection_layer.{p:weight|bias}", "head.projection.{p}"),
    ("projection.{p:weight|bias}", "head.fc.{p}"),
    ("out_res_layers.{i}.{p:weight|bias}", "bypass.{i}.inner.{p}"),
    ("regression_layers.{i}.{p:weight|bias}", "bypass.{i}.outer.{p}"),
]


def _dead(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the authors' network has besides, at its initial values."""
    conv = theirs["enc_embedding.value_embedding.tokenConv.weight"]
    dim = conv.shape[0]
    like = {"dtype": conv.dtype, "device": conv.device}
    dead = {"enc_embedding.position_embedding.pe": sinusoids(5000, dim).to(**like).unsqueeze(0)}
    for block in sorted({key.split(".")[1] for key in theirs if key.startswith("pdm_blocks.")}):
        start = f"pdm_blocks.{block}."
        dead[f"{start}layer_norm.weight"] = torch.ones(dim, **like)
        dead[f"{start}layer_norm.bias"] = torch.zeros(dim, **like)
        cross = {k: t for k, t in theirs.items() if k.startswith(f"{start}cross_layer.")}
        dead.update({k.replace("cross_layer", "out_cross_layer"): torch.zeros_like(t) for k, t in cross.items()})
    return dead


register_layouts(
    [
        Layout(
            "timemixer",
            "TimeMixer, the authors' and Time-Series-Library's",
            ("pdm_blocks.{b}.layer_norm.weight", "enc_embedding.value_embedding.tokenConv.weight"),
            _RULES,
            rebuild=_dead,
        ),
        Layout(
            "timemixer",
            "one block of TimeMixer",
            ("mixing_multi_scale_season.down_sampling_layers.0.0.weight",),
            _BLOCK,
        ),
    ]
)
