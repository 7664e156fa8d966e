"""Scattering: a learned blend of the low-pass band of a wavelet transform and a small complex network on the others.

Paper: arXiv:2311.01310 (Scattering Vision Transformer). Checked against badripatro/svt at fcbc9b3.

    low, high = T x                                 T the dual-tree complex wavelet transform, one level
    low <- low . W                                  W real, an entry for every position and channel
    high <- relu(high W1 + b1) W2 + b2              complex, block-diagonal over G groups of channels, the same for all
                                                    positions and orientations; relu on real and imaginary parts
    y = T^-1 (low, high)                            x, y: (B, H, W, C)

That is form "channel", which the authors released. In form "channel_token", of the published models, the second half
of the channels goes this way and ``high`` also through

    high[r] <- relu(V1[r] high[r] + c1[r]) V2[r] + c2[r]

along the width, with matrices of every row r of coefficients; the first half goes through a depthwise 3 x 3
convolution; the output interleaves both halves. Runs in float32 or wider and returns the input's dtype.

The transform is two products with dense matrices each way (`_dtcwt`), whose rows are sorted by parity so that the cells
of a band are slices. The network is one real product a group and layer on [re | im]. Odd sides repeat their last
sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor

from ._complex import real_bias, real_blocks
from ._counting import count, numel
from ._dtcwt import BIORT, first_analysis, first_filters, first_synthesis
from ._layers import check_grid, is_symbolic
from ._registry import register_mixer
from ._tables import island, left_product, table, widen

FORMS = ("channel", "channel_token")

# where the bands LH, HL, HH begin among rows and columns (low even, low odd, high even, high odd)
_BANDS = ((2, 0), (0, 2), (2, 2))


def _sorted_analysis(length: int, biort: str, *, device) -> Tensor:
    """`first_analysis` with rows sorted by (band, parity)."""
    return first_analysis(length, biort, device=device).reshape(2, -1, 2, length).transpose(1, 2).reshape(-1, length)


def _sorted_synthesis(length: int, biort: str, *, device) -> Tensor:
    matrix = first_synthesis(length, biort, device=device)
    return matrix.reshape(length, 2, -1, 2).transpose(2, 3).reshape(length, -1)


def _cells(y: Tensor) -> list[list[Tensor]]:
    """The samples a, b, c, d of the cells of each band, ``(B, h, w, G, D)``, of ``y (B, 4, h, 4, w, G, D)``."""
    return [[y[:, r + i, :, c + j] for i in (0, 1) for j in (0, 1)] for r, c in _BANDS]


def _split(y: Tensor) -> tuple[Tensor, Tensor]:
    """Low band ``(B, 2, h, 2, w, G, D)`` and coefficients times sqrt 2 ``(6, B, h, w, G, 2, D)``."""
    B, _, h, _, w, G, D = y.shape
    z = y.new_empty(6, B, h, w, G, 2, D)
    for band, (a, b, c, d) in enumerate(_cells(y)):
        one, two = z[2 * band], z[2 * band + 1]
        torch.sub(a, d, out=one.select(-2, 0))
        torch.add(b, c, out=one.select(-2, 1))
        torch.add(a, d, out=two.select(-2, 0))
        torch.sub(b, c, out=two.select(-2, 1))
    return y[:, :2, :, :2].clone(), z


def _join(low: Tensor, z: Tensor) -> Tensor:
    """Adjoint of `_split`, and twice its inverse on the coefficients."""
    B, _, h, _, w, G, D = low.shape
    y = low.new_empty(B, 4, h, 4, w, G, D)
    y[:, :2, :, :2] = low
    for band, (a, b, c, d) in enumerate(_cells(y)):
        (p, q), (r, s) = z[2 * band].unbind(-2), z[2 * band + 1].unbind(-2)
        torch.add(p, r, out=a)
        torch.add(q, s, out=b)
        torch.sub(q, s, out=c)
        torch.sub(r, p, out=d)
    return y


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor) -> tuple[Tensor, Tensor]:
        return _split(y)

    @staticmethod
    def backward(ctx, low: Tensor, z: Tensor) -> Tensor:
        return _Join.apply(low, z)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, low: Tensor, z: Tensor) -> Tensor:
        return _join(low, z)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _Split.apply(grad)


def _split_symbolic(y: Tensor) -> tuple[Tensor, Tensor]:
    z = []
    for a, b, c, d in _cells(y):
        z += [torch.stack([a - d, b + c], -2), torch.stack([a + d, b - c], -2)]
    return y[:, :2, :, :2], torch.stack(z)


def _join_symbolic(low: Tensor, z: Tensor) -> Tensor:
    blocks = {(0, 0): low}
    for band, corner in enumerate(_BANDS):
        (p, q), (r, s) = z[2 * band].unbind(-2), z[2 * band + 1].unbind(-2)
        rows = [torch.stack([p + r, q + s], 2), torch.stack([q - s, r - p], 2)]  # (B, h, 2, w, G, D)
        blocks[corner] = torch.stack(rows, 1)  # (B, 2, h, 2, w, G, D)
    top = torch.cat([blocks[0, 0], blocks[0, 2]], 3)
    return torch.cat([top, torch.cat([blocks[2, 0], blocks[2, 2]], 3)], 1)


torch.library.define("mixzoo::filter_axis", "(Tensor matrix, Tensor x, int taps) -> Tensor")


@torch.library.impl("mixzoo::filter_axis", "CompositeImplicitAutograd")
def _filter_axis(matrix: Tensor, x: Tensor, taps: int) -> Tensor:
    return left_product(matrix, x)


@count("mixzoo::filter_axis", column="transform")
def _filter_macs(inputs, outputs) -> int:
    """Taps of the filters on every sample they are centred on, as if they were convolutions."""
    return min(numel(inputs[1]), numel(outputs[0])) * inputs[2].toIValue()


def _filter(matrix: Tensor, x: Tensor, taps: int) -> Tensor:
    """``matrix`` over the second-last axis; traced as a filter bank, which is what is counted."""
    if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
        return torch.ops.mixzoo.filter_axis(matrix, x, taps)
    return left_product(matrix, x)


@register_notrace_module
@register_mixer("scattering", ranks=(2,), needs_grid=True, paper="arXiv:2311.01310")
class Scattering(nn.Module):
    """y = T^-1 (low . W, network(high)) over a fixed grid.

    Args:
        dim: channels C, a multiple of ``num_blocks``, and of twice that for form "channel_token".
        grid_size: sides (H, W) of the grid.
        form: "channel" or "channel_token".
        num_blocks: groups G of the network.
        biort: filters of the transform, see `mixzoo.mixers.dtcwt_forward`.

    Shapes: ``(B, H, W, C) -> (B, H, W, C)``; any other grid is refused.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int],
        form: str = "channel",
        num_blocks: int = 4,
        biort: str = "near_sym_b",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
        if biort not in BIORT:
            raise ValueError(f"biort must be one of {', '.join(BIORT)}, not {biort!r}")
        halves = 2 if form == "channel_token" else 1
        if num_blocks < 1 or dim % (halves * num_blocks):
            raise ValueError(
                f"form {form!r} needs dim to be a multiple of {halves} num_blocks, which dim={dim} is not for "
                f"num_blocks={num_blocks}"
            )
        self.form = form
        self.num_blocks = num_blocks
        self.biort = biort
        self.grid_size = tuple(grid_size)
        self.taps = sum(map(len, first_filters(biort)))
        dd = {"device": device, "dtype": dtype}
        scattered = dim // halves
        width = scattered // num_blocks
        (H, W), (h, w) = self._sides(self.grid_size)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **dd))

        self.low_weight = parameter(H, W, scattered)
        # [real or imaginary, group, in, out]
        self.weight1, self.bias1 = parameter(2, num_blocks, width, width), parameter(2, num_blocks, width)
        self.weight2, self.bias2 = parameter(2, num_blocks, width, width), parameter(2, num_blocks, width)
        if form == "channel_token":
            # [real or imaginary, row, in, out]
            self.token_weight1, self.token_bias1 = parameter(2, h, w, w), parameter(2, h, w)
            self.token_weight2, self.token_bias2 = parameter(2, h, w, w), parameter(2, h, w)
            self.conv = nn.Conv2d(scattered, scattered, 3, padding=1, groups=scattered, **dd)
        self.reset_parameters()

    @staticmethod
    def _sides(grid: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sides of the low band, which are even, and of the others."""
        H, W = (side + side % 2 for side in grid)
        return (H, W), (H // 2, W // 2)

    def reset_parameters(self) -> None:
        """Draw everything but the convolution from N(0, 0.02^2), biases too."""
        for name, parameter in self.named_parameters():
            if not name.startswith("conv."):
                nn.init.normal_(parameter, std=0.02)

    @staticmethod
    def grid_of_state(state: dict[str, Tensor]) -> tuple[int, ...]:
        """The grid the parameters were made for, or the even one that an odd one is padded to."""
        return tuple(state["low_weight"].shape[:2])

    @classmethod
    def resize_grid_state(cls, state: dict[str, Tensor], old: Sequence[int], new: Sequence[int]) -> dict[str, Tensor]:
        """The mixer's state dict for another grid: everything is resampled linearly with the corners in place.

        The authors give no procedure. Matrices along the width are scaled by the ratio of the widths, so that constant
        rows keep their image.
        """
        (H, W), (h, w) = cls._sides(new)
        resized = dict(state)
        low = state["low_weight"].permute(2, 0, 1)
        resized["low_weight"] = _linear(low, (H, W)).permute(1, 2, 0)
        for i in (1, 2):
            if f"token_weight{i}" in state:
                matrix, bias = state[f"token_weight{i}"], state[f"token_bias{i}"]
                resized[f"token_weight{i}"] = _linear(matrix, (h, w, w)) * (matrix.shape[-1] / w)
                resized[f"token_bias{i}"] = _linear(bias, (h, w))
        return resized

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize the parameters to another grid, see `resize_grid_state`; before optimizer, DDP or compile."""
        grid_size = tuple(grid_size)
        if self._sides(grid_size) != self._sides(self.grid_size):
            own = dict(self.named_parameters())
            state = {name: parameter.data for name, parameter in own.items()}
            for name, values in self.resize_grid_state(state, self.grid_size, grid_size).items():
                if values.shape != own[name].shape:
                    setattr(self, name, nn.Parameter(values.contiguous(), requires_grad=own[name].requires_grad))
        self.grid_size = grid_size

    def forward(self, x: Tensor) -> Tensor:
        check_grid(x, self.grid_size, "scattering")
        if self.form == "channel":
            return self._scatter(x)
        plain, scattered = x.chunk(2, -1)  # 2 x (B, H, W, C / 2)
        plain = self.conv(plain.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        scattered = self._scatter(scattered)
        return torch.stack([plain.to(scattered.dtype), scattered], -1).flatten(-2)

    def _scatter(self, x: Tensor) -> Tensor:
        B, (H, W), C = x.shape[0], self.grid_size, x.shape[-1]
        (_, _), (h, w) = self._sides(self.grid_size)
        G = self.num_blocks
        with island(x):
            z = widen(x)
            rows, columns = (table(_sorted_analysis, z, side, self.biort) for side in (H, W))
            y = _filter(rows, z.reshape(B, H, W * C), self.taps).reshape(B, 4 * h, W, C)
            y = _filter(columns, y, self.taps).reshape(B, 4, h, 4, w, G, C // G)
            low, high = _split_symbolic(y) if is_symbolic(y) else _Split.apply(y)
            blend = self.low_weight.to(z.dtype).reshape(h, 2, w, 2, G, C // G).permute(1, 0, 3, 2, 4, 5)
            low, high = low * blend, self._network(high)
            y = _join_symbolic(low, high) if is_symbolic(low) else _Join.apply(low, high)
            rows, columns = (table(_sorted_synthesis, z, side, self.biort) for side in (H, W))
            y = _filter(columns, y.reshape(B, 4 * h, 4 * w, C), self.taps)  # (B, 4 h, W, C)
            y = _filter(rows, y.reshape(B, 4 * h, W * C), self.taps).reshape(B, H, W, C)
        return y.to(x.dtype)

    def _network(self, z: Tensor) -> Tensor:
        """Coefficients ``(6, B, h, w, G, 2, D)`` times sqrt 2 to those of the output divided by sqrt 2."""
        O, B, h, w, G, _, D = z.shape
        root = 0.5**0.5
        weight1, weight2 = (real_blocks(weight.to(z.dtype)) for weight in (self.weight1, self.weight2))
        bias1, bias2 = (real_bias(bias.to(z.dtype)) for bias in (self.bias1, self.bias2))
        # the factors of the transform go into the small matrices
        weight1 = weight1 * root
        last = 1.0 if self.form == "channel_token" else root
        v = z.reshape(O * B * h * w, G, 2 * D).transpose(0, 1)  # (G, P, 2 D)
        v = F.relu(torch.baddbmm(bias1, v, weight1))
        v = torch.baddbmm(bias2 * last, v, weight2 * last).reshape(G, O, B, h, w, 2, D)
        if self.form == "channel":
            return v.permute(1, 2, 3, 4, 0, 5, 6)
        v = v.permute(3, 5, 4, 1, 2, 0, 6).reshape(h, 2 * w, O * B * G * D)  # a row: parts, then positions
        weight1, weight2 = (
            real_blocks(weight.to(z.dtype)).transpose(1, 2) for weight in (self.token_weight1, self.token_weight2)
        )
        bias1, bias2 = (real_bias(bias.to(z.dtype)).transpose(1, 2) for bias in (self.token_bias1, self.token_bias2))
        v = F.relu(torch.baddbmm(bias1, weight1, v))
        v = torch.baddbmm(bias2 * root, weight2 * root, v)
        return v.reshape(h, 2, w, O, B, G, D).permute(3, 4, 0, 2, 5, 1, 6)

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, form={self.form!r}, num_blocks={self.num_blocks}, biort={self.biort!r}"


def _linear(values: Tensor, size: Sequence[int]) -> Tensor:
    """Resample the axes after the first, corners in place."""
    mode = "trilinear" if len(size) == 3 else "bilinear"
    resized = F.interpolate(values.unsqueeze(0).float(), size=tuple(size), mode=mode, align_corners=True)
    return resized.squeeze(0).to(values.dtype)
