"""What makes any model traceable by `torch.jit` and leaves it as it was; see `complexity`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
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
def traceable(model: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Eval mode without gradients, compiled parts or fused fast paths; afterwards the model is as it was.

    Args:
        model: the model.
        tensors: its inputs.

    Raises:
        ValueError: a part of the model is TorchScript.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"module {name!r} is TorchScript, which hides its operators; give the Python module")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if any(tensor.is_meta for tensor in tensors):
            stack.enter_context(_RecordConvolutions())
            stack.enter_context(_RememberKernels())
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


class _RememberKernels(TorchDispatchMode):
    """Runs a kernel of meta tensors once for the same shapes: many are slow Python, and blocks repeat.

    Only operators that return new tensors are remembered, by everything their outputs can depend on.
    """

    def __init__(self):
        super().__init__()
        self.known: dict[tuple, tuple[type, list[tuple | None]]] = {}

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        try:
            key = (func, _described(args), _described(tuple(kwargs.items()))) if _is_functional(func) else None
            known = self.known.get(key)
        except TypeError:
            # a tensor with values, or something unhashable
            key = known = None
        if known is not None:
            kind, outputs = known
            made = [torch.empty_strided(*o[:2], dtype=o[2], device="meta") if o else None for o in outputs]
            return tuple(made) if kind is tuple else made[0]
        output = func(*args, **kwargs)
        outputs = output if isinstance(output, tuple) else (output,)
        if key is not None and all(o is None or o.is_meta for o in outputs):
            self.known[key] = type(output), [None if o is None else _described(o) for o in outputs]
        return output


@cache
def _is_functional(func: OpOverload) -> bool:
    returns = func._schema.returns
    return not func._schema.is_mutable and all(str(r.type) == "Tensor" and r.alias_info is None for r in returns)


def _described(value: Any) -> Any:
    """A key for an argument: of a meta tensor its layout, of anything else the value with its type."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError("its values could matter")
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value
