"""Selective token and channel mixers: the published token mixer, plain twins, order, masks, what is not decayed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixzoo
from mixzoo.mixers import CHANNEL_MIXERS

FOLDER = Path(__file__).parent / "parity"
_spec = importlib.util.spec_from_file_location("parity", FOLDER / "parity.py")
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)
FIXTURES = sorted((FOLDER / "fixtures").glob("mixer_ss2d*.json.gz"))


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module.double().eval()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name.partition(".")[0])
def test_parity(path):
    fixture = parity.load_fixture(path)
    x = parity.seeded_input("x", fixture["inputs"]["x"]).requires_grad_()
    mixer = mixzoo.create_mixer("selective_token", x.shape[-1])
    state = parity.reference_state_dict(fixture)
    report = mixzoo.load_checkpoint(mixer, state)
    assert set(report.loaded) == set(mixer.state_dict())
    assert sum(p.numel() for p in mixer.parameters()) == fixture["parameters"]
    y = mixer.eval()(x)
    assert parity.compare(fixture, {"y": y, "grad_x": torch.autograd.grad(y.sum(), x)[0]}) == []
    exported = mixzoo.weights.export(mixer.state_dict(), "vmamba")
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], state[key]) for key in state)


def plain_scan(scans: nn.Module, x: Tensor, k: int) -> Tensor:
    """Direction k over ``(L, E)``, step by step."""
    r, B, C = (x @ scans.x_proj[k].T).split(scans.widths, -1)
    dt = F.softplus(r @ scans.dt_proj[k].T + scans.dt_bias[k])
    A, h, ys = -scans.A_log[k].exp(), x.new_zeros(scans.A_log[k].shape), []
    for t in range(len(x)):
        h = torch.exp(dt[t, :, None] * A) * h + (dt[t] * x[t])[:, None] * B[t]
        ys.append(h @ C[t] + scans.D[k] * x[t])
    return torch.stack(ys)


def plain_sequence(mix: nn.Module, x: Tensor) -> Tensor:
    """Sum over the directions of a sequence ``(L, E)``."""
    width, total = x.shape[1], 0
    for k in range(len(mix.scans.D)):
        v = x.flip(0) if k else x
        part = slice(k * width, (k + 1) * width)
        weight, size = mix.conv.weight[part], mix.conv.kernel_size[0]
        v = F.conv1d(F.pad(v.T, (size - 1, 0)), weight, mix.conv.bias[part], groups=width).T
        y = plain_scan(mix.scans, F.silu(v), k)
        total = total + (y.flip(0) if k else y)
    return total


def plain_cross(mix: nn.Module, x: Tensor) -> Tensor:
    """The four scans of an image ``(H, W, E)``, every position looked up."""
    H, W, E = x.shape
    u = F.silu(mix.conv(x.permute(2, 0, 1))).permute(1, 2, 0).reshape(-1, E)
    rows = [i * W + j for i in range(H) for j in range(W)]
    columns = [i * W + j for j in range(W) for i in range(H)]
    total = torch.zeros_like(u)
    for k, order in enumerate((rows, columns, rows[::-1], columns[::-1])):
        total = total.index_add(0, torch.tensor(order), plain_scan(mix.scans, u[order], k))
    return mix.norm(total).reshape(H, W, E)


def plain_token(mixer: nn.Module, x: Tensor) -> Tensor:
    u, z = mixer.in_proj(x).chunk(2, -1)
    mix = plain_sequence if u.ndim == 3 else plain_cross
    return mixer.out_proj(torch.stack([mix(mixer.mix, sample) for sample in u]) * F.silu(z))


def plain_channel(mixer: nn.Module, x: Tensor) -> Tensor:
    u, z = mixer.in_proj(x).chunk(2, -1)
    tokens = u.reshape(-1, u.shape[-1] // mixer.group, mixer.group)
    y = torch.stack([plain_sequence(mixer.mix, token) for token in tokens]).reshape(u.shape)
    return mixer.out_proj(mixer.norm(y) * F.silu(z))


def assert_twins(module: nn.Module, plain, x: Tensor) -> None:
    wanted = [x, *module.parameters()]
    results = [(y, *torch.autograd.grad(y.sin().sum(), wanted)) for y in (module(x), plain(module, x))]
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() < 1e-10 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((11,), {}),
        ((35,), {"bidirectional": True, "states": 3}),
        ((1,), {"bidirectional": True, "kernel_size": 2}),
        ((3, 5), {"expand": 1.5}),
        ((1, 6), {"dt_rank": 3, "kernel_size": 5}),
        ((7, 1), {}),
    ],
)
def test_token_mixer_equals_its_plain_twin(grid, options):
    mixer = mixzoo.create_mixer("selective_token", 4, rank=len(grid), **options)
    assert_twins(randomised(mixer), plain_token, draw(2, *grid, 4))


@pytest.mark.parametrize(
    "options", [{"group": 4}, {"group": 1, "expand": 1.0, "states": 5}, {"group": 12, "dt_rank": 2}]
)
def test_channel_mixer_equals_its_plain_twin(options):
    mixer = CHANNEL_MIXERS.create("selective_channel", 6, **options)
    assert_twins(randomised(mixer), plain_channel, draw(2, 2, 3, 6))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_only_one_direction_is_causal(bidirectional):
    mixer = randomised(mixzoo.create_mixer("selective_token", 8, rank=1, bidirectional=bidirectional))
    x = draw(1, 9, 8)
    seen = torch.autograd.grad(mixer(x)[:, 4].sum(), x)[0].abs().sum((0, 2)) > 0
    assert seen.tolist() == [True] * 5 + [bidirectional] * 4


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_is_not_there(bidirectional):
    mixer = randomised(mixzoo.create_mixer("selective_token", 8, rank=1, bidirectional=bidirectional))
    x = draw(3, 40, 8)
    mask = torch.arange(40) < torch.tensor([[33], [40], [5]])
    y = mixer(x, mask=mask)
    for sample, length in enumerate((33, 40, 5)):
        torch.testing.assert_close(y[sample : sample + 1, :length], mixer(x[sample : sample + 1, :length]))


def test_padding_below_and_beside_an_image_is_not_there():
    mixer = randomised(mixzoo.create_mixer("selective_token", 8))
    x = draw(1, 6, 7, 8)
    mask = torch.zeros(1, 6, 7, dtype=torch.bool)
    mask[:, :4, :5] = True
    torch.testing.assert_close(mixer(x, mask=mask)[:, :4, :5], mixer(x[:, :4, :5]))


def test_transposing_the_grid_exchanges_rows_and_columns():
    mixer = randomised(mixzoo.create_mixer("selective_token", 8))
    x = draw(2, 4, 7, 8)
    expected = mixer(x).transpose(1, 2)
    state = mixer.state_dict()
    for key in ("x_proj", "dt_proj", "dt_bias", "A_log", "D"):
        state[f"mix.scans.{key}"] = state[f"mix.scans.{key}"][[1, 0, 3, 2]]
    state["mix.conv.weight"] = state["mix.conv.weight"].mT.clone()
    mixer.load_state_dict(state)
    torch.testing.assert_close(mixer(x.transpose(1, 2)), expected)


@pytest.mark.parametrize(
    ("create", "options", "named"),
    [
        (mixzoo.create_mixer, {"rank": 2, "bidirectional": True}, "bidirectional"),
        (mixzoo.create_mixer, {"rank": 1, "states": 0}, "states"),
        (mixzoo.create_mixer, {"rank": 1, "dt_rank": 0}, "dt_rank"),
        (mixzoo.create_mixer, {"rank": 1, "kernel_size": 0}, "kernel_size"),
        (mixzoo.create_mixer, {"rank": 2, "kernel_size": 2}, "kernel_size"),
        (mixzoo.create_mixer, {"rank": 1, "expand": 0.0}, "expand"),
        (CHANNEL_MIXERS.create, {"group": 5}, "group"),
        (CHANNEL_MIXERS.create, {"group": 0}, "group"),
    ],
)
def test_impossible_options_are_named(create, options, named):
    name = "selective_token" if create is mixzoo.create_mixer else "selective_channel"
    with pytest.raises(ValueError, match=named):
        create(name, 8, **options)


def test_steps_begin_between_a_thousandth_and_a_tenth():
    scans = mixzoo.create_mixer("selective_token", 64).mix.scans
    steps = F.softplus(scans.dt_bias)
    assert 9e-4 < steps.min() < 2e-3
    assert 0.05 < steps.max() < 0.101
    torch.testing.assert_close(scans.A_log.exp()[2, 5], torch.arange(1.0, 17.0))
