"""Past-decomposable mixing and future-multipredictor mixing of TimeMixer: a series at several scales.

Paper: arXiv:2405.14616. Checked against kwuking/TimeMixer at 8d230b7.

Scales h_0 .. h_M, h_i: (B, L_i, C), h_0 the finest. A (see `_decomposition`) takes the trend of a series:

    t_i = A h_i,  s_i = h_i - t_i                            with ``cross``: both then pass one MLP over the channels
    S_0 = s_0,    S_{i+1} = s_{i+1} + D_i S_i                fine to coarse
    T_M = t_M,    T_i = t_i + U_i T_{i+1}                    coarse to fine
    h_i <- h_i + mlp(S_i + T_i)                              with ``cross``: h_i <- S_i + T_i

D_i, U_i: Linear - GELU - Linear over time. As s_i + t_i = h_i, only the inputs of D and U need the split, and the first
D takes its season as W (I - A). The predictors then map every scale to H steps and sum: y = sum_i P_i (h_i w), with the
projection w over the channels first, which is C times cheaper than after P_i.

Maps are batch-first at the surface and time-first, ``(L, B, C)``, in memory: there both kinds of linear layer are one
matrix product without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._decomposition import averaging_matrix, by_matrix, check_decomposition, trend
from ._layers import check_grid, resample
from ._registry import register_mixer
from ._tables import table


class TimeLinear(nn.Linear):
    """A linear layer over the first axis, ``(L, *) -> (L', *)``, optionally of (I - A) x in place of x."""

    def forward(self, x: Tensor, season_of: int = 0) -> Tensor:
        weight = self.weight
        if season_of:
            weight = weight - weight @ table(averaging_matrix, weight, x.shape[0], season_of)
        y = torch.addmm(self.bias.unsqueeze(1), weight, x.flatten(1))
        return y.reshape(-1, *x.shape[1:])


class TimeMlp(nn.Module):
    """Linear, GELU, linear over the first axis: ``(L, *) -> (L', *)``, hidden width L'."""

    def __init__(self, before: int, after: int, *, device=None, dtype=None):
        super().__init__()
        self.fc1 = TimeLinear(before, after, device=device, dtype=dtype)
        self.fc2 = TimeLinear(after, after, device=device, dtype=dtype)

    def forward(self, x: Tensor, season_of: int = 0) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x, season_of)))


