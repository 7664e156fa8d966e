"""Series split into trend and season, on time-first maps ``(L, ..., C)``.

    moving average:  trend[t] = mean of x over the k steps around t, the first and the last step repeated at the ends
    DFT:             season = the K largest frequencies of each series, the mean left out;  trend = x - season

Up to `MATRIX_LENGTH` steps the average is a product with a constant (L, L) matrix: in a time-first map that is one
matrix product, forward and backward, where pooling reads every value k times. A trace shows the pooling, so that it is
counted as one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tables import island, table, widen

# longest series that a matrix averages
MATRIX_LENGTH = 256


def averaging_matrix(length: int, kernel: int, device) -> Tensor:
    """(L, L): row t has 1/k for each of the k steps around t, steps beyond the ends standing for the end."""
    steps = torch.arange(length, device=device).unsqueeze(1) + torch.arange(kernel, device=device) - kernel // 2
    ones = torch.full(steps.shape, 1 / kernel, dtype=torch.float64, device=device)
    empty = torch.zeros(length, length, dtype=torch.float64, device=device)
    return empty.scatter_add(1, steps.clamp(0, length - 1), ones)


def by_matrix(length: int) -> bool:
    """Whether the moving average of a series that long is a matrix product."""
    return length <= MATRIX_LENGTH and not torch.jit.is_tracing()


def moving_average(x: Tensor, kernel: int) -> Tensor:
    """Mean over windows of ``kernel`` (odd) steps along the first axis, ends repeated: ``(L, *) -> (L, *)``."""
    if by_matrix(x.shape[0]):
        return torch.mm(table(averaging_matrix, x, x.shape[0], kernel), x.flatten(1)).reshape(x.shape)
    ends = (kernel - 1) // 2
    steps = torch.cat([x[:1].expand(ends, *x.shape[1:]), x, x[-1:].expand(ends, *x.shape[1:])])  # (L + k - 1, *)
    pooled = F.avg_pool2d(steps.flatten(1)[None, None], (kernel, 1), stride=1)  # (1, 1, L, K)
    return pooled.reshape(x.shape)


def strongest_frequencies(x: Tensor, count: int) -> Tensor:
    """Each series along the first axis from its ``count`` largest frequencies but the mean, in float32 inside."""
    length = x.shape[0]
    with island(x):
        bins = torch.fft.rfft(widen(x), dim=0)  # (V, *)
        strength = bins[1:].abs()
        chosen = strength.topk(min(count, strength.shape[0]), dim=0).indices + 1
        kept = torch.zeros_like(bins.real).scatter(0, chosen, 1.0)
        return torch.fft.irfft(bins * kept, n=length, dim=0).to(x.dtype)


def trend(x: Tensor, *, decomposition: str, kernel: int, top_k: int) -> Tensor:
    """The trend of a time-first map by the decomposition of that name: "moving_average" or "dft"."""
    return moving_average(x, kernel) if decomposition == "moving_average" else x - strongest_frequencies(x, top_k)


def check_decomposition(decomposition: str, kernel: int, top_k: int) -> None:
    """Raise ValueError unless `trend` takes these options."""
    if decomposition not in ("moving_average", "dft"):
        raise ValueError(f"decomposition must be 'moving_average' or 'dft', not {decomposition!r}")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and positive, so that the average is centred; got {kernel}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
