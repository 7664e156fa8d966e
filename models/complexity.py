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
    free            copies, views, padding, indexing, comparisons, arithmetic on integers, booleans and single
                    numbers, dropout
    uncounted       every operator that is neither counted nor free, with its number of calls

Rules stand in `mixzoo.mixers._counting`, or beside the operator they belong to.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..mixers._counting import COLUMNS, FREE, RULES, Rule
from ._inputs import example_inputs
from ._tracing import TensorCall, traceable

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
        frozen = f" ({_si(self.frozen_parameters)} frozen)" if self.frozen_parameters else ""
        transform = f", {_si(self.transform_macs, 'MACs')} of transforms" if self.transform_macs else ""
        sizes = ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)
        lines = [
            f"{_si(self.parameters)} parameters{frozen}, {_si(self.macs, 'MACs')}{transform}, "
            f"{_si(self.other_ops)} other operations, {_si(self.activations)} activations for {sizes}"
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
    23160476160

    Args:
        model: any module that `torch.jit.trace` can trace.
        input_size: of one image, a side or (H, W) in pixels, or the whole shape of an input without the batch; of a
            text encoder, the number of tokens. Default: the model's ``img_size`` (longest sequence, context), else
            timm's ``pretrained_cfg["input_size"]``, else 224 pixels; with the model's ``in_chans`` channels, else 3.
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
    first = next(model.parameters(), None)
    if inputs is None and getattr(model, "modality", "image") != "image":
        inputs = example_inputs(model, batch_size, size=input_size)
    elif inputs is None:
        shape = (batch_size, *_input_shape(model, input_size))
        inputs = torch.zeros(shape, dtype=None if first is None else first.dtype)
    names = tuple(inputs) if isinstance(inputs, Mapping) else None
    tensors = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs.values() if names else inputs)
    if first is not None:
        tensors = tuple(tensor.to(first.device) for tensor in tensors)
    # the tracer writes the whole Python stack beside every operator, and that of a new thread is short
    with ThreadPoolExecutor(1) as thread:
        counted, unsupported = thread.submit(_count, model, names, tensors).result()
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


def _count(
    model: nn.Module, names: Sequence[str] | None, tensors: tuple[Tensor, ...]
) -> tuple[dict[str, Counter], Counter]:
    """Counts of (operator, column) for every module, and calls of operators that fvcore found no rule for."""
    with warnings.catch_warnings():
        # importing it compiles TorchScript functions, which warns
        warnings.simplefilter("ignore")
        from fvcore.nn.jit_analysis import JitModelAnalysis

    with traceable(model, tensors):
        analysis = JitModelAnalysis(TensorCall(model, names), tensors)
        analysis.tracer_warnings("none").unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle(**{operator: partial(_handle, operator, rule) for operator, rule in RULES.items()})
        analysis.set_op_handle(**dict.fromkeys(FREE))
        by_module = analysis.by_module_and_operator()
        unsupported = analysis.unsupported_ops()
    # the model is the one child of `TensorCall`
    return {name.removeprefix("model").removeprefix("."): c for name, c in by_module.items() if name}, unsupported


def _handle(operator: str, rule: Rule, inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter:
    """fvcore's form of a rule: one trace fills all columns, and what the rule cannot say is recorded too."""
    counted = rule(inputs, outputs)
    if counted is None:
        return Counter({(operator, "uncounted"): 1})
    # in-place forms and convolutions with their padding by name go with the plain operator
    name = operator.rpartition("::")[2].strip("_").removesuffix("_mode")
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
    # compiled parts were traced without their wrapper
    modules = {name.replace("._orig_mod", ""): module for name, module in model.named_modules()}
    by_module = {
        name: ModuleCounts(**_counts(counted.get(name, Counter())), **_parameters(module))
        for name, module in modules.items()
    }
    return Complexity(
        **_counts(total),
        **_parameters(model),
        by_operator=dict(sorted(by_operator.items(), key=lambda item: (-item[1].macs, -item[1].other_ops))),
        by_module=by_module,
        uncounted=dict(sorted(uncounted.items())),
        input_shapes=tuple(tuple(tensor.shape) for tensor in tensors),
    )


def _si(n: int, unit: str = "") -> str:
    for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
        if n >= 10**power:
            return f"{n / 10**power:.4g} {prefix}{unit}"
    return f"{n} {unit}".rstrip()


def _parameters(module: nn.Module) -> dict[str, int]:
    parameters = list(module.parameters())
    # weights that are buffers, since they are never to be trained
    buffers = sum(getattr(m, name).numel() for m in module.modules() for name in getattr(type(m), "frozen_weights", ()))
    return {
        "parameters": sum(p.numel() for p in parameters) + buffers,
        "frozen_parameters": sum(p.numel() for p in parameters if not p.requires_grad) + buffers,
    }
