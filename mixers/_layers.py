"""Small layers that mixers and blocks share: activations, norms, the NCHW wrapper, grid resizing.

All maps are channels-last, ``(B, *grid, C)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.utils.flop_counter import register_flop_formula


def is_symbolic(x: Tensor) -> bool:
    """Whether ``x`` stands for any tensor, in a graph being captured, so that Python must not branch on its shape."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_compiling()


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether operations on ``x`` run on a CPU as they stand: no capture, autocast or transform changes them."""
    if is_symbolic(x) or not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return not transformed and x.dtype in (torch.float32, torch.float64)


def recorded_on_cpu(x: Tensor) -> bool:
    """Whether autograd records operations on ``x`` that run as they stand, see `is_eager_on_cpu`."""
    return torch.is_grad_enabled() and is_eager_on_cpu(x)


def gradients_with_graph(y: Tensor, inputs: Sequence[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """Gradients of those inputs that ask for one, to be differentiated again."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, grad, create_graph=True), strict=True))
    return [found.get(id(t)) for t in inputs]


def observed(module: nn.Module) -> bool:
    """Whether a hook would see the parts of a batch that ``module`` were given one by one."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks or _module._global_backward_hooks:
        return True
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())


def undecayed(model: nn.Module) -> set[str]:
    """Names of parameters that take no weight decay besides vectors and biases: what modules list as ``undecayed``."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "undecayed", ())
    }


_ONEDNN = torch.backends.mkldnn.is_available()
# a kernel of one position has nothing to dilate, but without it torch keeps small batches on one thread from oneDNN
DILATION = 2


def by_convolution(x: Tensor) -> bool:
    """Whether the product of a matrix and ``x`` is faster as a convolution, see `linear`."""
    return not is_symbolic(x) and _ONEDNN and x.is_cpu and x.dtype == torch.float32 and x.ndim > 2


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b over the last axis, ``(B, *grid, C) -> (B, *grid, C')``, like `torch.nn.functional.linear`.

    On a CPU float32 maps go through a 1x1 convolution, which oneDNN runs with the widest vectors of any processor;
    torch's linear asks MKL, whose float32 product is half as fast on AVX-512 machines of other makers (220 against 490
    GFLOP/s on two cores of an EPYC) and equal elsewhere.
    """
    if not by_convolution(x):
        return F.linear(x, weight, bias)
    image = x if x.ndim == 4 else x.flatten(1, -2).unsqueeze(2)  # (B, H, W, C)
    y = F.conv2d(image.permute(0, 3, 1, 2), weight[:, :, None, None], bias, dilation=DILATION).permute(0, 2, 3, 1)
    return y if x.ndim == 4 else y.reshape(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """`torch.nn.Linear` computed by `linear`. Shapes: ``(..., C) -> (..., C')``.

    Where an evaluated model is asked for the gradient of its input, sums are rounded as torch's own layer rounds them:
    max-pooling downstream then breaks near-ties, which route whole gradients, as the published implementations do.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not is_symbolic(x) and x.requires_grad and not self.training:
            return F.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)


def is_plain(modules: Iterable[nn.Module], types: Sequence[type[nn.Module]]) -> bool:
    """Whether modules are of these very types and unobserved, so that what they do may be done in another way."""
    return all(
        type(m) in types and not any((m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks))
        for m in modules
    )


_WITH_GELU = getattr(torch.ops.mkldnn, "_convolution_pointwise", None) if _ONEDNN else None


def _takes_gelu_along(x: Tensor, layer: nn.Module, act: nn.Module) -> bool:
    if is_symbolic(x) or torch.is_grad_enabled() or _WITH_GELU is None or not isinstance(act, nn.GELU):
        return False
    if not x.is_cpu or x.ndim < 3 or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return False
    plain = is_plain((layer, act), (Linear, nn.Conv2d, nn.GELU, _GELU))
    return plain and x.dtype == layer.weight.dtype == torch.float32


def activated(x: Tensor, layer: nn.Module, act: nn.Module) -> Tensor:
    """``act(layer(x))``; on a CPU, where no graph is recorded, oneDNN takes a GELU along on the way to memory.

    Args:
        x: ``(B, *grid, C)`` for a linear layer, ``(B, C, H, W)`` for a convolution.
        layer: a linear layer or a convolution that pads with a number of zeros.
        act: any activation.
    """
    if not _takes_gelu_along(x, layer, act):
        return act(layer(x))
    if isinstance(layer, nn.Conv2d):
        options = layer.padding, layer.stride, layer.dilation, layer.groups
        return _WITH_GELU(x, layer.weight, layer.bias, *options, "gelu", [], act.approximate)
    image = (x if x.ndim == 4 else x.flatten(1, -2).unsqueeze(2)).permute(0, 3, 1, 2)  # (B, C, H, W)
    kernel, ones = layer.weight[:, :, None, None], [1, 1]
    y = _WITH_GELU(image, kernel, layer.bias, [0, 0], ones, ones, 1, "gelu", [], act.approximate).permute(0, 2, 3, 1)
    return y if x.ndim == 4 else y.reshape(*x.shape[:-1], y.shape[-1])


