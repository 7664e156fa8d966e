"""How operators are counted: one rule for each, for `mixzoo.complexity`.

A rule takes the inputs and outputs of a traced call (values of `torch.jit`'s graph) and returns a number for its
column, a mapping from columns to numbers, or None where it cannot say, which lists the call as uncounted. A mixer
that brings an operator of its own puts the rule beside it:

    @count("mylib::scan", column="transform")
    def _scan(inputs, outputs):
        return 9 * numel(inputs[0])

An `autograd.Function` is traced as one operator, "prim::PythonOp.ClassName".

Columns, all for the call as a whole:

    matmul       multiply-adds of matrix products and convolutions; biases are free. A complex one is four.
    transform    multiply-adds of FFTs, wavelets, scans and complex arithmetic, two flops each
    norm         operations of normalisation layers, five an element (batch norm in eval mode: two)
    other        all further operations on floating-point numbers
    activations  elements written by the operators of the matmul column, which get it by default

Below are the rules of torch's own operators and `FREE`, the ones that cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

COLUMNS = ("matmul", "transform", "norm", "other", "activations")

Values = Sequence[torch._C.Value]
Rule = Callable[[Values, Values], "int | float | Mapping[str, int | float] | None"]

RULES: dict[str, Rule] = {}


def count(*operators: str, column: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule counts calls of ``operators``, such as "aten::mm", in ``column``.

    Raises:
        ValueError: no such column, or an operator has a rule already.
    """
    if column not in COLUMNS:
        raise ValueError(f"column must be one of {', '.join(COLUMNS)}, not {column!r}")

    def decorate(rule: Rule) -> Rule:
        for operator in operators:
            if operator in RULES or operator in FREE:
                raise ValueError(f"operator {operator!r} is counted already")
            RULES[operator] = partial(_by_column, rule, column)
        return rule

    return decorate


def _by_column(rule: Rule, column: str, inputs: Values, outputs: Values) -> Mapping[str, int | float] | None:
    counted = rule(inputs, outputs)
    if counted is None or isinstance(counted, Mapping):
        return counted
    return {column: counted, "activations": numel(outputs[0])} if column == "matmul" else {column: counted}


def shape(value: torch._C.Value) -> tuple[int, ...] | None:
    """Sizes of a tensor; None for what is not a tensor."""
    return tuple(value.type().sizes()) if value.isCompleteTensor() else None


def numel(value: torch._C.Value) -> int:
    """Number of elements of a tensor."""
    return math.prod(value.type().sizes())


def constant(value: torch._C.Value) -> Any:
    """A number, string or list that was written into the graph; None where it was computed."""
    if value.node().kind() == "prim::ListConstruct":
        return [constant(item) for item in value.node().inputs()]
    return value.toIValue()


def _scalar_type(value: torch._C.Value) -> str:
    return value.type().scalarType() if value.isCompleteTensor() else ""


def is_complex(value: torch._C.Value) -> bool:
    """Whether it is a tensor of complex numbers."""
    return _scalar_type(value).startswith("Complex")


def is_real(value: torch._C.Value) -> bool:
    """Whether it is a tensor of floating-point numbers; arithmetic on indices and masks is free."""
    return _scalar_type(value) in ("Float", "Double", "Half", "BFloat16")


def _aten(names: str, in_place: bool = False) -> list[str]:
    operators = [f"aten::{name}" for name in names.split()]
    return operators + [f"{operator}_" for operator in operators] if in_place else operators


