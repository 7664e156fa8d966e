"""Parameters and operations of any model, counted by fvcore over one trace.

How we count, for one forward pass in eval mode and for the whole batch:

    macs            matrix products and convolutions, a multiply-add is one; biases are free. This is the figure that
                    papers print. Attention counts 2 B G N M D, fused or not, causal or not.
    transform_macs  FFTs at 5 N log2 N flops a complex transform of N points, half of that for a real one; complex
                    products at 6 flops, complex sums at 2; a MAC is two flops
    norm_ops        5 an element of a normalisation layer, 2 of a batch norm
    other_ops       norm_ops, and: activations and arithmetic 1 an element of the result, `addcmul` 2, softmax 5;
                    sums, means, extrema 1 an element of the input, variances 3; pooling 1 for every position of the
                    window, adaptive pooling 1 an element of the input, bilinear resizing 4 an element of the result
    activations     elements written by what `macs` counts
    free            copies, views, padding, indexing, comparisons, arithmetic on integers and booleans, dropout
    uncounted       every operator that is neither counted nor free, with its number of calls

Rules stand in `mixzoo.mixers._counting`, or beside the operator they belong to.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..mixers._counting import COLUMNS, FREE, RULES, Rule

# the figures that `macs_by` adds up
_MACS_COLUMNS = {"matmul": "macs", "transform": "transform_macs", "norm": "norm_ops"}


@dataclass(frozen=True)
class Counts:
    """Operations of an operator, a module or a model; the module's docstring says what each figure holds."""

    macs: int = 0
    transform_macs: int = 0
    norm_ops: int = 0
    other_ops: int = 0
    activations: int = 0

    def macs_by(self, rule: str) -> int:
        """Multiply-adds as somebody else counted them.

        Args:
            rule: "matmul", "transform", "norm" (its operations taken for multiply-adds, as fvcore does) or several
                joined by "+".

        Raises:
            ValueError: the rule names something else.
        """
        columns = rule.split("+")
        unknown = [column for column in columns if column not in _MACS_COLUMNS]
        if unknown:
            raise ValueError(f"a rule joins some of {', '.join(_MACS_COLUMNS)} by '+'; {rule!r} has {unknown[0]!r}")
        return sum(getattr(self, _MACS_COLUMNS[column]) for column in columns)


@dataclass(frozen=True)
class ModuleCounts(Counts):
    """Operations and parameters of a module with everything inside it; `frozen_parameters` are among `parameters`."""

    parameters: int = 0
    frozen_parameters: int = 0

    @property
    def trainable_parameters(self) -> int:
        return self.parameters - self.frozen_parameters


@dataclass(frozen=True)
class Complexity(ModuleCounts):
    """What `complexity` found out about a model.

    Attributes:
        by_operator: counts of every kind of operator, such as "linear", largest MACs first.
        by_module: counts of every module by dotted name; a module includes its children, "" is the model.
        uncounted: operators that no rule covers and that are not known to be free, with their number of calls.
        input_shapes: shapes of the inputs, in order.
    """

    by_operator: Mapping[str, Counts] = field(default_factory=dict, repr=False)
    by_module: Mapping[str, ModuleCounts] = field(default_factory=dict, repr=False)
    uncounted: Mapping[str, int] = field(default_factory=dict)
    input_shapes: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        frozen = f" ({self.frozen_parameters / 1e6:.3f} M frozen)" if self.frozen_parameters else ""
        transform = f", {self.transform_macs / 1e9:.4f} transform GMACs" if self.transform_macs else ""
        lines = [
            f"{self.parameters / 1e6:.3f} M parameters{frozen}, {self.macs / 1e9:.4f} GMACs{transform}, "
            f"{self.other_ops / 1e9:.4f} G other operations, {self.activations / 1e6:.3f} M activations "
            f"for inputs of {', '.join(map(str, self.input_shapes))}"
        ]
        lines += [f"uncounted: {operator} ({calls} calls)" for operator, calls in self.uncounted.items()]
        return "\n".join(lines)


