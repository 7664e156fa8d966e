"""The selective scan against the recurrence written step by step, and against the published implementation."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mixzoo
from mixzoo.mixers import _scan

FOLDER = Path(__file__).parent / "parity"
_spec = importlib.util.spec_from_file_location("parity", FOLDER / "parity.py")
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)
FIXTURES = sorted((FOLDER / "fixtures").glob("mixer_selective_scan*.json.gz"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def step_by_step(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False) -> tuple[Tensor, Tensor]:
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    channels = u.shape[1]

    def at(x: Tensor, t: int) -> Tensor:
        if x.ndim == 2:
            return x
        x = x[:, None] if x.ndim == 3 else x
        return x[..., t].repeat_interleave(channels // x.shape[1], 1)

    h, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        step = dt[:, :, t, None]
        h = torch.exp(step * A) * h + step * u[:, :, t, None] * at(B, t)
        ys.append((h * at(C, t)).sum(-1))
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def make(length: int, groups: int | None = 1, scale: float = 1.0, batch: int = 2, channels: int = 6, states: int = 4):
    """Inputs in double precision; no groups give B and C that are the same at all steps."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    reads = [draw(channels, states) if groups is None else draw(batch, groups, states, length) for _ in range(2)]
    inputs = {"u": draw(batch, channels, length), "delta": scale * draw(batch, channels, length).abs()}
    inputs |= {"A": -draw(channels, states).abs() - 0.1, "B": reads[0], "C": reads[1], "D": draw(channels)}
    inputs |= {"z": draw(batch, channels, length), "delta_bias": draw(channels)}
    return {name: x.requires_grad_() for name, x in inputs.items()}


def channels_last(inputs) -> tuple[Tensor, ...]:
    """What the operator takes: u, dt, A, B, C."""
    u, dt, A, B, C = (inputs[name].detach() for name in ("u", "delta", "A", "B", "C"))
    return u.mT, dt.mT, A, B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2)


def gradients(outputs: tuple[Tensor, Tensor], inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs[0].sin().sum() + outputs[1].square().sum(), inputs)


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("plan", [None, (5, 1), (4, 150), (4, 2**15)])
@pytest.mark.parametrize("length", [1, 11, 12, 13, 37])
@pytest.mark.parametrize("groups", [1, 3, None])
def test_equals_the_recurrence(plan, length, groups, monkeypatch):
    if plan is not None:
        monkeypatch.setattr(_scan, "_STEPS", plan[0])
        monkeypatch.setattr(_scan, "_WIDTH", plan[1])
    inputs = make(length, groups)
    results = mixzoo.selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    expected = step_by_step(**inputs, delta_softplus=True)
    assert_equal(results, expected)
    assert_equal(*(gradients(outputs, list(inputs.values())) for outputs in (results, expected)))


@pytest.mark.parametrize("length", [1, 2, 13])
@pytest.mark.parametrize("groups", [1, 3, None])
def test_exported_form_equals_the_recurrence(length, groups, monkeypatch):
    inputs = make(length, groups)
    expected = step_by_step(**inputs)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert_equal(mixzoo.selective_scan(**inputs, return_last_state=True), expected)


@pytest.mark.parametrize("scale", [1e-3, 20.0, 1e4])
def test_any_decay_is_safe(scale):
    inputs = make(70, 1, scale)
    del inputs["delta_bias"]
    single = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    y = mixzoo.selective_scan(**single)
    expected = step_by_step(**inputs)[0]
    assert (y - expected).norm() < 1e-5 * expected.norm()
    y.sum().backward()
    assert all(x.grad.isfinite().all() for x in single.values())


def test_lower_precision_is_that_of_the_inputs_alone():
    inputs = {name: x.detach().bfloat16().requires_grad_() for name, x in make(20).items()}
    y = mixzoo.selective_scan(**inputs, delta_softplus=True)
    assert y.dtype == torch.bfloat16
    expected = mixzoo.selective_scan(**{name: x.float() for name, x in inputs.items()}, delta_softplus=True)
    torch.testing.assert_close(y, expected.bfloat16())
    y.sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 for x in inputs.values())


def test_operator_is_well_behaved():
    inputs = (x.requires_grad_() for x in channels_last(make(9)))
    torch.library.opcheck(_scan.scan, (*inputs, False))