# what moves, views, creates or compares
FREE = frozenset(
    _aten(
        """
        Bool Float FloatImplicit Int IntImplicit ScalarImplicit __and__ __or__ __xor__ __not__ _cast_Float _conj
        _shape_as_tensor _to_copy _unsafe_view adjoint affine_grid_generator alias all allclose any append arange
        argsort argwhere as_strided as_tensor atleast_1d atleast_2d atleast_3d bernoulli bitwise_and
        bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor block_diag broadcast_tensors
        broadcast_to bucketize cat channel_shuffle chunk clone column_stack complex concat concatenate conj
        conj_physical constant_pad_nd contiguous copy copy_ count_nonzero dense_dim detach detach_ device diag
        diag_embed diagonal diagonal_copy dim dropout dropout_ dsplit dstack embedding empty empty_like empty_strided
        eq equal expand expand_as expand_copy eye feature_dropout fft_fftfreq fft_fftshift fft_ifftshift fft_rfftfreq
        fill fill_ flatten flip fliplr flipud full full_like gather ge greater gt hsplit hstack im2col imag index
        index_copy index_fill index_put index_put_ index_select is_complex is_floating_point isclose isfinite isinf
        isnan item le len lift_fresh linspace lift logical_and logical_not logical_or logical_xor logspace lt
        masked_scatter masked_select matrix_H meshgrid moveaxis movedim mH mT narrow narrow_copy native_dropout ne
        new_empty new_empty_strided new_full new_ones new_zeros nonzero normal numel numpy_T one_hot ones ones_like pad
        permute permute_copy pin_memory pixel_shuffle pixel_unshuffle positive put rand rand_like randint
        randint_like randn randn_like randperm ravel real reflection_pad1d reflection_pad2d reflection_pad3d repeat
        repeat_interleave replication_pad1d replication_pad2d replication_pad3d requires_grad_ reshape reshape_as
        resize_ resolve_conj resolve_neg roll rot90 scalar_tensor scatter searchsorted select select_copy
        select_scatter set_ signbit size slice slice_copy slice_scatter split split_copy split_with_sizes squeeze
        squeeze_ squeeze_copy stack stride swapaxes swapdims sym_size t t_copy take take_along_dim tensor
        tensor_split tile to transpose transpose_copy tril tril_indices triu triu_indices type_as unbind unflatten
        unfold unsqueeze unsqueeze_ unsqueeze_copy upsample_nearest1d upsample_nearest2d upsample_nearest3d
        _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d vander view view_as
        view_as_complex view_as_complex_copy view_as_real view_as_real_copy view_copy vsplit vstack zero
        zero_ zeros zeros_like
        """
    )
)


# matrix products


def _complex_factor(*values: torch._C.Value) -> int:
    return 4 if any(map(is_complex, values)) else 1


def _product(inputs: Values, outputs: Values, first: int) -> int:
    """Output elements times the length of the contracted axis, the last one of input ``first``."""
    return numel(outputs[0]) * shape(inputs[first])[-1] * _complex_factor(inputs[first])


count(*_aten("matmul mm bmm mv dot vdot inner linear"), column="matmul")(partial(_product, first=0))
count(*_aten("addmm baddbmm addmv", in_place=True), column="matmul")(partial(_product, first=1))


@count("aten::tensordot", column="matmul")
def _tensordot(inputs: Values, outputs: Values) -> int:
    sizes = shape(inputs[0])
    contracted = math.prod(sizes[axis] for axis in constant(inputs[2]))
    return numel(outputs[0]) * contracted * _complex_factor(inputs[0])


@count("aten::einsum", column="matmul")
def _einsum(inputs: Values, outputs: Values) -> Mapping[str, int] | None:
    """Pairs are contracted from left to right, or along the path that torch's optimiser wrote into the graph.

    A product of two operands costs the product of the sizes of all their letters, once those that only one of them
    has and nobody needs are summed.
    """
    equation, operands = constant(inputs[0]), list(inputs[1].node().inputs())
    if equation is None or any(shape(v) is None for v in operands):
        return None
    terms, result = _einsum_terms(equation, [shape(v) for v in operands])
    path = constant(inputs[2]) if len(inputs) > 2 else None
    counted = {"matmul": 0, "other": 0, "activations": 0}
    while terms:
        chosen = [terms.pop(i) for i in sorted((path[:2] if path else (0, 1))[: len(terms)], reverse=True)]
        path = path[2:] if path else None
        needed = set(result).union(*terms)
        shared = set.intersection(*map(set, chosen)) if len(chosen) == 2 else set()
        for term in chosen:
            if set(term) - needed - shared:
                counted["other"] += math.prod(term.values())
        sizes = {letter: n for term in chosen for letter, n in term.items() if letter in needed | shared}
        kept = {letter: n for letter, n in sizes.items() if letter in needed}
        if len(chosen) == 2:
            counted["matmul"] += math.prod(sizes.values()) * _complex_factor(*operands)
            counted["activations"] += math.prod(kept.values())
            if terms:
                terms.append(kept) if path is not None else terms.insert(0, kept)
    return counted


