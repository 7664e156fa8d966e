"""Published figures and key layout of SVT (badripatro/svt at fcbc9b3, arXiv:2311.01310).

Its authors released no weights, and their repository states no licence: what is listed here are figures. The layout is
that of the files their training script writes. The wavelet filters that it stores are constants here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..mixers._dtcwt import first_filters, tree_filters
from ..models._registry import Release, register_releases
from ._rules import Layout, Transform, register_layouts, under

# architecture: published parameters (M), multiply-adds (G), ImageNet-1k top-1 with token labels
_FIGURES = {
    "svt_s_paper": (22.0, 3.9, 84.2),
    "svt_b_paper": (32.8, 6.3, 85.2),
    "svt_l_paper": (54.0, 12.7, 85.7),
}

register_releases(
    {
        f"{arch}.svt_in1k": Release(
            crop_pct=0.96,
            top1=top1,
            params_m=params_m,
            gmacs=gmacs,
            note=(
                "no weights were released; the published multiply-adds are those of layers alone and leave out the "
                "wavelet transforms, the complex networks and the two products of attention"
            ),
        )
        for arch, (params_m, gmacs, top1) in _FIGURES.items()
    }
)

_FILTERS = "a constant filter of the wavelet transform"

# (C, H, W) <-> (H, W, C)
_LAST = Transform(lambda t: t.permute(1, 2, 0), lambda t: t.permute(2, 0, 1))

_SCATTERING = [
    ("complex_weight_ll", "low_weight", _LAST),
    ("complex_weight_lh_b{n}", "bias{n}"),
    ("complex_weight_lh_b{n}_t", "token_bias{n}"),
    ("complex_weight_lh_{n}", "weight{n}"),
    ("complex_weight_lh_{n}_t", "token_weight{n}"),
    ("conv.{p:weight|bias}", "conv.{p}"),
    ("{bank:xfm|ifm}.{filter:h0o|h1o|g0o|g1o|h0a|h0b|h1a|h1b|g0a|g0b|g1a|g1b}", None, _FILTERS),
]
_BLOCK = [
    ("norm1.{p:weight|bias}", "token.norm.{p}"),
    ("norm2.{p:weight|bias}", "channel.norm.{p}"),
    ("attn.{l:q|kv|proj}.{p:weight|bias}", "token.op.{l}.{p}"),
    *under("attn.", "token.op.", _SCATTERING),
    ("mlp.{l:fc1|fc2}.{p:weight|bias}", "channel.op.{l}.{p}"),
    ("mlp.dwconv.dwconv.{p:weight|bias}", "channel.op.dwconv.{p}"),
]


def _filter_bank(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Filters that every scattering mixer of a state dict stores, as columns and with their taps backwards."""
    bank = {}
    for name, letter, inverse in (("xfm", "h", False), ("ifm", "g", True)):
        low, high = first_filters("near_sym_b", inverse)
        trees = tree_filters("qshift_b", inverse)
        bank |= {f"{name}.{letter}0o": low, f"{name}.{letter}1o": high}
        for band, number in (("low", 0), ("high", 1)):
            bank |= {f"{name}.{letter}{number}{tree}": trees[f"{band}_{tree}"][::-1] for tree in "ab"}
    mark = "complex_weight_ll"
    mixers = [key.removesuffix(mark) for key in state if key.endswith(mark)]
    columns = {
        name: torch.tensor(taps, dtype=torch.float64).float().reshape(1, 1, -1, 1) for name, taps in bank.items()
    }
    return {mixer + name: column.clone() for mixer in mixers for name, column in columns.items()}


_BATCH_NORM = "{p:weight|bias|running_mean|running_var|num_batches_tracked}"
_MODEL = [
    ("patch_embed1.conv.{3i}.weight", "stem.convs.{i}.conv.weight"),
    (f"patch_embed1.conv.{{3i+1}}.{_BATCH_NORM}", "stem.convs.{i}.bn.{p}"),
    ("patch_embed1.{l:proj|norm}.{p:weight|bias}", "stem.{l}.{p}"),
    ("patch_embed{s+1}.proj.{p:weight|bias}", "stages.{s}.downsample.conv.{p}"),
    ("patch_embed{s+1}.norm.{p:weight|bias}", "stages.{s}.downsample.norm.{p}"),
    *under("block{s+1}.{i}.", "stages.{s}.blocks.{i}.", _BLOCK),
    ("norm4.{p:weight|bias}", "head.norm.{p}"),
    ("norm{s}.{p:weight|bias}", "stages.{s}.downsample.last_norm.{p}"),
    ("post_network.0.{rest:*}", "head.class_block.{rest}"),
    ("head.{p:weight|bias}", "head.fc.cls.{p}"),
    ("aux_head.{p:weight|bias}", "head.fc.aux.{p}"),
]

register_layouts(
    [
        Layout(
            "svt",
            "badripatro/svt",
            ("patch_embed1.conv.0.weight", "post_network.0.attn.q.weight"),
            _MODEL,
            constants=_filter_bank,
        ),
        Layout(
            "svt", "badripatro/svt, one scattering mixer", ("complex_weight_ll",), _SCATTERING, constants=_filter_bank
        ),
    ]
)
