"""Key layout of the selective token mixer (MzeroMiko/VMamba at 2ed52ea, arXiv:2401.10166, forward type v0).

MambaMixer (arXiv:2403.19888) published neither code nor weights. Its token mixer is the block of VMamba's first
release, which is under the MIT licence.
"""

from __future__ import annotations

from ._rules import Layout, Transform, register_layouts

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

register_layouts([Layout("vmamba", "MzeroMiko/VMamba, one token mixer", ("x_proj_weight", "A_logs"), SS2D)])
