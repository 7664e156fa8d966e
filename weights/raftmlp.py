"""Key layouts of RaftMLP (okojoalg/raft-mlp at 6060d5d, arXiv:2108.04384). Its authors released no weights.

A level is one sequence: the embedding at 0 (several scales) or 1 (one scale), then the blocks from 2 on. Within a block
1 mixes along columns, 3 along rows, 5 over channels. Names do not tell the sizes of the windows, so there is a table
for each published set of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._rules import Layout, Rule, Transform, register_layouts, under


def _windows(level: int, ours: str, kernels: Sequence[int]) -> list[Rule]:
    """Linear (C', C sum k^2), window after window with channels before positions, to kernels (C', C, k, k)."""
    areas = [k * k for k in kernels]

    def load(weight: Tensor) -> tuple[Tensor, ...]:
        channels = weight.shape[1] // sum(areas)
        parts = weight.split([channels * area for area in areas], dim=1)
        return tuple(part.reshape(-1, channels, k, k) for part, k in zip(parts, kernels, strict=True))

    split = Transform(load, lambda *parts: torch.cat([part.flatten(1) for part in parts], dim=1))
    names = tuple(f"{ours}convs.{i}.weight" for i in range(len(kernels)))
    return [
        Rule(f"levels.{level}.fn.0.fc.weight", names, split),
        Rule(f"levels.{level}.fn.0.fc.bias", f"{ours}convs.0.bias"),
    ]


def _patches(level: int, ours: str, p: int) -> list[Rule]:
    """Linear (C', p p C) with the channels last to a kernel (C', C, p, p)."""
    fold = Transform(
        lambda weight: weight.reshape(weight.shape[0], p, p, -1).permute(0, 3, 1, 2),
        lambda kernel: kernel.permute(0, 2, 3, 1).flatten(1),
    )
    return [
        Rule(f"levels.{level}.fn.1.weight", f"{ours}convs.0.weight", fold),
        Rule(f"levels.{level}.fn.1.bias", f"{ours}convs.0.bias"),
    ]


_AXES = [
    ("1.norm.1.{p:weight|bias}", "vertical.norm.{p}"),
    ("1.fn.0.{p:weight|bias}", "vertical.fc1.{p}"),
    ("1.fn.3.{p:weight|bias}", "vertical.fc2.{p}"),
    ("3.norm.1.{p:weight|bias}", "horizontal.norm.{p}"),
    ("3.fn.0.{p:weight|bias}", "horizontal.fc1.{p}"),
    ("3.fn.3.{p:weight|bias}", "horizontal.fc2.{p}"),
]
_RAFT = [
    *under("", "token.op.", _AXES),
    ("5.norm.{p:weight|bias}", "channel.norm.{p}"),
    ("5.fn.0.{p:weight|bias}", "channel.op.fc1.{p}"),
    ("5.fn.3.{p:weight|bias}", "channel.op.fc2.{p}"),
]
# the block of the authors' MLP-Mixer
_ORG = [
    ("1.norm.1.{p:weight|bias}", "token.norm.{p}"),
    ("1.fn.0.{p:weight|bias}", "token.op.fc1.{p}"),
    ("1.fn.3.{p:weight|bias}", "token.op.fc2.{p}"),
    ("3.norm.{p:weight|bias}", "channel.norm.{p}"),
    ("3.fn.0.{p:weight|bias}", "channel.op.fc1.{p}"),
    ("3.fn.3.{p:weight|bias}", "channel.op.fc2.{p}"),
]

_LEVELS = under("levels.{s}.fn.{i+2}.", "stages.{s}.blocks.{i}.", _RAFT)
_SCALES = [
    *_windows(0, "stem.", (4, 8)),
    *_windows(1, "stages.1.downsample.", (2, 4)),
    *_windows(2, "stages.2.downsample.", (2, 4)),
    *_windows(3, "stages.3.downsample.", (2,)),
    *_LEVELS,
]
_HIERARCHY = [
    *_patches(0, "stem.", 4),
    *(rule for level in (1, 2, 3) for rule in _patches(level, f"stages.{level}.downsample.", 2)),
    *_LEVELS,
]
# one level is a chain of stages of one block
_CHAIN = under("levels.0.fn.{i+2}.", "stages.{i}.blocks.0.", _RAFT)
_ORG_CHAIN = under("levels.0.fn.{i+2}.", "stages.{i}.blocks.0.", _ORG)
# where the form for dense prediction has these blocks: in three stages, whose maps are taken
_PLACES = [(stage, block) for stage, depth in enumerate((4, 6, 2)) for block in range(depth)]
_ORG_STAGES = [
    rule
    for i, (stage, block) in enumerate(_PLACES)
    for rule in under(f"levels.0.fn.{i + 2}.", f"stages.{stage}.blocks.{block}.", _ORG)
]
_CIFAR = [
    *_windows(0, "stem.", (2, 4, 8)),
    *_windows(1, "stages.2.downsample.", (2, 4)),
    *under("levels.0.fn.2.", "stages.0.blocks.0.", _RAFT),
    *under("levels.0.fn.3.", "stages.1.blocks.0.", _RAFT),
    *under("levels.1.fn.2.", "stages.2.blocks.0.", _RAFT),
    *under("levels.1.fn.3.", "stages.3.blocks.0.", _RAFT),
]
_HEAD = [("heads.0.1.{p:weight|bias}", "head.norm.{p}"), ("classifier.{p:weight|bias}", "head.fc.{p}")]
_NO_HEAD = [(f"{part}.{{rest:*}}", None, "dense prediction has no classifier") for part in ("heads", "classifier")]


def _shortcut(last: int) -> list:
    """The head over all levels, the last of which only has a norm."""
    return [
        (f"heads.{last}.1.{{p:weight|bias}}", "body.head.norm.{p}"),
        ("heads.{s}.1.{p:weight|bias}", "norms.{s}.{p}"),
        ("heads.{s}.4.{p:weight|bias}", "films.{s}.{p}"),
        ("classifier.{p:weight|bias}", "fc.{p}"),
    ]


_ONE_SCALE, _MANY_SCALES = "levels.0.fn.1.weight", "levels.0.fn.0.fc.weight"
_TWELFTH, _ORG_MARK = "levels.0.fn.13.3.fn.0.weight", "levels.0.fn.2.3.norm.weight"
_16 = _patches(0, "stem.", 16)
# title, keys that mark it, rules, rules of the form for dense prediction where there is one
_BODIES = [
    ("several scales", (_MANY_SCALES, "levels.1.fn.0.fc.weight"), _SCALES, _SCALES),
    ("hierarchy", (_ONE_SCALE, "levels.3.fn.1.weight"), _HIERARCHY, _HIERARCHY),
    ("one level", (_ONE_SCALE, _TWELFTH, "levels.0.fn.2.5.norm.weight"), [*_16, *_CHAIN], None),
    ("one level, two scales", (_MANY_SCALES, _TWELFTH), [*_windows(0, "stem.", (16, 32)), *_CHAIN], None),
    ("MLP-Mixer", (_ONE_SCALE, _TWELFTH, _ORG_MARK), [*_16, *_ORG_CHAIN], [*_16, *_ORG_STAGES]),
    ("CIFAR", (_MANY_SCALES, "levels.1.fn.0.fc.weight"), _CIFAR, None),
    ("MLP-Mixer for CIFAR", (_ONE_SCALE, _ORG_MARK), [*_patches(0, "stem.", 4), *_ORG_CHAIN], None),
]

for _title, _marks, _rules, _dense in _BODIES:
    _name = f"okojoalg/raft-mlp, {_title}"
    register_layouts([Layout("raft-mlp", _name, (*_marks, "classifier.weight"), [*_rules, *_HEAD])])
    if _dense is not None:
        register_layouts(
            [Layout("raft-mlp", f"{_name}, dense prediction", _marks, [*under("", "body.", _dense), *_NO_HEAD])]
        )
register_layouts(
    [
        Layout(
            "classifier",
            "RaftMLP's MLP-Mixer for dense prediction",
            ("stages.11.blocks.0.channel.op.fc1.weight",),
            [
                ("stem.{rest:*}", "body.stem.{rest}"),
                *(
                    (f"stages.{i}.blocks.0.{{rest:*}}", f"body.stages.{s}.blocks.{j}.{{rest}}")
                    for i, (s, j) in enumerate(_PLACES)
                ),
                ("head.{rest:*}", None, "dense prediction has no classifier"),
            ],
            bridge=True,
        )
    ]
)
for _last in (1, 3):
    _marks = (_MANY_SCALES, f"heads.{_last}.1.weight", "classifier.weight")
    _rules = [*under("", "body.", _SCALES), *_shortcut(_last)]
    register_layouts([Layout("raft-mlp", f"okojoalg/raft-mlp, head over {_last + 1} levels", _marks, _rules)])
register_layouts(
    [
        Layout("raft-mlp", "okojoalg/raft-mlp, one block", ("1.norm.1.weight", "5.norm.weight"), _RAFT),
        Layout(
            "raft-mlp", "okojoalg/raft-mlp, token mixing of one block", ("1.norm.1.weight", "3.norm.1.weight"), _AXES
        ),
    ]
)
