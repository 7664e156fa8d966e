"""Folding a trained model: parallel convolutions and batch norms become single convolutions with biases.

With running statistics a batch norm is an affine map by channels, so

    BN(W x + b) = (s W) x + s (b - mean) + beta,    s = gamma / sqrt(var + eps)
    W BN(x) + b = (W s) x + W (beta - s mean) + b

Modules say what they hold: one with a method ``reparameterize`` folds its own branches (`DilatedConv`), the class
attribute ``folds`` names pairs (convolution or linear layer, batch norm behind it), and ``folds_ahead`` pairs (batch
norm, linear layer behind it, with at most a mean between them). timm's layers are listed here.
"""

from __future__ import annotations

import copy
from operator import attrgetter

import timm.layers as timm_layers
import torch
import torch.nn as nn
from timm.models import _efficientnet_blocks as timm_blocks
from torch.nn.modules.batchnorm import _BatchNorm

from ..mixers.large_kernel_conv import fold_norm

_OF_TIMM: dict[type, tuple[tuple[str, str], ...]] = {
    timm_layers.ConvNormAct: (("conv", "bn"),),
    timm_blocks.ConvBnAct: (("conv", "bn1"),),
    timm_blocks.DepthwiseSeparableConv: (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    timm_blocks.InvertedResidual: (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
}
_FOLDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def reparameterize(model: nn.Module, *, inplace: bool = False, norms: bool = True) -> nn.Module:
    """Fold every branch and batch norm that can be; outputs in eval mode stay the same up to rounding.

    The result is for inference: what was folded cannot be trained as it was before. `mixzoo.save` and `mixzoo.load`
    know it.

    Args:
        model: a model of the zoo, or any module that holds such parts; one without any is returned as it is.
        inplace: change the model itself rather than a copy.
        norms: fold batch norms too; without, only parallel branches, which gives the keys of files that authors folded.

    >>> model = mixzoo.reparameterize(mixzoo.create_model("overlock_xt", pretrained=True).eval())
    """
    if not inplace:
        model = copy.deepcopy(model)
    modules = list(model.modules())
    for module in modules:
        if hasattr(type(module), "reparameterize"):
            module.reparameterize()
    # afterwards, since a norm goes into the one convolution that branches leave
    for module in modules if norms else ():
        for conv, norm in _pairs(module):
            _fold(module, conv, norm)
        for norm, linear in getattr(type(module), "folds_ahead", ()):
            _fold_ahead(module, norm, linear)
    config = getattr(model, "config", None)
    if config:
        model.config = {**config, "reparameterized": "norms" if norms else "branches"}
    return model


def _pairs(module: nn.Module) -> tuple[tuple[str, str], ...]:
    kinds = type(module).__mro__
    return getattr(kinds[0], "folds", ()) or next((_OF_TIMM[kind] for kind in kinds if kind in _OF_TIMM), ())


def _is_affine(norm: nn.Module) -> bool:
    return isinstance(norm, _BatchNorm) and norm.running_var is not None


@torch.no_grad()
def _fold(parent: nn.Module, conv_path: str, norm_path: str) -> None:
    """Put the norm into the convolution, and what follows it in its place."""
    try:
        conv, norm = attrgetter(conv_path)(parent), attrgetter(norm_path)(parent)
    except AttributeError:
        return
    if not isinstance(conv, _FOLDED) or not _is_affine(norm):
        return
    scale, shift = fold_norm(norm)
    weight = conv.weight * scale.reshape(-1, *[1] * (conv.weight.ndim - 1)).to(conv.weight.dtype)
    bias = shift if conv.bias is None else shift + scale * conv.bias
    trainable = conv.weight.requires_grad
    conv.weight = nn.Parameter(weight, requires_grad=trainable)
    conv.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=trainable)
    # timm's norms hold the activation behind them
    owner, _, name = norm_path.rpartition(".")
    setattr(parent.get_submodule(owner), name, getattr(norm, "act", nn.Identity()))


@torch.no_grad()
def _fold_ahead(parent: nn.Module, norm_name: str, linear_name: str) -> None:
    """Put the norm into the linear layer behind it, and nothing in its place."""
    norm, linear = getattr(parent, norm_name), getattr(parent, linear_name)
    if not isinstance(linear, nn.Linear) or not _is_affine(norm):
        return
    scale, shift = fold_norm(norm)
    bias = linear.weight.to(shift.dtype) @ shift
    bias = bias if linear.bias is None else bias + linear.bias
    dtype, trainable = linear.weight.dtype, linear.weight.requires_grad
    linear.weight = nn.Parameter((linear.weight * scale).to(dtype), requires_grad=trainable)
    linear.bias = nn.Parameter(bias.to(dtype), requires_grad=trainable)
    setattr(parent, norm_name, nn.Identity())
