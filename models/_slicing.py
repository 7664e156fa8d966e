"""Running a chain of blocks on slices of the batch, so that activations stay in the CPU's cache.

The hidden map of a channel MLP at 56 x 56 is 3 MB an image. A batch of them leaves the cache, and every elementwise
kernel then waits for memory; allocations of that size also go back to the system and are paged in anew each time.
Samples do not see each other, so slices give the same result.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from ..mixers._layers import equal_slices, is_symbolic, observed

# hidden bytes of one slice: larger than what matrix products need to run at full speed, smaller than a CPU's last cache
SLICE_BYTES = 8 * 2**20
# positions of one slice at least, if the maps have fewer channels: oneDNN rearranges the weights anew for every slice
SLICE_POSITIONS = 600


def _mixes_batch(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules())


def samples_per_slice(x: Tensor, hidden: int) -> int:
    """How many samples of ``x`` a slice should have, see `run_sliced`."""
    positions = x.shape[1:-1].numel()
    fewest = -(-max(SLICE_POSITIONS, x.shape[-1]) // positions)
    return max(fewest, SLICE_BYTES // (positions * hidden * x.element_size()))


def run_sliced(blocks: nn.Sequential, x: Tensor, hidden: int) -> Tensor:
    """``blocks(x)``, in slices along the batch where that is faster and cannot be observed.

    Args:
        blocks: modules through which samples do not interact; batch norm in training switches slicing off.
        x: maps ``(B, *grid, C)``.
        hidden: channels of the widest map inside the blocks.
    """
    if is_symbolic(x) or x.device.type != "cpu":
        return blocks(x)
    size = samples_per_slice(x, hidden)
    if size >= x.shape[0] or observed(blocks) or _mixes_batch(blocks):
        return blocks(x)
    return torch.cat([blocks(part) for part in equal_slices(x, size)])
