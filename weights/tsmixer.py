"""Key layout of Google's TSMixer as thuml/Time-Series-Library (at 4e938a1) has it. No weights were released; the layout
is that of ``checkpoint.pth`` files that users trained.
"""

from __future__ import annotations

from ._rules import Layout, register_layouts, under

_MLP = [("0.{p:weight|bias}", "fc1.{p}"), ("2.{p:weight|bias}", "fc2.{p}")]

register_layouts(
    [
        Layout(
            "tsmixer",
            "Time-Series-Library's TSMixer",
            ("model.{i}.temporal.0.weight", "projection.weight"),
            [
                *under("model.{i}.temporal.", "blocks.{i}.token.op.", _MLP),
                *under("model.{i}.channel.", "blocks.{i}.channel.op.", _MLP),
                ("projection.{p:weight|bias}", "head.time.{p}"),
            ],
        )
    ]
)