class FeatureMlp(nn.Module):
    """Linear, GELU, linear over the last axis: ``(..., C) -> (..., C)``."""

    def __init__(self, dim: int, hidden: int, *, device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def scale_lengths(length: int, window: int, levels: int) -> tuple[int, ...]:
    """Steps of every scale, the finest first; each has the whole windows of the one before.

    Raises:
        ValueError: a scale would have no step left.
    """
    if window < 2 or levels < 0:
        raise ValueError(f"window must be at least 2 and levels at least 0, got {window} and {levels}")
    lengths = [length]
    for _ in range(levels):
        lengths.append(lengths[-1] // window)
    if lengths[-1] < 1:
        raise ValueError(
            f"a series of {length} steps cannot be divided by {window} {levels} times: its scales would have {lengths} "
            f"steps; at least {window**levels} are needed"
        )
    return tuple(lengths)


def pooled_scales(x: Tensor, lengths: Sequence[int], window: int, kind: str = "avg") -> list[Tensor]:
    """The series ``(B, L, C)`` at every scale, each the mean or maximum over windows of the one before."""
    scales = [x]
    for length in lengths[1:]:
        windows = scales[-1][:, : length * window].unflatten(1, (length, window))  # (B, L_i, window, C)
        scales.append(windows.mean(2) if kind == "avg" else windows.amax(2))
    return scales


class PastDecomposableMixing(nn.Module):
    """One block of TimeMixer on a list of scales: ``[(B, L_i, C)] -> [(B, L_i, C)]``.

    Args:
        dim: channels C. lengths: steps L_i of the scales, the finest first. hidden: width of the MLP over channels.
        kernel: odd window of the moving average. decomposition: "moving_average" or "dft". top_k: its frequencies.
        cross: split parts pass the MLP before mixing and there is no skip, as for mixed channels in the paper's code.
    """

    def __init__(
        self,
        dim: int,
        lengths: Sequence[int],
        *,
        hidden: int,
        kernel: int = 25,
        decomposition: str = "moving_average",
        top_k: int = 5,
        cross: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_decomposition(decomposition, kernel, top_k)
        dd = {"device": device, "dtype": dtype}
        self.trend = partial(trend, decomposition=decomposition, kernel=kernel, top_k=top_k)
        # kernel of the average that the first layer of D_0 can take in; 0 for none
        self.kernel = kernel if decomposition == "moving_average" else 0
        pairs = list(pairwise(lengths))
        self.down = nn.ModuleList(TimeMlp(fine, coarse, **dd) for fine, coarse in pairs)
        # in the order they are used: the coarsest pair first
        self.up = nn.ModuleList(TimeMlp(coarse, fine, **dd) for fine, coarse in reversed(pairs))
        self.cross = FeatureMlp(dim, hidden, **dd) if cross else None
        self.out = None if cross else FeatureMlp(dim, hidden, **dd)

    def forward(self, scales: Sequence[Tensor], finest: bool = False) -> list[Tensor]:
        """All scales, or with ``finest`` that one alone, which the seasons of the others do not reach."""
        first = [h.transpose(0, 1) for h in scales]  # (L_i, B, C)
        mixed = self._mix_summed(first, finest) if self.cross is None else self._mix_split(first, finest)
        return [h.transpose(0, 1) for h in mixed]  # (B, L_i, C)

    def _mix_summed(self, scales: list[Tensor], finest: bool) -> list[Tensor]:
        last = len(scales) - 1
        folds = self.kernel > 0 and by_matrix(scales[0].shape[0])
        # the finest trend serves its season alone, which is folded into the first layer where it can be
        unused = folds or finest or not last
        trends = [None if i == 0 and unused else self.trend(h) for i, h in enumerate(scales)]
        sums = list(scales)
        season = scales[0] if trends[0] is None else scales[0] - trends[0]
        for i, down in enumerate(() if finest else self.down):
            mixed = down(season, self.kernel if i == 0 and folds else 0)
            sums[i + 1] = sums[i + 1] + mixed
            if i + 1 < last:
                season = sums[i + 1] - trends[i + 1]
        coarser = trends[last]
        for i, up in zip(reversed(range(last)), self.up, strict=True):
            mixed = up(coarser)
            sums[i] = sums[i] + mixed
            if i > 0:
                coarser = trends[i] + mixed
        wanted = slice(1 if finest else None)
        return [h + self.out(total) for h, total in zip(scales[wanted], sums[wanted], strict=True)]

    def _mix_split(self, scales: list[Tensor], finest: bool) -> list[Tensor]:
        wanted = slice(1 if finest else None)
        slow = [self.trend(h) for h in scales]
        trends = [self.cross(part) for part in slow]
        seasons = [self.cross(h - part) for h, part in zip(scales[wanted], slow[wanted], strict=True)]
        for i, down in enumerate(() if finest else self.down):
            seasons[i + 1] = seasons[i + 1] + down(seasons[i])
        for i, up in zip(reversed(range(len(scales) - 1)), self.up, strict=True):
            trends[i] = trends[i] + up(trends[i + 1])
        return [season + trend for season, trend in zip(seasons, trends[wanted], strict=True)]


class FutureMultipredictorMixing(nn.Module):
    """Predictors of all scales, summed: ``[(B, L_i, C)] -> (B, H, K)``, y = sum_i (P_i h_i) w + c.

    Args:
        dim: channels C. lengths: steps L_i. horizon: steps H. outputs: K, 1 where every row is one series.
    """

    def __init__(self, dim: int, lengths: Sequence[int], horizon: int, outputs: int = 1, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.time = nn.ModuleList(TimeLinear(length, horizon, **dd) for length in lengths)
        self.projection = nn.Linear(dim, outputs, **dd)

    def forward(self, scales: Sequence[Tensor], added: Tensor | None = None) -> Tensor:
        """``added``, ``(H, B, C)`` or broadcast to it, joins every scale before the projection."""
        weight, constant = self.projection.weight, self.projection.bias
        narrow = weight.shape[0] <= weight.shape[1]
        total = 0
        for h, time in zip(scales, self.time, strict=True):
            h = h.transpose(0, 1)  # (L_i, B, C)
            # both maps are linear: the one that leaves less comes first, and P's bias meets the sums of the rows of w
            z = h @ weight.t() if narrow else h
            bias = torch.outer(time.bias, weight.sum(1)) if narrow else time.bias.unsqueeze(1)  # (H, K) or (H, 1)
            y = torch.mm(time.weight, z.flatten(1)).reshape(-1, *z.shape[1:])
            # parameters are wider than the maps under autocast
            y = y + bias.unsqueeze(1).to(y.dtype)
            total = total + (y if narrow else y @ weight.t())
        total = total + len(self.time) * constant.to(total.dtype)
        if added is not None:
            total = total + len(self.time) * (added @ weight.t())
        return total.transpose(0, 1)


@register_mixer("decomposable_mixing", ranks=(1,), needs_grid=True, paper="arXiv:2405.14616")
class DecomposableMixing(nn.Module):
    """TimeMixer's two mixings as one token mixer: scales of the input, past mixing, predictors to the same steps.

    Args:
        dim: channels C.
        grid_size: (L,) steps.
        levels: scales besides the input's, as many as leave a step. window: steps that one of the next is made of.
        ratio: hidden width of the MLP over C.
        kernel, decomposition, top_k: see `PastDecomposableMixing`.

    Shapes: ``(B, L, C) -> (B, L, C)``; any other grid is refused.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 1,
        grid_size: Sequence[int],
        levels: int = 1,
        window: int = 2,
        ratio: float = 2.0,
        kernel: int = 25,
        decomposition: str = "moving_average",
        top_k: int = 5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.grid_size, self.window, self.levels = tuple(grid_size), window, levels
        self._sizes = {"dim": dim, "hidden": int(ratio * dim)}
        self._split = {"kernel": kernel, "decomposition": decomposition, "top_k": top_k}
        self.lengths = scale_lengths(self.grid_size[0], window, levels)
        self.past, self.future = self._parts(self.lengths, device=device, dtype=dtype)

    def _parts(self, lengths: Sequence[int], **dd) -> tuple[PastDecomposableMixing, FutureMultipredictorMixing]:
        """Past and future mixing for scales of these lengths."""
        dim = self._sizes["dim"]
        past = PastDecomposableMixing(lengths=lengths, **self._sizes, **self._split, **dd)
        return past, FutureMultipredictorMixing(dim, lengths, lengths[0], dim, **dd)

    def resize_grid_state(self, state: dict[str, Tensor], old: Sequence[int], new: Sequence[int]) -> dict[str, Tensor]:
        """The mixer's state dict for another number of steps. The authors give no procedure: all matrices over time are
        resampled linearly, scaled so that a constant series keeps its values; an approximation."""
        if tuple(old) == tuple(new):
            return dict(state)
        parts = self._parts(scale_lengths(new[0], self.window, self.levels), device="meta")
        resized = {}
        for key, wanted in nn.ModuleDict(zip(("past", "future"), parts, strict=True)).state_dict().items():
            tensor = state[key]
            if tensor.shape != wanted.shape:
                scale = tensor.shape[1] / wanted.shape[1] if tensor.ndim == 2 else 1.0
                tensor = resample(tensor[None, None], tuple(wanted.shape), "linear")[0, 0] * scale
            resized[key] = tensor
        return resized

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Resize all matrices over time, see `resize_grid_state`; before optimizer, DDP or compile."""
        own = dict(self.named_parameters())
        state = {key: p.data for key, p in own.items()}
        for key, tensor in self.resize_grid_state(state, self.grid_size, grid_size).items():
            if tensor is not state[key]:
                layer, _, kind = key.rpartition(".")
                module = self.get_submodule(layer)
                setattr(module, kind, nn.Parameter(tensor, requires_grad=own[key].requires_grad))
                if kind == "weight":
                    module.out_features, module.in_features = tensor.shape
        self.grid_size = tuple(grid_size)
        self.lengths = scale_lengths(self.grid_size[0], self.window, self.levels)

    def forward(self, x: Tensor) -> Tensor:
        check_grid(x, self.grid_size, "decomposable_mixing")
        # time-first in memory, as the layers want it
        first = x.transpose(0, 1).contiguous().transpose(0, 1)
        return self.future(self.past(pooled_scales(first, self.lengths, self.window)))

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, scales={self.lengths}"