if _WITH_GELU is not None:

    @register_flop_formula(_WITH_GELU)
    def _flops(x: Sequence[int], weight: Sequence[int], *args, out_shape: Sequence[int], **kwargs) -> int:
        """For torch's own counter, in which a multiply-add is two and an activation none."""
        return 2 * math.prod(out_shape) * math.prod(weight[1:])


# elements of the widest map of a slice of the batch: what a CPU's second cache and its memory allocator like
SLICE_ELEMENTS = 2**20


def samples_at_once(x: Tensor, widest: int) -> int:
    """Samples of a batch of maps in one of slices of about the same length; see `by_samples`."""
    slices = -(-x.shape[0] // max(1, SLICE_ELEMENTS // widest)) if x.is_cpu else 1
    return -(-x.shape[0] // max(1, slices))


def by_samples(run: Callable[[Tensor], Tensor], x: Tensor, widest: int) -> Tensor:
    """``run(x)``, on a CPU in slices along the batch, so that intermediate maps stay in its cache.

    Args:
        run: a function through which samples do not interact.
        x: a batch of maps.
        widest: elements of the largest intermediate map of one sample.
    """
    if is_symbolic(x) or (size := samples_at_once(x, widest)) >= x.shape[0]:
        return run(x)
    return torch.cat([run(part) for part in equal_slices(x, size)])


def equal_slices(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """Slices of the batch of at most so many samples, of about the same length.

    One operation, whose gradient is one as well; those of `torch.tensor_split` are padded to the batch and added.
    """
    slices = -(-len(x) // size)
    shorter, more = divmod(len(x), slices)
    return x.split([shorter + 1] * more + [shorter] * (slices - more))


class _StarReLUFunction(torch.autograd.Function):
    """y = s relu(x)^2 + b that keeps x alone for its backward: dx = 2 s relu(x) g, ds = sum g relu(x)^2, db = sum g."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        # in place on a fresh tensor; one-element operands keep the CPU loops vectorised, which addcmul's do not
        y = torch.relu(x)
        return y.mul_(y).mul_(scale).add_(bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, scale, _ = inputs
        ctx.save_for_backward(x, scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale = ctx.saved_tensors
        active = torch.relu(x)
        slope = grad * active
        # a dot product writes no map of products, and in place none of slopes; a second derivative needs both
        once = not torch.is_grad_enabled()
        grad_scale = grad_bias = None
        if ctx.needs_input_grad[1]:
            flat = slope.reshape(-1), active.reshape(-1)
            grad_scale = (torch.dot(*flat) if once else (flat[0] * flat[1]).sum()).reshape(1)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum().reshape(1)
        return slope.mul_(2 * scale) if once else slope * (2 * scale), grad_scale, grad_bias


@register_notrace_module
class StarReLU(nn.Module):
    """StarReLU, ``s relu(x)^2 + b`` with one learnable pair (s, b) a site (arXiv:2210.13452).

    One tensor is kept for the backward pass where the composed form keeps three. Input and output: any shape.
    """

    def __init__(self, scale: float = 1.0, bias: float = 0.0, *, device=None, dtype=None):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), scale, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.full((1,), bias, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        # under autocast x is narrower than the parameters and must stay so
        scale, bias = self.scale.to(x.dtype), self.bias.to(x.dtype)
        if torch.jit.is_scripting() or is_symbolic(x):
            return scale * torch.relu(x).square() + bias
        else:
            return _StarReLUFunction.apply(x, scale, bias)


class InplaceSiLU(nn.Module):
    """x sigmoid(x), in place while no gradients are recorded; otherwise autograd would copy x before."""

    def __init__(self, inplace: bool = True):
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=self.inplace and not torch.is_grad_enabled())


class SquaredReLU(nn.Module):
    """relu(x)^2. Input and output: any shape."""

    def __init__(self, *, device=None, dtype=None):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


class _GELU(nn.GELU):
    def __init__(self, approximate: str = "none", *, device=None, dtype=None):
        super().__init__(approximate)


class _ReLU(nn.ReLU):
    def __init__(self, *, device=None, dtype=None):
        super().__init__()


_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "gelu": _GELU,
    "gelu_tanh": partial(_GELU, "tanh"),
    "relu": _ReLU,
    "star_relu": StarReLU,
    "squared_relu": SquaredReLU,
}


def make_activation(name: str, *, device=None, dtype=None) -> nn.Module:
    """The activation of that name: gelu (erf form), gelu_tanh, relu, star_relu, squared_relu."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"no activation named {name!r}; allowed: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name](device=device, dtype=dtype)


@register_notrace_module
class Dropout(nn.Module):
    """Dropout, y = x m / (1 - p) with P(m = 0) = p, whose mask takes 16 random bits a value on the CPU.

    torch draws a double for every value there, which takes seven times as long and is most of a training step of small
    MLPs. p is rounded to a multiple of 2^-16, and the scale with it. Input and output: any shape.
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"the probability of a dropout must be between 0 and 1, not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if is_symbolic(x) or not x.is_cpu or self.p == 1:
            return F.dropout(x, self.p)
        threshold = min(round(self.p * 2**16), 2**16 - 1)
        # the whole range, of either sign: all 64 bits are random
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        return x * (bits >= threshold - 2**15).to(x.dtype).mul_(2**16 / (2**16 - threshold))

    def extra_repr(self) -> str:
        return f"p={self.p}"


@register_notrace_module
class GroupNorm(nn.Module):
    """Group norm with one group, the "modified layer norm" of PoolFormer, on ``(B, *grid, C)``.

        y = (x - mean) / sqrt(var + eps) * weight + bias,  mean and variance over grid and channels of a sample

    Statistics depend on the whole grid: they see padding and, in a sequence, the future.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu or x.is_meta:
            # a channels-last map is this NCHW view without a copy, and the CPU kernel keeps its layout
            view = x.flatten(1, -2).unsqueeze(2).permute(0, 3, 1, 2)  # (B, C, N, 1)
            y = torch.group_norm(view, 1, self.weight, self.bias, self.eps)
            return y.permute(0, 2, 3, 1).reshape_as(x)  # (B, *grid, C)
        # elsewhere group_norm would leave channels-first memory behind
        y = F.layer_norm(x, x.shape[1:], None, None, self.eps) * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"


class BatchNorm(nn.BatchNorm1d):
    """Batch norm on ``(B, *grid, C)``: mean and variance of a channel over batch and grid."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)


_NORMS: dict[str, Callable[..., nn.Module]] = {
    "layer": nn.LayerNorm,
    "layer_nobias": partial(nn.LayerNorm, bias=False),
    "group": GroupNorm,
    "group_nobias": partial(GroupNorm, bias=False),
    "batch": BatchNorm,
}


def make_norm(name: str | None, dim: int, *, eps: float, device=None, dtype=None) -> nn.Module:
    """The norm of that name over channels-last maps; None gives the identity.

    ``layer``: mean and variance over the channels of a position; ``group``: over grid and channels of a sample;
    both with a weight per channel and, unless ``_nobias``, a bias. ``batch``: of a channel over batch and grid.
    """
    if name is None:
        return nn.Identity()
    if name not in _NORMS:
        raise ValueError(f"no norm named {name!r}; allowed: {', '.join(_NORMS)} or None")
    return _NORMS[name](dim, eps=eps, device=device, dtype=dtype)


class NCHW(nn.Module):
    """A channels-last mixer for code that keeps channels first: ``(B, C, *grid) -> (B, C, *grid)``."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x.movedim(1, -1)).movedim(-1, 1)


def nchw(mixer: nn.Module) -> NCHW:
    """Wrap a mixer for maps ``(B, C, H, W)`` or ``(B, C, N)``; in `torch.channels_last` memory nothing is copied.

    >>> block = nchw(create_mixer("pooling", 64))
    >>> block(torch.randn(2, 64, 7, 9)).shape
    torch.Size([2, 64, 7, 9])
    """
    return NCHW(mixer)


def check_grid(x: Tensor, grid: Sequence[int], name: str) -> None:
    """Raise unless ``x`` is ``(B, *grid, C)``; graphs are captured without the check.

    Raises:
        ValueError: the map has another grid than the mixer's parameters.
    """
    if not is_symbolic(x) and list(x.shape[1:-1]) != list(grid):
        raise ValueError(
            f"{name} was built for the grid {list(grid)} but got a map of grid {list(x.shape[1:-1])}; "
            "call set_grid_size on the mixer, or set_input_size on the model, first"
        )


def resample(values: Tensor, grid: Sequence[int], mode: str) -> Tensor:
    """Resample ``(K, C, *old_grid)`` to ``(K, C, *grid)`` in float32; mode "cubic" (rank 1, 2), "linear" or "nearest".

    Corners are not aligned, and smaller grids are not low-pass filtered first.
    """
    dtype, rank = values.dtype, values.ndim - 2
    grid = tuple(grid)
    values = values.float()
    if rank == 1:
        values, grid = values.unsqueeze(2), (1, *grid)
    linear = "trilinear" if rank == 3 else "bilinear"
    name = {"cubic": "bicubic", "linear": linear, "nearest": "nearest-exact"}[mode]
    options = {} if mode == "nearest" else {"align_corners": False}
    values = F.interpolate(values, size=grid, mode=name, **options)
    return (values.squeeze(2) if rank == 1 else values).to(dtype)


def resample_token_matrix(matrix: Tensor, old: Sequence[int], new: Sequence[int], mode: str = "linear") -> Tensor:
    """Resample an ``(N_out, N_in)`` matrix over tokens from one grid to another on both of its sides.

    Rows are sampled at the new output positions. Columns are sampled at the new input positions and scaled by
    N_in / N_in_new, so that a constant map keeps its image.
    """
    old, new = tuple(old), tuple(new)
    n_old, n_new = math.prod(old), math.prod(new)
    rows = resample(matrix.T.reshape(n_old, 1, *old), new, mode).reshape(n_old, n_new)  # (N_in, N_out')
    both = resample(rows.T.reshape(n_new, 1, *old), new, mode).reshape(n_new, n_new)  # (N_out', N_in')
    return both * (n_old / n_new)
