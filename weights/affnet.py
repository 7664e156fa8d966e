"""Releases and key layout of AFFNet (microsoft/TokenMixers at 99dbe38, arXiv:2307.14008).

The files are in OneDrive folders that a browser has to open. Classification files hold a flat state dict of averaged
weights. The repository is under the MIT licence, parts of it under Apple's sample-code licence, and mentions no other
for the weights.
"""

from __future__ import annotations

from ..models._registry import Release, register_releases
from ._rules import Layout, register_layouts, under

# architecture: OneDrive folder, published parameters (M), multiply-adds (G) at 256 pixels, ImageNet-1k top-1
_FOLDERS = {
    "affnet_et": ("AjKVODXuNei2gRohpLEiih31-T24", 1.4, 0.4, 73.0),
    "affnet_t": ("AjKVODXuNei2gR3bxUACGV1s-NCt", 2.6, 0.8, 77.0),
    "affnet": ("AjKVODXuNei2gRckRc6eJ4kB8dW3", 5.5, 1.5, 79.8),
}

register_releases(
    {
        f"{arch}.ms_in1k": Release(
            licence="mit",
            input_size=(3, 256, 256),
            crop_pct=0.889,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            top1=top1,
            params_m=params_m,
            gmacs=gmacs,
            macs_rule="matmul",
            note=(
                f"download it by hand from https://1drv.ms/f/s!{folder} and give checkpoint=; the resize before the "
                "crop is not documented; the published multiply-adds count one transform with a natural logarithm and "
                "half of the mask network, which nearly cancels"
            ),
        )
        for arch, (folder, params_m, gmacs, top1) in _FOLDERS.items()
    }
)

_BATCH_NORM = "{p:weight|bias|running_mean|running_var|num_batches_tracked}"


def _conv(theirs: str, conv: str, norm: str) -> list[tuple[str, str]]:
    """A convolution with batch norm."""
    return [
        (f"{theirs}.block.conv.weight", f"{conv}.weight"),
        (f"{theirs}.block.norm.{_BATCH_NORM}", f"{norm}.{{p}}"),
    ]


_INVERTED = [
    *_conv("block.exp_1x1", "conv_pw", "bn1"),
    *_conv("block.conv_3x3", "conv_dw", "bn2"),
    *_conv("block.red_1x1", "conv_pwl", "bn3"),
]
_FILTER = [("{l:w1|b1|w2|b2}", "{l}")]
_MIXING_BLOCK = [
    ("norm1.{p:weight|bias}", "branch.norm.{p}"),
    *under("mlp.", "branch.op.local.", _INVERTED),
    ("norm2.{p:weight|bias}", "branch.op.norm.{p}"),
    *under("filter.", "branch.op.token.", _FILTER),
]
_BLOCK = [
    *under("global_rep.{j}.", "blocks.{j}.", _MIXING_BLOCK),
    ("global_rep.{j}.{p:weight|bias}", "blocks.{j}.{p}"),
    *_conv("conv_proj", "proj.conv", "proj.bn"),
    *_conv("fusion", "fuse.conv", "fuse.bn"),
]
_MODEL = [
    *_conv("conv_1", "stem.embed.conv", "stem.embed.bn"),
    *under("layer_{s+1}.{i}.", "stages.{s}.convs.{i}.", _INVERTED),
    *under("layer_{s+1}.1.", "stages.{s}.mix.", _BLOCK),
    *_conv("conv_1x1_exp", "stages.4.expand.conv", "stages.4.expand.bn"),
    ("classifier.fc.{p:weight|bias}", "head.fc.{p}"),
]

register_layouts(
    [
        Layout(
            "affnet", "microsoft/TokenMixers", ("conv_1.block.conv.weight", "conv_1x1_exp.block.conv.weight"), _MODEL
        ),
        Layout("affnet", "microsoft/TokenMixers, blocks beside their input", ("global_rep.0.filter.w1",), _BLOCK),
        Layout("affnet", "microsoft/TokenMixers, one block", ("filter.w1", "norm1.weight"), _MIXING_BLOCK),
    ]
)
