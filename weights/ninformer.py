"""Key layout of NiNformer (Abdullah-88/NiNformer at 0ec85d4, arXiv:2403.02411). Its authors released no weights."""

from __future__ import annotations

from ._rules import Layout, register_layouts, under

_GATING = [
    ("Mixer.token_mix.0.{p:weight|bias}", "token_norm.{p}"),
    ("Mixer.token_mix.2.net.0.{p:weight|bias}", "token.fc1.{p}"),
    ("Mixer.token_mix.2.net.3.{p:weight|bias}", "token.fc2.{p}"),
    ("Mixer.channel_mix.0.{p:weight|bias}", "channel_norm.{p}"),
    ("Mixer.channel_mix.1.net.0.{p:weight|bias}", "channel.fc1.{p}"),
    ("Mixer.channel_mix.1.net.3.{p:weight|bias}", "channel.fc2.{p}"),
    ("proj.{p:weight|bias}", "proj.{p}"),
]
_BLOCK = [
    # one norm, applied by both branches
    ("norm.{p:weight|bias}", ("token.norm.{p}", "channel.norm.{p}")),
    *under("mgu.", "token.op.", _GATING),
    ("ffn.net.0.{p:weight|bias}", "channel.op.fc1.{p}"),
    ("ffn.net.3.{p:weight|bias}", "channel.op.fc2.{p}"),
]
_MODEL = [
    ("patcher.{p:weight|bias}", "stem.conv.{p}"),
    *under("model.{i}.", "stages.{i}.blocks.0.", _BLOCK),
    ("classifier.{p:weight|bias}", "head.fc.{p}"),
]

register_layouts(
    [
        Layout("ninformer", "Abdullah-88/NiNformer", ("patcher.weight", "model.{i}.mgu.proj.weight"), _MODEL),
        Layout("ninformer", "Abdullah-88/NiNformer, one block", ("mgu.proj.weight", "norm.weight"), _BLOCK),
        Layout("ninformer", "Abdullah-88/NiNformer, one gating unit", ("Mixer.token_mix.0.weight",), _GATING),
    ]
)
