"""Blocks of OverLoCK: convolutions with large kernels, and context mixing on feature and context beside each other.

Paper: arXiv:2502.20087. Checked against LMMMEng/OverLoCK at 2c8ab3b.

    RepConvBlock:   x = local(x);  x = r x + mlp(se(BN(D(norm(x)))))                    D: `large_kernel_conv`
    FocusBlock:     z = local([x, r ctx + r' ctx0]);  z = r z + mix(norm(z));  z = local(z);  z = r z + mlp(norm(z))
    ContMixBlock:   the same without a context

r are scales by channels, with biases; local is a residual depthwise convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..mixers import TOKEN_MIXERS
from ..mixers._conv_parts import ResidualDepthwise, ResponseNorm, SqueezeExcitation, normed
from ..mixers._layers import Linear
from ..mixers._local_mlp import LocalMlp
from ..mixers.contmix import ContMix, GatedContextMixing
from .block import ResidualBranch

_EPS = 1e-6


class Affine(nn.Module):
    """w x + b by channels: ``(..., C) -> (..., C)``."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight)


class MixThenExpand(nn.Module):
    """Token mixer, batch norm, squeeze-excitation, `LocalMlp`: ``(B, H, W, C) -> (B, H, W, C)``."""

    folds = (("mix.conv.conv", "norm"),)

    def __init__(self, dim: int, mix: nn.Module, hidden: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.mix = mix
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.se = SqueezeExcitation(dim, **dd)
        self.mlp = LocalMlp(dim, hidden, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.mlp(self.se(y))


class RepConvBlock(nn.Module):
    """Residual depthwise convolution, then one branch of token mixer and MLP.

    Args:
        dim: channels C.
        token_mixer: a name or ``(name, {options})``.
        grid_size: for mixers whose parameters depend on it.
        mlp_ratio: hidden width over C.
        res_scale: initial value of the scale on the skip, which has a bias; None for none.
        drop_path: see `ResidualBranch`.

    Shapes: ``(B, H, W, C) -> (B, H, W, C)``.
    """

    def __init__(
        self,
        dim: int,
        *,
        token_mixer: Any = "large_kernel_conv",
        grid_size: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        res_scale: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.local = ResidualDepthwise(dim, **dd)
        op = MixThenExpand(
            dim, TOKEN_MIXERS.create(token_mixer, dim, grid_size=grid_size, **dd), int(mlp_ratio * dim), **dd
        )
        scale = {"res_scale": res_scale, "res_bias": res_scale is not None}
        self.branch = ResidualBranch(nn.LayerNorm(dim, eps=_EPS, **dd), op, dim=dim, drop_path=drop_path, **scale, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(self.local(x))


class FocusMixing(nn.Module):
    """Fusion of feature and context, then `GatedContextMixing`: ``(B, H, W, C + Cc) -> (B, H, W, C + Cc)``."""

    folds = (("fuse_conv", "fuse_norm"),)

    def __init__(
        self, dim: int, context_dim: int, *, kernel_size: int, num_heads: int, deploy: bool, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        total = dim + context_dim
        self.widths = [dim, context_dim]
        self.fuse_conv = nn.Conv2d(total, total, 3, padding=1, groups=total, **dd)
        self.fuse_norm = nn.BatchNorm2d(total, **dd)
        self.act = nn.GELU()
        self.fuse_fc = Linear(total, dim, **dd)
        self.norm = ResponseNorm(dim, **dd)
        options = {"kernel_size": kernel_size, "num_heads": num_heads, "deploy": deploy}
        self.mix = GatedContextMixing(dim, total, query_dim=dim, context_dim=context_dim, **options, **dd)

    def forward(self, x: Tensor) -> Tensor:
        query, context = x.split(self.widths, -1)
        y = normed(x.permute(0, 3, 1, 2), self.fuse_conv, self.fuse_norm, self.act).permute(0, 2, 3, 1)
        return self.mix(query, context, self.norm(self.fuse_fc(y)))


class FocusBlock(nn.Module):
    """Context mixing on feature and context beside each other, then an MLP on both.

    Args:
        dim, context_dim: channels C of the feature, Cc of the context.
        kernel_size, num_heads: see `mixzoo.mixers.contmix`.
        mlp_ratio: hidden width over C, not over C + Cc.
        first: the context has not been mixed yet, so that the overview is not added to it.
        res_scale: initial value of the scales on the skips, which have biases; None for none.
        deploy: see `mixzoo.mixers.large_kernel_conv`.

    Shapes: ``(B, H, W, C + Cc), (B, H, W, Cc) -> (B, H, W, C + Cc)``; the second is the overview.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        *,
        kernel_size: int,
        num_heads: int,
        mlp_ratio: float = 3.0,
        first: bool = False,
        res_scale: float | None = 1.0,
        drop_path: float = 0.0,
        deploy: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        total = dim + context_dim
        self.widths = [dim, context_dim]
        self.context_scale = None if first else Affine(context_dim, **dd)
        self.overview_scale = None if first else Affine(context_dim, **dd)
        mixing = FocusMixing(dim, context_dim, kernel_size=kernel_size, num_heads=num_heads, deploy=deploy, **dd)
        scale = {"res_scale": res_scale, "res_bias": res_scale is not None, "drop_path": drop_path}

        def branch(op: nn.Module) -> ResidualBranch:
            return ResidualBranch(nn.LayerNorm(total, eps=_EPS, **dd), op, dim=total, **scale, **dd)

        self.local1 = ResidualDepthwise(total, **dd)
        self.token = branch(mixing)
        self.local2 = ResidualDepthwise(total, **dd)
        self.channel = branch(LocalMlp(total, int(mlp_ratio * dim), **dd))

    def forward(self, x: Tensor, overview: Tensor) -> Tensor:
        if self.context_scale is not None:
            x, context = x.split(self.widths, -1)
            x = torch.cat([x, self.context_scale(context) + self.overview_scale(overview)], -1)
        return self.channel(self.local2(self.token(self.local1(x))))


class ContMixBlock(nn.Module):
    """The authors' stand-alone block around the mixer `contmix`.

    Args:
        dim: channels C.
        kernel_size, small_kernel_size, num_heads, deploy: see the mixer.
        mlp_ratio: hidden width over C.
        res_scale: initial value of the scales on the skips, which have biases; None for none.
        drop_path: see `ResidualBranch`.

    Shapes: ``(B, H, W, C) -> (B, H, W, C)``.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 7,
        small_kernel_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        res_scale: float | None = None,
        drop_path: float = 0.0,
        deploy: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        options = {"small_kernel_size": small_kernel_size, "num_heads": num_heads, "deploy": deploy}
        mixer = ContMix(dim, kernel_size=kernel_size, **options, **dd)
        scale = {"res_scale": res_scale, "res_bias": res_scale is not None, "drop_path": drop_path}

        def branch(op: nn.Module) -> ResidualBranch:
            return ResidualBranch(nn.LayerNorm(dim, eps=_EPS, **dd), op, dim=dim, **scale, **dd)

        self.local1 = ResidualDepthwise(dim, **dd)
        self.token = branch(mixer)
        self.local2 = ResidualDepthwise(dim, **dd)
        self.channel = branch(LocalMlp(dim, int(mlp_ratio * dim), **dd))

    def forward(self, x: Tensor) -> Tensor:
        return self.channel(self.local2(self.token(self.local1(x))))
