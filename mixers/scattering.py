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

The transform is two products with dense matrices each way. The network acts on sums and differences of coefficients,
which are slices of what the products leave, as one real product a group and layer. On a CPU all of it takes 0.3 of the
time of depthwise convolutions and einsums, and form "channel_token" 0.45. Odd sides repeat their last sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor

from ._complex import real_bias, real_blocks, times_i
from ._dtcwt import BIORT
from ._layers import check_grid
from ._registry import register_mixer
from ._scattering import Layer, scatter
from ._tables import island, widen

FORMS = ("channel", "channel_token")


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
                f"form {form!r} needs num_blocks of at least 1 and dim a multiple of {'2 ' * (halves - 1)}num_blocks; "
                f"got dim={dim}, num_blocks={num_blocks}"
            )
        self.form = form
        self.num_blocks = num_blocks
        self.biort = biort
        self.grid_size = tuple(grid_size)
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
        h, w = self._sides(self.grid_size)[1]
        with island(x):
            z = widen(x)
            low = self.low_weight.to(z.dtype).reshape(h, 2, w, 2, self.num_blocks, -1)
            y = scatter(z, self.grid_size, low, self._layers(z.dtype), self.biort)
        return y.to(x.dtype)

    def _layers(self, dtype: torch.dtype) -> list[Layer]:
        """What the network does to p and q: q enters as i q and leaves as -i q, and p with twice the bias."""
        root = 0.5**0.5
        weight1, bias1, weight2, bias2 = (t.to(dtype) for t in (self.weight1, self.bias1, self.weight2, self.bias2))
        weight1 = weight1 * root
        first = real_blocks(weight1), real_blocks(times_i(weight1)), real_bias(bias1)
        if self.form == "channel":
            weight2 = weight2 * root
            return [first, (real_blocks(weight2), real_blocks(-times_i(weight2)), real_bias(bias2 * (2 * root)))]
        tokens = self.token_weight1, self.token_bias1, self.token_weight2, self.token_bias2
        weight3, bias3, weight4, bias4 = (t.to(dtype) for t in tokens)
        second, third, weight4 = real_blocks(weight2), _from_left(weight3 * 0.5), weight4 * root
        bias3, bias4 = (bias.permute(1, 2, 0).flatten(1).unsqueeze(2) for bias in (bias3, bias4 * (2 * root)))
        return [
            first,
            (second, second, real_bias(bias2 * 2)),
            (third, third, bias3),
            (_from_left(weight4), _from_left(-times_i(weight4)), bias4),  # biases (h, 2 w, 1)
        ]

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, form={self.form!r}, num_blocks={self.num_blocks}, biort={self.biort!r}"


def _from_left(weight: Tensor) -> Tensor:
    """Complex matrices ``(2, h, I, O)`` as real ones ``(h, 2 O, 2 I)``, real and imaginary parts in turns."""
    blocks = real_blocks(weight).unflatten(2, (2, -1)).unflatten(1, (2, -1))  # (h, 2, I, 2, O)
    return blocks.permute(0, 4, 3, 2, 1).flatten(3).flatten(1, 2)


def _linear(values: Tensor, size: Sequence[int]) -> Tensor:
    """Resample the axes after the first, corners in place."""
    mode = "trilinear" if len(size) == 3 else "bilinear"
    resized = F.interpolate(values.unsqueeze(0).float(), size=tuple(size), mode=mode, align_corners=True)
    return resized.squeeze(0).to(values.dtype)
