"""Releases and key layouts of PatchTSMixer (huggingface/transformers 5.23.0).

A checkpoint is a folder with ``model.safetensors`` and ``config.json``, which `options_of_config` translates. Layouts
are those of its models with a head, of the bare model, of one layer and of one patch mixer, each with either norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..models._registry import Release, register_releases
from ._folders import register_config
from ._rules import Layout, register_layouts, under

register_releases(
    {
        "patchtsmixer_etth1_512_96.granite": Release(
            hf_hub_id="ibm-granite/granite-timeseries-patchtsmixer",
            licence="apache-2.0",
            params_m=0.196,
            note="mean squared error 0.3699 on the test part of ETTh1 in its authors' notebook",
            aliases=("granite-timeseries-patchtsmixer", "patchtsmixer-etth1-forecasting"),
        ),
        "patchtsmixer_pretraining_512.etth1": Release(
            hf_hub_id="ibm-research/patchtsmixer-etth1-pretrain",
            params_m=0.049,
            note="its page states no licence",
            aliases=("patchtsmixer-etth1-pretrain",),
        ),
        "patchtsmixer_student_t_512_96.etth1": Release(
            hf_hub_id="ibm-research/patchtsmixer-etth1-generate",
            params_m=0.491,
            note="its page states no licence",
            aliases=("patchtsmixer-etth1-generate",),
        ),
    }
)


def _norm(theirs: str, ours: str, batch: bool) -> list[Sequence]:
    """Keys of one norm, whose class wraps that of the other kind."""
    if not batch:
        return [(f"{theirs}.norm.{{p:weight|bias}}", f"{ours}.{{p}}")]
    parts = "weight|bias|running_mean|running_var|num_batches_tracked"
    return [(f"{theirs}.norm.batchnorm.{{p:{parts}}}", f"{ours}.{{p}}")]


def _mixer(batch: bool) -> list[Sequence]:
    """One mixer with its norm; those over series and features have no attention."""
    return [
        *_norm("norm", "norm", batch),
        ("mlp.{l:fc1|fc2}.{p:weight|bias}", "op.{l}.{p}"),
        ("gating_block.attn_layer.{p:weight|bias}", "op.gate.fc.{p}"),
        ("self_attn_layer.{l:q|k|v}_proj.{p:weight|bias}", "op.attn.{l}.{p}"),
        ("self_attn_layer.out_proj.{p:weight|bias}", "op.attn.proj.{p}"),
        *_norm("norm_attn", "op.attn_norm", batch),
    ]


def _layer(batch: bool) -> list:
    return [
        *under("channel_feature_mixer.", "series.", _mixer(batch)),
        *under("patch_mixer.", "token.", _mixer(batch)),
        *under("feature_mixer.", "channel.", _mixer(batch)),
    ]


def _encoder(batch: bool) -> list:
    return [
        ("encoder.patcher.{p:weight|bias}", "embedding.{p}"),
        ("encoder.positional_encoder.position_enc", "positions"),
        *under("encoder.mlp_mixer_encoder.mixers.{i}.", "blocks.{i}.", _layer(batch)),
    ]


_HEADS = [
    ("head.base_forecast_block.{p:weight|bias}", "head.time.{p}"),
    ("head.base_forecast_block.proj.{k}.{p:weight|bias}", "head.time.{k}.{p}"),
    ("head.base_pt_block.{p:weight|bias}", "head.patch.{p}"),
    ("head.projection.{p:weight|bias}", "head.fc.{p}"),
    ("head.projection.proj.{k}.{p:weight|bias}", "head.fc.{k}.{p}"),
    ("inject_scale.inverse_trans_expansion.{p:weight|bias}", "injection.inner.{p}"),
    ("inject_scale.inverse_trans_compression.{p:weight|bias}", "injection.outer.{p}"),
    ("inject_scale.map_scale_expansion.{p:weight|bias}", "injection.scale_inner.{p}"),
    ("inject_scale.map_scale_compression.{p:weight|bias}", "injection.scale_outer.{p}"),
]


def _layouts(batch: bool) -> list[Layout]:
    norm = "norm.norm.batchnorm.weight" if batch else "norm.norm.weight"
    kind = "batch norm" if batch else "layer norm"
    mark = "encoder.mlp_mixer_encoder.mixers.{i}.patch_mixer." + norm
    return [
        Layout(
            "patchtsmixer",
            f"transformers' PatchTSMixer, {kind}",
            ("model." + mark,),
            [*under("model.", "", _encoder(batch)), *_HEADS],
        ),
        Layout("patchtsmixer", f"transformers' PatchTSMixer, bare model, {kind}", (mark,), _encoder(batch)),
        Layout("patchtsmixer", f"one layer of PatchTSMixer, {kind}", ("patch_mixer." + norm,), _layer(batch)),
        Layout("patchtsmixer", f"one mixer of PatchTSMixer, {kind}", (norm, "mlp.fc1.weight"), _mixer(batch)),
    ]


# the first one that has a name for every tensor is taken on export, and states with layer norms fit either
register_layouts([*_layouts(batch=False), *_layouts(batch=True)])

# class of theirs, without its prefix: task
_TASKS = {
    "ForPrediction": "forecast",
    "ForPretraining": "pretraining",
    "ForTimeSeriesClassification": "classification",
    "ForRegression": "regression",
    "Model": "pretraining",
}
# option of theirs: ours, where the value is the same
_SAME = {
    "context_length": "context_length",
    "prediction_length": "prediction_length",
    "num_input_channels": "num_channels",
    "patch_length": "patch_length",
    "patch_stride": "patch_stride",
    "d_model": "dim",
    "expansion_factor": "ratio",
    "num_layers": "depth",
    "mode": "mode",
    "gated_attn": "gated",
    "norm_eps": "norm_eps",
    "dropout": "drop_rate",
    "head_dropout": "head_drop_rate",
    "mask_type": "mask",
    "random_mask_ratio": "mask_ratio",
    "mask_value": "mask_value",
    "channel_consistent_masking": "mask_consistent",
    "output_range": "output_range",
}
# their defaults, which are not those of the published models; configurations may leave them out
_DEFAULTS = {
    "context_length": 32,
    "patch_length": 8,
    "num_input_channels": 1,
    "patch_stride": 8,
    "d_model": 8,
    "expansion_factor": 2,
    "num_layers": 3,
    "dropout": 0.2,
    "mode": "common_channel",
    "gated_attn": True,
    "norm_mlp": "LayerNorm",
    "self_attn": False,
    "self_attn_heads": 1,
    "use_positional_encoding": False,
    "positional_encoding_type": "sincos",
    "scaling": "std",
    "loss": "mse",
    "norm_eps": 1e-5,
    "mask_type": "random",
    "random_mask_ratio": 0.5,
    "num_forecast_mask_patches": [2],
    "mask_value": 0,
    "channel_consistent_masking": True,
    "unmasked_channel_indices": None,
    "head_dropout": 0.2,
    "distribution_output": "student_t",
    "prediction_length": 16,
    "prediction_channel_indices": None,
    "num_targets": 3,
    "output_range": None,
    "head_aggregation": "max_pool",
}
_POOLS = {"max_pool": "max", "avg_pool": "avg", "use_last": "last", None: None}
# their code takes True for "std", whatever its documentation says
_SCALERS = {"std": "std", "mean": "mean", True: "std", None: None, False: None}


def options_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the model ``patchtsmixer`` from a ``config.json``.

    Raises:
        ValueError: the configuration names no class of PatchTSMixer, or is older than its keys.
    """
    names = config.get("architectures") or ["PatchTSMixerModel"]
    task = _TASKS.get(str(names[0]).removeprefix("PatchTSMixer"))
    if task is None or "seq_len" in config:
        raise ValueError(
            f"architectures={names} of keys {', '.join(list(config)[:4])}, ...: expected one of "
            f"{', '.join('PatchTSMixer' + name for name in _TASKS)}, with the keys of transformers 4.36 or later"
        )
    theirs = _DEFAULTS | config
    counts, channels = theirs["num_forecast_mask_patches"], theirs["prediction_channel_indices"]
    nll = theirs["loss"] == "nll" and task in ("forecast", "regression")
    options = {ours: theirs[name] for name, ours in _SAME.items()} | {
        "task": task,
        "norm": "batch" if "batch" in theirs["norm_mlp"].lower() else "layer",
        "attn_heads": theirs["self_attn_heads"] if theirs["self_attn"] else 0,
        "positions": theirs["positional_encoding_type"] if theirs["use_positional_encoding"] else None,
        "scaling": _SCALERS[theirs["scaling"]],
        "distribution": theirs["distribution_output"] if nll else None,
        "output_channels": None if channels is None or task != "forecast" else sorted(channels),
        "mask_patches": [counts] if isinstance(counts, int) else list(counts),
        "mask_exempt": theirs["unmasked_channel_indices"] or [],
        "num_classes": theirs["num_targets"],
        "num_targets": theirs["num_targets"],
        "pool": _POOLS[theirs["head_aggregation"]],
    }
    return options


register_config("patchtsmixer", "patchtsmixer", options_of_config)
