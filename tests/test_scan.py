"""The selective scan against the recurrence written step by step, and against the published implementation."""

from __future__ import annotations

import importlib.util
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
    gradients = [
        torch.autograd.grad((y.sin().sum() + h.square().sum()), list(inputs.values())) for y, h in (results, expected)
    ]
    assert_equal(*gradients)


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
    inputs = make(9)
    u, delta, A, B, C = (inputs[name].detach() for name in ("u", "delta", "A", "B", "C"))
    scanned = u.mT, delta.mT, A, B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2)
    torch.library.opcheck(_scan.scan, tuple(x.requires_grad_() for x in scanned))


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
    gradients = torch.autograd.grad(y.sum(), list(inputs.values()))
    outputs = {"y": y, "last_state": last} | {f"grad_{key}": g for key, g in zip(inputs, gradients, strict=True)}
    assert parity.compare(fixture, {key: outputs[key] for key in fixture["outputs"]}) == []