def test_wrong_shapes_are_named():
    inputs = {name: x.detach() for name, x in make(8).items()}
    for name, shape in (("delta", (2, 6, 7)), ("A", (5, 4)), ("B", (2, 4, 4, 8)), ("C", (6, 3))):
        with pytest.raises(ValueError, match=rf"{name}.*{shape}".replace("(", r"\(").replace(")", r"\)")):
            mixzoo.selective_scan(**inputs | {name: torch.zeros(shape, dtype=torch.float64)})


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name.partition(".")[0])
def test_parity(path):
    fixture = parity.load_fixture(path)
    inputs = {key: parity.seeded_input(key, spec).requires_grad_() for key, spec in fixture["inputs"].items()}
    y, last = mixzoo.selective_scan(**inputs, **fixture["constructor"])
    grads = torch.autograd.grad(y.sum(), list(inputs.values()))
    outputs = {"y": y, "last_state": last} | {f"grad_{key}": g for key, g in zip(inputs, grads, strict=True)}
    assert parity.compare(fixture, {key: outputs[key] for key in fixture["outputs"]}) == []


def test_backends_that_cannot_run():
    inputs = {name: x.detach() for name, x in make(8).items()}
    with pytest.raises(ValueError, match="backend must be one of torch, triton or None, not 'cuda'"):
        mixzoo.selective_scan(**inputs, backend="cuda")
    with pytest.raises(RuntimeError, match="CUDA device"):
        mixzoo.selective_scan(**inputs, backend="triton")


# length, groups, channels, states, scale of steps: ragged tiles and blocks, hardly any decay and hardly any memory
FEW = [(9, 1, 4, 4, 0.1), (1, 1, 3, 2, 1.0), (5, 3, 6, 3, 20.0), (11, 2, 12, 2, 1e-3), (8, 1, 5, 1, 1e4)]


@pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_in_its_interpreter")
@pytest.mark.parametrize(("length", "groups", "channels", "states", "scale"), FEW)
def test_triton(length, groups, channels, states, scale, monkeypatch):
    from mixzoo.mixers import _scan_triton as kernels

    # so that groups are cut into blocks
    monkeypatch.setattr(kernels, "_WARP", 2)
    monkeypatch.setattr(kernels, "_THREADS", 4)
    inputs = channels_last(make(length, groups, scale, 2, channels, states))
    y, last, entered = _scan._forward(*inputs)
    grads = torch.randn_like(y), torch.randn_like(last)
    expected = y, last, *_scan._backward(*grads, entered, *inputs)
    inputs, grads = ([t.float().contiguous() for t in part] for part in (inputs, grads))
    y, last, entered = kernels.forward(*inputs, 4)
    assert entered.shape[1] == -(-length // 4)
    for a, b in zip((y, last, *kernels.backward(*grads, entered, *inputs, 4)), expected, strict=True):
        assert a.shape == b.shape
        assert (a - b.float()).norm() <= 2e-6 * b.norm()


def test_triton_in_its_interpreter(interpret):
    interpret(__file__)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter compiles nothing")
@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
def test_a_thread_has_all_steps_of_a_tile(name):
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from mixzoo.mixers import _scan_triton as kernels

    u, B = torch.zeros(1, 40, 24), torch.zeros(1, 40, 1, 16)
    _, sizes, options = kernels._launch(u, B, 4)
    kernel, warps = getattr(kernels, name), options.pop("num_warps")
    sized = dict(zip(("length", "groups", "channels", "states", "tiles", "blocks"), sizes, strict=True))
    signature = {a: "constexpr" if a in options else "i32" if a in sized else "*fp32" for a in kernel.arg_names}
    compiled = compile(
        ASTSource(kernel, signature, constexprs=options), GPUTarget("cuda", 80, 32), {"num_warps": warps}
    )
    graph = compiled.asm["ttgir"]
    scans = re.findall(r'= "tt\.scan".*?: \(tensor<\w+, (#\w+)>', graph, re.DOTALL)
    assert len(scans) == (2 if "backward" in name else 1)
    for layout in scans:
        assert re.search(rf"{layout} = .*threadsPerWarp = \[1, .*warpsPerCTA = \[1, ", graph)


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("length", [1, 33, 100])
@pytest.mark.parametrize("groups", [1, 3, None])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 20.0])
def test_triton_on_a_gpu(length, groups, scale):
    inputs = [
        x.detach().to("cuda", torch.float32).requires_grad_() for x in make(length, groups, scale, 2, 48, 16).values()
    ]
    on_triton, on_torch = (
        mixzoo.selective_scan(*inputs, return_last_state=True, backend=backend) for backend in ("triton", "torch")
    )
    for a, b in zip(on_triton + gradients(on_triton, inputs), on_torch + gradients(on_torch, inputs), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
