"""Global filter: a learned filter on the spectrum of every channel, which is a circular convolution with a kernel as
large as the map.

Paper: arXiv:2107.00645 (GFNet). Checked against raoyongming/GFNet at 2de48b6.

    y = F^-1 (K . F x)        x, y: (B, *grid, C), F the orthonormal real FFT over the grid, K complex, free

K lives on the half spectrum, (H, W // 2 + 1) bins for a grid (H, W), with real and imaginary parts on its last axis.
Where a bin is its own mirror image only the part of K that keeps y real counts. Runs in float32 or wider and returns
the input's dtype. `_dft` says how F is computed and how fast that is: filtering takes 0.3 to 0.75 of the time of FFTs
up to 28 positions a side, and as long as they do beyond 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor

from ._complex import complex_product
from ._dft import by_matrices, from_spectrum, irfft, rfft, sort_rows, spectrum
from ._layers import check_grid, is_symbolic
from ._registry import register_mixer
from ._tables import island, widen

RESIZES = ("spectrum", "spectrum_linear", "kernel")


def bins(grid: Sequence[int]) -> tuple[int, ...]:
    """Sides of the half spectrum of a grid."""
    return (*grid[:-1], grid[-1] // 2 + 1)


def _resize_spectrum(weight: Tensor, new: Sequence[int], cubic: bool) -> Tensor:
    """K ``(*bins, C, 2)`` resampled over its bins, the first and the last one in place; on rank 3 always linearly."""
    maps = weight.flatten(-2).movedim(-1, 0).unsqueeze(0).float()  # (1, 2 C, *bins)
    size = bins(new)
    if len(new) == 1:
        maps, size = maps.unsqueeze(2), (1, *size)
    mode = "trilinear" if len(new) == 3 else "bicubic" if cubic else "bilinear"
    maps = F.interpolate(maps, size=size, mode=mode, align_corners=True)
    maps = maps.squeeze(0).movedim(0, -1).reshape(*bins(new), *weight.shape[-2:])
    return maps.to(weight.dtype)


def _resize_kernel(weight: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """K whose kernel on the grid is the old one, centred and padded with zeros or cropped."""
    axes = tuple(range(len(new)))
    half = torch.view_as_complex(weight.double().contiguous())  # (*bins, C)
    if len(old) > 1:
        half = torch.fft.ifftn(half, dim=axes[:-1])
    kernel = torch.fft.irfft(half, n=old[-1], dim=len(old) - 1)  # (*grid, C)
    for axis, (a, b) in enumerate(zip(old, new, strict=True)):
        # positions -(n // 2) .. (n - 1) // 2 around the centre
        kept = min(a, b)
        index = torch.arange(-(kept // 2), (kept + 1) // 2, device=weight.device)
        fresh = kernel.new_zeros(*kernel.shape[:axis], b, *kernel.shape[axis + 1 :])
        kernel = fresh.index_copy(axis, index % b, kernel.index_select(axis, index % a))
    return torch.view_as_real(torch.fft.rfftn(kernel, dim=axes)).to(weight.dtype)


class _FilterByFFT(torch.autograd.Function):
    """F^-1 (k . F x). Its adjoint is the filter conj(k); torch's own one takes complex transforms of full size."""

    @staticmethod
    def forward(x: Tensor, k: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        s = rfft(x)
        return irfft(s * k, grid), s

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, k, ctx.grid = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, k, output[1])

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        x, k, s = ctx.saved_tensors
        t = rfft(grad)
        grad_k = None
        if ctx.needs_input_grad[1]:
            # a second derivative needs the graph of the spectrum
            s = rfft(x) if torch.is_grad_enabled() else s
            grad_k = (t * s.conj()).sum(0)
            # bins that stand for two
            grad_k[..., 1 : (ctx.grid[-1] + 1) // 2, :] *= 2
        return (irfft(t * k.conj(), ctx.grid) if ctx.needs_input_grad[0] else None), grad_k, None


@register_notrace_module
@register_mixer("global_filter", ranks=(1, 2, 3), needs_grid=True, paper="arXiv:2107.00645")
class GlobalFilter(nn.Module):
    """y = F^-1 (K . F x) over a fixed grid.

    Args:
        dim: channels C; every channel has its own filter.
        grid_size: sides of the grid.
        resize: how K follows another grid. "spectrum" resamples its entries bicubically, as the authors do for
            checkpoints, "spectrum_linear" linearly, as they do for dense prediction; both move entries off their
            frequencies by up to a bin. "kernel" pads or crops the convolution kernel with zeros.

    Shapes: ``(B, *grid, C) -> (B, *grid, C)``; any other grid is refused.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 2,
        grid_size: Sequence[int],
        resize: str = "spectrum",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, not {resize!r}")
        self.grid_size = tuple(grid_size)
        self.resize = resize
        # K (*bins, C, 2)
        self.complex_weight = nn.Parameter(torch.empty(*bins(self.grid_size), dim, 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw K from N(0, 0.02^2), real and imaginary parts alike."""
        nn.init.normal_(self.complex_weight, std=0.02)

    @staticmethod
    def grid_of_state(state: dict[str, Tensor]) -> tuple[int, ...]:
        """The grid K was made for. The length of its last axis is only known up to one: of the two, the one that
        makes the grid square, else the even one."""
        *sides, half = state["complex_weight"].shape[:-2]
        last = 2 * (half - 1) or 1
        return (*sides, last + 1 if sides and sides[-1] == last + 1 else last)

    def resize_grid_state(self, state: dict[str, Tensor], old: Sequence[int], new: Sequence[int]) -> dict[str, Tensor]:
        """The mixer's state dict for another grid, see the argument ``resize``."""
        weight = state["complex_weight"]
        if self.resize == "kernel":
            return {**state, "complex_weight": _resize_kernel(weight, old, new)}
        return {**state, "complex_weight": _resize_spectrum(weight, new, cubic=self.resize == "spectrum")}

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize K to another grid, see `resize_grid_state`; before optimizer, DDP or compile."""
        if tuple(grid_size) == self.grid_size:
            return
        state = {"complex_weight": self.complex_weight.data}
        resized = self.resize_grid_state(state, self.grid_size, grid_size)["complex_weight"]
        self.complex_weight = nn.Parameter(resized.contiguous(), requires_grad=self.complex_weight.requires_grad)
        self.grid_size = tuple(grid_size)

    def forward(self, x: Tensor) -> Tensor:
        check_grid(x, self.grid_size, "global_filter")
        with island(x):
            y = self._filter(widen(x))
        return y.to(x.dtype)

    def _filter(self, x: Tensor) -> Tensor:
        k = self.complex_weight.to(x.dtype)
        if by_matrices(self.grid_size):
            k = k.movedim(-1, 0)  # (2, *bins, C)
            k = sort_rows(k, 1) if len(self.grid_size) == 2 else k
            return from_spectrum(complex_product(spectrum(x), k), self.grid_size)
        k = torch.view_as_complex(k.contiguous())
        if is_symbolic(x):
            return irfft(rfft(x) * k, self.grid_size)
        if torch.is_grad_enabled():
            return _FilterByFFT.apply(x, k, self.grid_size)[0]
        return irfft(rfft(x).mul_(k), self.grid_size)

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, resize={self.resize!r}"
