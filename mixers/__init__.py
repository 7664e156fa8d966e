"""Token mixers: one file each, one registry.

A token mixer maps a channels-last grid to a grid of the same shape, ``(B, *grid, C) -> (B, *grid, C)``.

Letters of shapes, here and in `mixzoo.models`: B batch, H W sides of an image grid, N tokens, C channels,
G groups or heads, D head width, L time steps, P patches, M hidden width.
"""

from . import (  # noqa: F401 - registers them
    _channel_mlp,
    _conv_mlp,
    _selective_channel,
    aff,
    attention,
    contmix,
    decomposable_mixing,
    fourier,
    gated_mlp,
    global_filter,
    identity,
    inception,
    large_kernel_conv,
    mlp,
    nin_gating,
    ponet,
    pooling,
    raft,
    random,
    scattering,
    selective_token,
    separable_conv,
    spatial_fc,
)
from ._dtcwt import dtcwt_forward, dtcwt_inverse
from ._layers import nchw
from ._neighborhood import neighborhood_apply
from ._registry import (
    CHANNEL_MIXERS,
    TOKEN_MIXERS,
    MixerInfo,
    create_mixer,
    list_mixers,
    parse_spec,
    register_channel_mixer,
    register_mixer,
)
from ._scan import selective_scan

__all__ = [
    "CHANNEL_MIXERS",
    "TOKEN_MIXERS",
    "MixerInfo",
    "create_mixer",
    "dtcwt_forward",
    "dtcwt_inverse",
    "list_mixers",
    "nchw",
    "neighborhood_apply",
    "parse_spec",
    "register_channel_mixer",
    "register_mixer",
    "selective_scan",
]