def complexity(
    model: nn.Module,
    input_size: int | Sequence[int] | None = None,
    *,
    batch_size: int = 1,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
) -> Complexity:
    """Count parameters, multiply-adds and other operations of a model; the module's docstring says how.

    The model is left as it was. It may be compiled, wrapped for data-parallel training, or on the meta device, where
    no weights are needed:

    >>> with torch.device("meta"):
    ...     model = mixzoo.create_model("caformer_b36")
    >>> mixzoo.complexity(model).macs
    23194914816

    Args:
        model: any module that `torch.jit.trace` can trace.
        input_size: of one image, a side or (H, W) in pixels, or the whole shape of an input without the batch.
            Default: the model's ``img_size``, else timm's ``pretrained_cfg["input_size"]``, else 224 pixels; with the
            model's ``in_chans`` channels, else 3.
        batch_size: inputs at once; counts are for all of them.
        inputs: a tensor, positional tensors, or tensors by argument name, for models that take other things than one
            image; they are moved to the model's device.

    Raises:
        ValueError: impossible or contradictory sizes.
    """
    if inputs is not None and (input_size is not None or batch_size != 1):
        raise ValueError("give either inputs, which have their own sizes, or input_size and batch_size")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    model = _unwrap(model)
    first = next(model.parameters(), torch.empty(0))
    if inputs is None:
        shape = (batch_size, *_input_shape(model, input_size))
        floating = first.dtype if first.is_floating_point() else torch.float32
        inputs = (torch.zeros(shape, device=first.device, dtype=floating),)
    elif isinstance(inputs, Tensor):
        inputs = (inputs,)
    names = tuple(inputs) if isinstance(inputs, Mapping) else None
    tensors = tuple(inputs.values() if isinstance(inputs, Mapping) else inputs)
    tensors = tuple(tensor.to(first.device) for tensor in tensors)
    counted, unsupported = _count(model, names, tensors)
    return _summary(model, counted, unsupported, tensors)


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and data-parallel wrappers."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def _input_shape(model: nn.Module, input_size: int | Sequence[int] | None) -> tuple[int, ...]:
    """Shape of one input without the batch."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if input_size is None:
        input_size = getattr(model, "img_size", None) or cfg.get("input_size", 224)
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if not size or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"input_size must be positive integers: a side, (H, W) or a shape; not {input_size!r}")
    if len(size) == 1:
        return size
    channels = getattr(model, "in_chans", None) or cfg.get("input_size", (3,))[0]
    return (channels, *size) if len(size) == 2 else size


class _Call(nn.Module):
    """Calls a model with named or positional tensors and returns the tensors of whatever it returns."""

    def __init__(self, model: nn.Module, names: Sequence[str] | None):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = self.names is not None
        output = self.model(**dict(zip(self.names, tensors, strict=True))) if named else self.model(*tensors)
        return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _count(
    model: nn.Module, names: Sequence[str] | None, tensors: tuple[Tensor, ...]
) -> tuple[dict[str, Counter], Counter]:
    """Counts of (operator, column) for every module, and calls of operators that fvcore found no rule for."""
    with warnings.catch_warnings():
        # importing it compiles TorchScript functions, which warns
        warnings.simplefilter("ignore")
        from fvcore.nn.jit_analysis import JitModelAnalysis

    with _traceable(model):
        analysis = JitModelAnalysis(_Call(model, names), tensors)
        analysis.tracer_warnings("none").unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle(**{operator: partial(_handle, operator, rule) for operator, rule in RULES.items()})
        analysis.set_op_handle(**dict.fromkeys(FREE))
        by_module = analysis.by_module_and_operator()
        unsupported = analysis.unsupported_ops()
    # the model is the one child of `_Call`
    return {name.removeprefix("model").removeprefix("."): c for name, c in by_module.items() if name}, unsupported


def _handle(operator: str, rule: Rule, inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter:
    """fvcore's form of a rule: one trace fills all columns, and what the rule cannot say is recorded too."""
    counted = rule(inputs, outputs)
    if counted is None:
        return Counter({(operator, "uncounted"): 1})
    name = operator.rpartition("::")[2].strip("_")
    return Counter({(name, column): n for column, n in counted.items() if n})


