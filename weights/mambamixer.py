"""Published figures of MambaMixer, and the key layout of VMamba (MzeroMiko/VMamba at 2ed52ea, arXiv:2401.10166).

MambaMixer (arXiv:2403.19888) published neither code nor weights. Its token mixer is the block of VMamba's first
release, which is under the MIT licence. A file of that release fills everything of a ViM2 model but the channel mixers
and the averages: VMamba's blocks go to the token branches, and every third block of its third stage is left out.
"""

from __future__ import annotations

from ..models._registry import Release, register_releases
from ._rules import Layout, Transform, register_layouts, under

# (4 E, ...) <-> (4, E, ...)
_DIRECTIONS = Transform(lambda t: t.unflatten(0, (4, -1)), lambda t: t.flatten(0, 1))

SS2D = [
    ("in_proj.weight", "in_proj.weight"),
    ("conv2d.{p:weight|bias}", "mix.conv.{p}"),
    ("x_proj_weight", "mix.scans.x_proj"),
    ("dt_projs_weight", "mix.scans.dt_proj"),
    ("dt_projs_bias", "mix.scans.dt_bias"),
    ("A_logs", "mix.scans.A_log", _DIRECTIONS),
    ("Ds", "mix.scans.D", _DIRECTIONS),
    ("out_norm.{p:weight|bias}", "mix.norm.{p}"),
    ("out_proj.weight", "out_proj.weight"),
]

# architecture: published parameters (M) without the classifier, ImageNet-1k top-1
_FIGURES = {"vim2_t": (20, 82.7), "vim2_s": (43, 83.7), "vim2_b": (74, 83.9)}
_NAMES = {"t": "tiny", "s": "small", "b": "base"}

register_releases(
    {
        f"{arch}.mambamixer_in1k": Release(
            crop_pct=0.875,
            top1=top1,
            params_m=params_m,
            note="no weights were released; the published parameters leave out the classifier",
            aliases=(f"vim2_{_NAMES[arch[-1]]}",),
        )
        for arch, (params_m, top1) in _FIGURES.items()
    }
)

_FRESH = "VMamba has none"


def _branch(norm: str, op: str) -> list:
    return [(f"{norm}.{{p:weight|bias}}", "norm.{p}"), *under(f"{op}.", "op.", SS2D)]


def _model(norm: str, op: str) -> list:
    """Rules for a model whose blocks name their two parts so."""
    return [
        ("patch_embed.proj.{p:weight|bias}", "stem.conv.{p}"),
        ("patch_embed.norm.{p:weight|bias}", "stem.norm.{p}"),
        *under("layers.{s}.blocks.{3u}.", "stages.{s}.blocks.{u}.first.", _branch(norm, op)),
        *under("layers.{s}.blocks.{3u+1}.", "stages.{s}.blocks.{u}.second.", _branch(norm, op)),
        ("layers.{s}.blocks.{3u+2}.{rest:*}", None, "there is a channel mixer in its place"),
        ("layers.{s}.downsample.reduction.weight", "stages.{s+1}.downsample.reduction.weight"),
        ("layers.{s}.downsample.norm.{p:weight|bias}", "stages.{s+1}.downsample.norm.{p}"),
        ("norm.{p:weight|bias}", "head.norm.{p}"),
        ("head.{p:weight|bias}", "head.fc.{p}"),
    ]


register_layouts(
    [
        Layout(
            "vmamba",
            "MzeroMiko/VMamba, first release",
            ("patch_embed.proj.weight", "layers.{s}.blocks.{i}.self_attention.A_logs"),
            _model("ln_1", "self_attention"),
            fresh=[
                ("stages.{s}.blocks.{u}.channel.{rest:*}", _FRESH),
                ("stages.{s}.averages.weight", _FRESH),
            ],
        ),
        Layout("vmamba", "MzeroMiko/VMamba, one token mixer", ("x_proj_weight", "A_logs"), SS2D),
    ]
)