def _einsum_terms(equation: str, sizes: Sequence[Sequence[int]]) -> tuple[list[dict[str, int]], set[str]]:
    """Letters of every operand with their sizes, and the letters of the result; "..." stands for "0", "1", ..."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    subscripts = left.split(",")
    dots = max(
        len(size) - len(s.replace("...", "")) if "..." in s else 0 for s, size in zip(subscripts, sizes, strict=True)
    )

    def letters(subscript: str, count: int) -> list[str]:
        before, ellipsis, after = subscript.partition("...")
        return [*before, *(map(str, range(dots - count, dots)) if ellipsis else ()), *after]

    terms = []
    for subscript, size in zip(subscripts, sizes, strict=True):
        names = letters(subscript, len(size) - len(subscript.replace("...", "")))
        # an axis of length one is broadcast, and a repeated letter takes a diagonal
        terms.append({name: n for name, n in zip(names, size, strict=True) if n > 1})
    if arrow:
        return terms, set(letters(right, dots))
    flat = left.replace(",", "").replace("...", "")
    return terms, {letter for letter in flat if flat.count(letter) == 1} | set(map(str, range(dots)))


@count(*_aten("_convolution convolution conv1d conv2d conv3d _convolution_mode"), column="matmul")
def _convolution(inputs: Values, outputs: Values) -> int:
    weight = shape(inputs[1])  # (C_out, C_in / groups, *kernel), transposed: (C_in, C_out / groups, *kernel)
    # the flag stands seventh where there is one
    transposed = len(inputs) > 7 and constant(inputs[6]) is True
    positions = numel(inputs[0] if transposed else outputs[0])
    return positions * math.prod(weight[1:]) * _complex_factor(inputs[0])


@count(*_aten("conv_transpose1d conv_transpose2d conv_transpose3d"), column="matmul")
def _transposed_convolution(inputs: Values, outputs: Values) -> int:
    return numel(inputs[0]) * math.prod(shape(inputs[1])[1:]) * _complex_factor(inputs[0])


@count(
    *_aten("scaled_dot_product_attention _scaled_dot_product_flash_attention"),
    *_aten("_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention"),
    *_aten("_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math"),
    *_aten("_scaled_dot_product_fused_attention_overrideable"),
    column="matmul",
)
def _attention(inputs: Values, outputs: Values) -> Mapping[str, int]:
    """softmax(q k^T / sqrt(D) + mask) v, as if it were not fused: a causal mask saves nothing."""
    *batch, n, d = shape(inputs[0])  # (B, G, N, D)
    m, width = shape(inputs[1])[-2], shape(inputs[2])[-1]
    pairs = math.prod(batch) * n * m
    masked = len(inputs) > 3 and shape(inputs[3]) is not None
    return {
        "matmul": pairs * (d + width),
        "other": numel(inputs[0]) + (SOFTMAX_OPS + masked) * pairs,
        "activations": pairs + math.prod(batch) * n * width,
    }


# transforms


def _fft(inputs: Values, outputs: Values, axes: int, kind: str) -> int | None:
    """Half of 5 N log2 N flops for a complex transform of N points in all its axes, half of that for a real one.

    Args:
        axes: which input names the axes.
        kind: c2c, r2c or c2r, by whether the input and the output are complex.
    """
    signal = list(shape(outputs[0]))
    dims = constant(inputs[axes])
    if dims is None:
        lengths = constant(inputs[1]) if axes == 2 else None
        dims = range(-len(lengths or signal), 0)
    dims = [dims] if isinstance(dims, int) else list(dims)
    if kind == "r2c":
        # n // 2 + 1 of n frequencies are written; n is the input's length unless it was cut or padded
        length, written = shape(inputs[0])[dims[-1]], signal[dims[-1]]
        signal[dims[-1]] = length if length // 2 + 1 == written else 2 * (written - 1)
    points = math.prod(signal[axis] for axis in dims)
    flops = 5 * math.prod(signal) * math.log2(points) if points > 1 else 0
    return round(flops / (2 if kind == "c2c" else 4))


for _kind, _names in {
    "c2c": "fft_fft fft_ifft fft_fft2 fft_ifft2 fft_fftn fft_ifftn",
    "r2c": "fft_rfft fft_ihfft fft_rfft2 fft_ihfft2 fft_rfftn fft_ihfftn",
    "c2r": "fft_irfft fft_hfft fft_irfft2 fft_hfft2 fft_irfftn fft_hfftn",
}.items():
    count(*_aten(_names), column="transform")(partial(_fft, axes=2, kind=_kind))
    count(f"aten::_fft_{_kind}", column="transform")(partial(_fft, axes=1, kind=_kind))


# elementwise


def _elementwise(inputs: Values, outputs: Values, ops: int, product: bool = False) -> Mapping[str, int | float]:
    """``ops`` an element of the output; in complex arithmetic a product is 6 flops, any other operation 2.

    Single numbers are free: the tracer writes arithmetic on shapes as tensors without axes.
    """
    if shape(outputs[0]) == ():
        return {}
    if is_complex(outputs[0]):
        flops = 6 if product and len(inputs) > 1 and all(map(is_complex, inputs[:2])) else 2
        return {"transform": numel(outputs[0]) * ops * flops // 2}
    return {"other": numel(outputs[0]) * ops} if is_real(outputs[0]) else {}


_ONE = """
    abs acos acosh add angle asin asinh atan atan2 atanh ceil celu clamp clamp_max clamp_min clip cos cosh deg2rad
    digamma elu erf erfc erfinv exp exp2 expm1 float_power floor floor_divide fmax fmin fmod frac gelu hardshrink
    hardsigmoid hardswish hardtanh leaky_relu lgamma log log10 log1p log2 log_sigmoid logaddexp logit masked_fill
    maximum minimum mish nan_to_num neg polar pow prelu rad2deg reciprocal relu relu6 remainder round rrelu rsqrt rsub
    selu sgn sigmoid sign silu sin sinc sinh softplus softshrink softsign sqrt square sub tan tanh tanhshrink threshold
    trunc where xlogy
