"""What makes any model traceable by `torch.jit` and leaves it as it was; see `complexity`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class TensorCall(nn.Module):
    """Calls a model with positional or named tensors and returns the tensors of whatever it returns.

    Args:
        model: the model, whose only further name is "model".
        names: argument names of the tensors; None for positional ones.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None = None):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = self.names is not None
        output = self.model(**dict(zip(self.names, tensors, strict=True))) if named else self.model(*tensors)
        return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, compiled parts or fused fast paths; afterwards the model is as it was.

    Raises:
        ValueError: a part of the model is TorchScript.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"module {name!r} is TorchScript, which hides its operators; give the Python module")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_RecordConvolutions())
        # the fast path would show as one operator; the composed form has the same matrix products
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for module in list(model.modules()):
            stack.callback(setattr, module, "training", module.training)
            module.training = False
            # fvcore leaves its hooks behind when the model raises
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                stack.callback(_keep_only, hooks, set(hooks))
            _uncompile(module, stack)
        yield


def _keep_only(hooks: dict[int, Callable], known: set[int]) -> None:
    for key in set(hooks) - known:
        del hooks[key]


def _uncompile(module: nn.Module, stack: ExitStack) -> None:
    """Put the original modules in place of compiled ones, which refuse to be traced, until the stack unwinds."""
    if module._compiled_call_impl is not None:
        stack.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
        module._compiled_call_impl = None
    for name, child in module._modules.items():
        if isinstance(getattr(child, "_orig_mod", None), nn.Module):
            stack.callback(module._modules.__setitem__, name, child)
            module._modules[name] = child._orig_mod


class _RecordConvolutions(TorchFunctionMode):
    """Lets convolutions of meta tensors enter the trace.

    The tracer records `aten::_convolution`, which meta tensors never reach, because their kernel stands one operator
    above it. Here they go straight to it.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS and (args[0] if args else kwargs["input"]).is_meta:
            func = _CONVOLUTIONS[func]
        return func(*args, **kwargs)


def _convolution(
    rank: int, input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups: int = 1
) -> Tensor:
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(_sides(dilation, rank), weight.shape[2:], strict=True)]
        input = F.pad(input, [side for total in reversed(totals) for side in (total // 2, total - total // 2)])
    padding = 0 if isinstance(padding, str) else padding
    return _convolve(rank, input, weight, bias, (stride, padding, dilation), False, 0, groups)


def _transposed_convolution(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias=None,
    stride=1,
    padding=0,
    output_padding=0,
    groups: int = 1,
    dilation=1,
) -> Tensor:
    return _convolve(rank, input, weight, bias, (stride, padding, dilation), True, output_padding, groups)


def _convolve(
    rank: int, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple, transposed: bool, output_padding, groups
) -> Tensor:
    geometry = [_sides(value, rank) for value in geometry]
    flags = (False, False, True, True)  # of cuDNN
    y = x if x.ndim == rank + 2 else x.unsqueeze(0)
    y = torch._convolution(y, weight, bias, *geometry, transposed, _sides(output_padding, rank), groups, *flags)
    return y if x.ndim == rank + 2 else y.squeeze(0)


def _sides(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One value for each axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


_CONVOLUTIONS = {
    F.conv1d: partial(_convolution, 1),
    F.conv2d: partial(_convolution, 2),
    F.conv3d: partial(_convolution, 3),
    F.conv_transpose1d: partial(_transposed_convolution, 1),
    F.conv_transpose2d: partial(_transposed_convolution, 2),
    F.conv_transpose3d: partial(_transposed_convolution, 3),
}