def _counts(counter: Counter, operator: str | None = None) -> dict[str, int]:
    """Fields of `Counts` from counts by (operator, column), of one operator or of all."""
    columns = dict.fromkeys(COLUMNS, 0)
    for (name, column), n in counter.items():
        if column in columns and operator in (None, name):
            columns[column] += n
    return {
        "macs": round(columns["matmul"]),
        "transform_macs": round(columns["transform"]),
        "norm_ops": round(columns["norm"]),
        "other_ops": round(columns["norm"] + columns["other"]),
        "activations": round(columns["activations"]),
    }


def _summary(
    model: nn.Module, counted: Mapping[str, Counter], unsupported: Counter, tensors: Sequence[Tensor]
) -> Complexity:
    total = counted[""]
    uncounted = unsupported + Counter({name: n for (name, column), n in total.items() if column == "uncounted"})
    by_operator = {
        name: Counts(**_counts(total, name)) for name in sorted({name for name, column in total if column in COLUMNS})
    }
    by_module = {
        name: ModuleCounts(**_counts(counted[name]), **_parameters(module))
        for name, module in model.named_modules()
        if name in counted
    }
    return Complexity(
        **_counts(total),
        **_parameters(model),
        by_operator=dict(sorted(by_operator.items(), key=lambda item: (-item[1].macs, -item[1].other_ops))),
        by_module=by_module,
        uncounted=dict(sorted(uncounted.items())),
        input_shapes=tuple(tuple(tensor.shape) for tensor in tensors),
    )


def _parameters(module: nn.Module) -> dict[str, int]:
    parameters = list(module.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "frozen_parameters": sum(p.numel() for p in parameters if not p.requires_grad),
    }


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, fused fast paths or compiled parts; afterwards the model is as it was."""
    modules = list(model.modules())
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"module {name!r} is TorchScript, which hides its operators; give the Python module")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if any(parameter.is_meta for parameter in model.parameters()):
            stack.enter_context(_RecordConvolutions())
        # it would show as one operator; the composed form has the same matrix products
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for module in modules:
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

    The tracer records `aten::_convolution`, which meta tensors never reach: their kernel sits one operator above. Here
    they are called by that name.
    """

    _RANKS = {  # noqa: RUF012 - constant
        F.conv1d: 1,
        F.conv2d: 2,
        F.conv3d: 3,
        F.conv_transpose1d: 1,
        F.conv_transpose2d: 2,
        F.conv_transpose3d: 3,
    }
    _TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func not in self._RANKS:
            return func(*args, **(kwargs or {}))
        convolve = self._transposed if func in self._TRANSPOSED else self._forward
        return convolve(self._RANKS[func], *args, **(kwargs or {}))

    @classmethod
    def _forward(cls, rank, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(_tuple(dilation, rank), weight.shape[2:], strict=True)]
            input = F.pad(input, [side for total in reversed(totals) for side in (total // 2, total - total // 2)])
        padding = 0 if isinstance(padding, str) else padding
        return cls._convolve(rank, input, weight, bias, stride, padding, dilation, False, 0, groups)

    @classmethod
    def _transposed(
        cls, rank, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    ) -> Tensor:
        return cls._convolve(rank, input, weight, bias, stride, padding, dilation, True, output_padding, groups)

    @staticmethod
    def _convolve(rank, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups) -> Tensor:
        stride, padding, dilation, output_padding = (
            _tuple(value, rank) for value in (stride, padding, dilation, output_padding)
        )
        batched = input.ndim == rank + 2
        output = torch._convolution(
            *(input if batched else input.unsqueeze(0), weight, bias, stride, padding, dilation, transposed),
            *(output_padding, groups, False, False, True, True),
        )
        return output if batched else output.squeeze(0)


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * rank if len(values) == 1 else values