"""
count(*_aten(_ONE, in_place=True), column="other")(partial(_elementwise, ops=1))
count(*_aten("mul div", in_place=True), column="other")(partial(_elementwise, ops=1, product=True))
count(*_aten("outer ger"), column="other")(partial(_elementwise, ops=1, product=True))
# these fuse two or three of the above
count(*_aten("addcmul addcdiv glu", in_place=True), column="other")(partial(_elementwise, ops=2))
count(*_aten("lerp", in_place=True), column="other")(partial(_elementwise, ops=3))

# maximum, difference, exponential, sum, quotient
SOFTMAX_OPS = 5
count(*_aten("softmax _softmax log_softmax _log_softmax _safe_softmax"), column="other")(
    partial(_elementwise, ops=SOFTMAX_OPS)
)


def _reduction(inputs: Values, outputs: Values, ops: int) -> Mapping[str, int]:
    """``ops`` an element of the input."""
    if is_complex(inputs[0]):
        return {"transform": numel(inputs[0]) * ops}
    return {"other": numel(inputs[0]) * ops} if is_real(inputs[0]) else {}


count(
    *_aten("sum nansum mean nanmean amax amin aminmax max min prod argmax argmin cumsum cumsum_ cumprod cumprod_ topk"),
    *_aten("cummax cummin adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d"),
    *_aten("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    column="other",
)(partial(_reduction, ops=1))
# square and sum
count(*_aten("norm linalg_norm linalg_vector_norm frobenius_norm"), column="other")(partial(_reduction, ops=2))
# difference, square, sum; difference, exponential, sum
count(*_aten("var std var_mean std_mean logsumexp logcumsumexp"), column="other")(partial(_reduction, ops=3))


# norms and pooling


def _norm(inputs: Values, outputs: Values) -> int:
    return 5 * numel(inputs[0])


count(
    *_aten("layer_norm native_layer_norm group_norm native_group_norm rms_norm _fused_rms_norm instance_norm"),
    column="norm",
)(_norm)


@count(*_aten("batch_norm native_batch_norm _native_batch_norm_legit_no_training"), column="norm")
def _batch_norm(inputs: Values, outputs: Values) -> int:
    """With running statistics a scale and a shift, otherwise as the other norms."""
    training = len(inputs) > 7 and constant(inputs[5]) is True
    return (5 if training else 2) * numel(inputs[0])


def _pool(inputs: Values, outputs: Values, rank: int) -> int | None:
    """One operation for every output and every position of its window."""
    kernel = constant(inputs[1])
    if kernel is None or None in kernel:
        return None
    return numel(outputs[0]) * math.prod(kernel * rank if len(kernel) == 1 else kernel)


for _rank in (1, 2, 3):
    _operators = _aten(f"avg_pool{_rank}d max_pool{_rank}d max_pool{_rank}d_with_indices")
    count(*_operators, column="other")(partial(_pool, rank=_rank))


def _interpolation(inputs: Values, outputs: Values, ops: int) -> int:
    """One operation for every output and every input it is made of."""
    return numel(outputs[0]) * ops


for _operator, _ops in {"linear1d": 2, "bilinear2d": 4, "trilinear3d": 8, "bicubic2d": 16}.items():
    count(f"aten::upsample_{_operator}", column="other")(partial(_interpolation, ops=_ops))


@count(*_aten("grid_sampler grid_sampler_2d grid_sampler_3d"), column="other")
def _grid_sampler(inputs: Values, outputs: Values) -> int | None:
    rank = len(shape(outputs[0])) - 2
    ops = {0: 2**rank, 1: 0, 2: 4**rank}.get(constant(inputs[2]))
    return None if ops is None else numel(outputs[0]) * ops


def operators() -> Iterable[str]:
    """Every operator that is counted or free."""
    return (*RULES, *FREE)
