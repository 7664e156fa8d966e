"""What `scattering` computes, for any device and in a form for CPUs.

A network on the coefficients z1 = (p + i q) / sqrt 2 and z2 = (p - i q) / sqrt 2 acts on p and q, see `_dtcwt_cells`:
layers multiply p by one matrix, q by another, and add a bias to p alone; between two of them stands

    u1 = relu(p + q),  u2 = relu(p - q),    s = u1 + u2,  t = u1 - u2

and s, t is the next pair. Factors of sqrt 2 and i are in the matrices, which are real and act on [re | im].

On a CPU a batch goes through in slices that stay in its cache, and through buffers that all slices share. There sums
and rectifications run over contiguous memory; forming z1 and z2, in runs of the channels of a group, took as long as
the products. For the backward pass the filtered maps, u1 and u2 are kept, and x for higher derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ._dtcwt_cells import Cells, FilterBank, Pair, analyse, synthesise
from ._layers import equal_slices, gradients_with_graph, is_eager_on_cpu, samples_at_once
from ._tables import island

# what multiplies p, what multiplies q, and what is added to p
Layer = tuple[Tensor, Tensor, Tensor]

_threshold_backward = torch.ops.aten.threshold_backward.grad_input


def scatter(x: Tensor, grid: tuple[int, int], low: Tensor, layers: Sequence[Layer], biort: str) -> Tensor:
    """The map ``(B, *grid, C)`` whose bands are those of ``x`` after the blend and the network.

    Args:
        x: ``(B, *grid, C)``.
        grid: sides.
        low: weights of the low band, ``(h, 2, w, 2, G, D)``.
        layers: two that act from the right on ``(G, positions, 2 D)``, of matrices ``(G, 2 D, 2 D)`` and bias
            ``(G, 1, 2 D)``; perhaps two more that act from the left on ``(h, 2 w, positions and channels)``, real and
            imaginary parts in turns, of matrices ``(h, 2 w, 2 w)`` and bias ``(h, 2 w, 1)``.
        biort: filters.
    """
    if not is_eager_on_cpu(x) or x.numel() == 0:
        return _composed(x, grid, low, layers, biort)
    tensors = x, low, *(t for layer in layers for t in layer)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return _Scatter.apply(biort, recorded, *tensors)


def _composed(x: Tensor, grid: tuple[int, int], low: Tensor, layers: Sequence[Layer], biort: str) -> Tensor:
    groups = low.shape[4]
    band, p, q = analyse(x, grid, groups, biort)
    pair = [part.permute(5, 0, 1, 2, 3, 4, 6) for part in (p, q)]  # (G, 3, B, h, w, 2, D)
    shape = pair[0].shape
    pair = _composed_pass([part.reshape(groups, -1, 2 * shape[-1]) for part in pair], layers[:2], torch.bmm)
    pair = [part.reshape(shape) for part in pair]
    if layers[2:]:
        pair = [part.permute(3, 4, 5, 1, 2, 0, 6) for part in pair]  # (h, w, 2, 3, B, G, D)
        turned = pair[0].shape
        pair = [part.reshape(turned[0], 2 * turned[1], -1) for part in pair]
        pair = _composed_pass(pair, layers[2:], lambda part, weight: torch.bmm(weight, part))
        pair = [part.reshape(turned).permute(5, 3, 4, 0, 1, 2, 6) for part in pair]
    p, q = (part.permute(1, 2, 3, 4, 5, 0, 6) for part in pair)
    return synthesise(band * low, p, q, grid, biort)


def _composed_pass(pair: Pair, layers: Sequence[Layer], product) -> Pair:
    """Layer, rectification, layer."""
    p, q = pair
    (by_p, by_q, bias), (then_p, then_q, then_bias) = layers
    p, q = product(p, by_p) + bias, product(q, by_q)
    u1, u2 = torch.relu(p + q), torch.relu(p - q)
    return product(u1 + u2, then_p) + then_bias, product(u1 - u2, then_q)


def _linear(ins: list[Pair], layer: Layer, outs: list[Pair], left: bool) -> None:
    """A layer on several pairs, from the left or from the right."""
    *weights, bias = layer
    for pair, into in zip(ins, outs, strict=True):
        for part, weight, out in zip(pair, weights, into, strict=True):
            torch.bmm(weight, part, out=out) if left else torch.bmm(part, weight, out=out)
        into[0].add_(bias)


def _linear_backward(
    ins: list[Pair], layer: Layer, grads: list[Pair], outs: list[Pair], sums: Layer, left: bool
) -> None:
    """Gradients of the pairs into ``outs``, which may be the pairs themselves, and those of the layer onto ``sums``."""
    *weights, _ = layer
    *of_weights, of_bias = sums
    for pair, grad, into in zip(ins, grads, outs, strict=True):
        of_bias.add_(grad[0].sum(2 if left else 1, keepdim=True))
        for part, g, weight, of_weight, out in zip(pair, grad, weights, of_weights, into, strict=True):
            if left:
                of_weight.baddbmm_(g, part.mT)
                torch.bmm(weight.mT, g, out=out)
            else:
                of_weight.baddbmm_(part.mT, g)
                torch.bmm(g, weight.mT, out=out)


def _sum_and_difference(pair: Tensor, out: Tensor) -> None:
    torch.add(*pair, out=out[0])
    torch.sub(*pair, out=out[1])


def _rectify(pair: Tensor, out: Tensor) -> None:
    """p, q to u1, u2 in place; s, t into ``out``."""
    _sum_and_difference(pair, out)
    torch.clamp_min(out, 0, out=pair)
    _sum_and_difference(pair, out)


def _rectify_backward(u: Tensor, grads: Tensor, buffer: Tensor) -> None:
    """Gradients of s, t to those of p, q in place."""
    _sum_and_difference(grads, buffer)
    _threshold_backward(buffer, u, 0, grad_input=buffer)
    _sum_and_difference(buffer, grads)


class _Pairs:
    """Memory ``(2, elements)`` of p and q, and the pairs of matrices ``(batch, ...)`` that layers take one by one.

    They are contiguous, because `torch.bmm` writes others one matrix at a time.
    """

    def __init__(self, both: Tensor, shapes: Sequence[Sequence[int]]):
        self.both = both
        parts = both.split([math.prod(shape) for shape in shapes], 1)
        self.parts: list[Pair] = [[t.view(shape) for t in part] for part, shape in zip(parts, shapes, strict=True)]


def _copy(sources: list[Pair], targets: list[Pair]) -> None:
    for pair, into in zip(sources, targets, strict=True):
        for part, out in zip(pair, into, strict=True):
            out.copy_(part)


def _pass(ins: list[Pair], layers: Sequence[Layer], u: _Pairs, st: _Pairs, outs: list[Pair], left: bool) -> None:
    """Layer, rectification, layer; ``u`` is to be kept and ``st`` a buffer."""
    _linear(ins, layers[0], u.parts, left)
    _rectify(u.both, st.both)
    _linear(st.parts, layers[1], outs, left)


def _pass_backward(
    ins: list[Pair],
    layers: Sequence[Layer],
    u: _Pairs,
    buffers: tuple[_Pairs, _Pairs],
    grads: list[Pair],
    outs: list[Pair],
    sums: Sequence[Layer],
    left: bool,
) -> None:
    """Gradients of `_pass`, of its output to those of its input, both of which may be in the second buffer."""
    st, buffer = buffers
    _sum_and_difference(u.both, st.both)
    _linear_backward(st.parts, layers[1], grads, st.parts, sums[1], left)
    _rectify_backward(u.both, st.both, buffer.both)
    _linear_backward(ins, layers[0], st.parts, outs, sums[0], left)


class _Slice:
    """Passes over ``batch`` samples like those of ``x``, with their buffers."""

    def __init__(self, x: Tensor, batch: int, low: Tensor, layers: Sequence[Layer], biort: str):
        groups = low.shape[4]
        self._like = x
        self._bank = FilterBank(x, batch, groups, biort)
        _, _, K, _, _, _, hk, w, _, D = self._bank.shape
        self._low = low.unflatten(0, (K, hk)).permute(0, 5, 2, 1, 3, 4, 6).contiguous()  # as one sample of `Cells.low`
        self._copies = batch * K
        self._layers = [[t.repeat(self._copies, 1, 1) for t in layer] for layer in layers[:2]] + list(layers[2:])
        # from the right: the bands HL and HH, and LH, as in `Cells.matrices`
        self._shapes = [(self._copies * groups, bands * hk * w, 2 * D) for bands in (2, 1)]
        # from the left
        self._turned_shapes = [(K * hk, 2 * w, 3 * batch * groups * D)]
        self._cells = Cells(x.new_empty(self._bank.shape))
        self._turns = len(layers) > 2
        self._buffers = tuple(self._pairs(self._memory()) for _ in range(2))
        self._turned_buffers = tuple(self._turned_pairs(self._memory()) for _ in range(2 * self._turns))

    def _memory(self) -> Tensor:
        return self._like.new_empty(2, sum(map(math.prod, self._shapes)))

    def _pairs(self, memory: Tensor) -> _Pairs:
        return _Pairs(memory, self._shapes)

    def _turned_pairs(self, memory: Tensor) -> _Pairs:
        return _Pairs(memory, self._turned_shapes)

    def _as_parts(self, pairs: _Pairs) -> list[Pair]:
        """Views as in `Cells.parts`."""
        _, batch, K, groups, _, _, hk, w, _, D = self._bank.shape
        return [[t.view(batch, K, groups, -1, hk, w, 2, D) for t in pair] for pair in pairs.parts]

    def _turned_parts(self, pairs: _Pairs) -> list[Pair]:
        """Views as in `Cells.parts`."""
        _, batch, K, groups, _, _, hk, w, _, D = self._bank.shape
        both = pairs.both.view(2, K, hk, w, 2, 3, batch, groups, D).permute(0, 6, 1, 7, 5, 2, 3, 4, 8)
        return [part.unbind() for part in both.split([2, 1], 4)]

    def kept(self) -> list[Tensor]:
        """Fresh memory for what `backward` needs of `forward`: filtered maps, and what was rectified; then turned."""
        return [self._like.new_empty(self._bank.shape), *(self._memory() for _ in range(3 if self._turns else 1))]

    @cached_property
    def overwritten(self) -> list[Tensor]:
        """The same for slices that are not gone back through."""
        return self.kept()

    def forward(self, x: Tensor, y: Tensor, kept: list[Tensor], *, again: bool) -> None:
        """Fill ``y``, and ``kept`` for `backward`; unless it is needed ``again``, that memory serves as buffers too."""
        values, u, *turned = kept
        cells, u = Cells(values), self._pairs(u)
        into, (st, out) = (self._cells, self._buffers) if again else (cells, (self._buffers[0], u))
        self._bank.analyse(x, cells)
        torch.mul(cells.low, self._low, out=into.low)
        _pass(cells.matrices, self._layers[:2], u, st, out.parts, False)
        if turned:
            pq, v = map(self._turned_pairs, turned)
            turned_st, turned_out = self._turned_buffers
            _copy(self._as_parts(out), self._turned_parts(pq))
            _pass(pq.parts, self._layers[2:], v, turned_st, turned_out.parts, True)
            _copy(self._turned_parts(turned_out), into.parts)
        else:
            _copy(out.parts, into.matrices)
        self._bank.synthesise(into, y)

    def zeros(self) -> list[Tensor]:
        """Sums of the gradients of the low weights and of the layers."""
        return [torch.zeros_like(self._low), *(torch.zeros_like(t) for layer in self._layers for t in layer)]

    def backward(self, grad: Tensor, dx: Tensor, kept: list[Tensor], sums: list[Tensor]) -> None:
        """Fill ``dx`` and add to ``sums``."""
        values, u, *turned = kept
        cells, u, grads = Cells(values), self._pairs(u), self._cells
        of_low, *of_layers = sums
        of_layers = _layers(of_layers)
        self._bank.analyse(grad, grads, adjoint=True)
        for band, of_band in zip(cells.low, grads.low, strict=True):
            of_low.addcmul_(band, of_band)
        grads.low.mul_(self._low)
        of_out, buffer = grads.matrices, self._buffers[1]
        if turned:
            pq, v = map(self._turned_pairs, turned)
            turned_buffer = self._turned_buffers[1]
            _copy(grads.parts, self._turned_parts(turned_buffer))
            ends = turned_buffer.parts, turned_buffer.parts
            _pass_backward(pq.parts, self._layers[2:], v, self._turned_buffers, *ends, of_layers[2:], True)
            _copy(self._turned_parts(turned_buffer), self._as_parts(buffer))
            of_out = buffer.parts
        ends = of_out, buffer.parts
        _pass_backward(cells.matrices, self._layers[:2], u, self._buffers, *ends, of_layers[:2], False)
        _copy(buffer.parts, grads.matrices)
        self._bank.synthesise(grads, dx, adjoint=True)

    def gradients(self, sums: list[Tensor]) -> list[Tensor]:
        """`zeros`, filled, in the shapes of the low weights and of the layers."""
        of_low, *of_layers = sums
        of_low = of_low.permute(0, 3, 2, 4, 5, 1, 6).flatten(0, 1)
        of_right = [t.unflatten(0, (self._copies, -1)).sum(0) for t in of_layers[:6]]
        return [of_low, *of_right, *of_layers[6:]]


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, biort: str, recorded: bool, x: Tensor, low: Tensor, *flat: Tensor) -> Tensor:
        slices = _slices(x, low, flat, biort)
        y = x.new_empty(x.shape)
        kept = []
        for part, into in zip(_parts(x), _parts(y), strict=True):
            run = slices[len(part)]
            of_slice = run.kept() if recorded else run.overwritten
            run.forward(part, into, of_slice, again=recorded)
            kept += of_slice
        if recorded:
            ctx.biort, ctx.inputs = biort, 2 + len(flat)
            ctx.save_for_backward(x, low, *flat, *kept)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors
        x, low, *flat = inputs = saved[: ctx.inputs]
        with island(grad):
            if torch.is_grad_enabled():
                y = _composed(x, tuple(x.shape[1:3]), low, _layers(flat), ctx.biort)
                return None, None, *gradients_with_graph(y, inputs, grad)
            grad = grad.contiguous()  # products want the channels side by side
            kept = saved[ctx.inputs :]
            slices = _slices(x, low, flat, ctx.biort)
            sums = {size: run.zeros() for size, run in slices.items()}
            dx = x.new_empty(x.shape)
            count = len(kept) // len(_parts(x))
            for part, into in zip(_parts(grad), _parts(dx), strict=True):
                own, kept = kept[:count], kept[count:]
                slices[len(part)].backward(part, into, own, sums[len(part)])
            found = [slices[size].gradients(of_size) for size, of_size in sums.items()]
        return None, None, dx, *(sum(more, first) for first, *more in zip(*found, strict=True))


def _layers(flat: Sequence[Tensor]) -> list[Layer]:
    return [tuple(flat[i : i + 3]) for i in range(0, len(flat), 3)]


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """Slices of the batch, whose filtered maps are four times as wide."""
    return equal_slices(x, samples_at_once(x, 4 * x[0].numel()))


def _slices(x: Tensor, low: Tensor, flat: Sequence[Tensor], biort: str) -> dict[int, _Slice]:
    return {size: _Slice(x, size, low, _layers(flat), biort) for size in set(map(len, _parts(x)))}
