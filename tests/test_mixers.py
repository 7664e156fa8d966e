"""Properties of every registered token mixer: a new one is tested by being registered.

Every test runs for all mixers on all ranks they claim, on grids that are odd and not square.
"""

from __future__ import annotations

import inspect
import re
import shutil

import pytest
import torch
from torch import Tensor, nn

import mixzoo
from mixzoo.mixers import TOKEN_MIXERS, MixerInfo

DIM = 32
GRIDS = {1: ((9,), (2,)), 2: ((5, 7), (1, 6)), 3: ((3, 5, 4), (2, 2, 3))}
# (mixer, parameter) -> why its gradient is zero
WITHOUT_GRADIENT: dict[tuple[str, str], str] = {}

MIXERS = mixzoo.list_mixers()
each_mixer = pytest.mark.parametrize("name", MIXERS)
each_rank = pytest.mark.parametrize(
    ("name", "rank"), [(name, rank) for name, info in MIXERS.items() for rank in info.ranks]
)
each_grid = pytest.mark.parametrize(
    ("name", "grid"), [(name, grid) for name, info in MIXERS.items() for rank in info.ranks for grid in GRIDS[rank]]
)
grid_mixers = pytest.mark.parametrize(
    ("name", "rank"), [(name, rank) for name, info in MIXERS.items() if info.needs_grid for rank in info.ranks]
)


def build(name: str, grid: tuple[int, ...], **options) -> nn.Module:
    """The mixer for that grid in eval mode, with noise on every parameter."""
    torch.manual_seed(0)
    mixer = mixzoo.create_mixer(name, DIM, rank=len(grid), grid_size=grid, **options).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def maps(grid: tuple[int, ...], batch: int = 3, **options) -> Tensor:
    return torch.randn(batch, *grid, DIM, generator=torch.Generator().manual_seed(1), **options)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of values of that size; some mixers do not keep the size of what they mix."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))


@each_grid
def test_keeps_shape_and_is_deterministic_in_eval(name, grid):
    mixer, x = build(name, grid), maps(grid)
    before = x.clone()
    y = mixer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert y.isfinite().all()
    assert torch.equal(mixer(x), y)
    assert torch.equal(x, before), "the mixer wrote into its input"


@each_grid
def test_gradient_reaches_input_and_every_trainable_parameter(name, grid):
    mixer, x = build(name, grid).train(), maps(grid).requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (mixer(x) * weights).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
    for key, parameter in mixer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert (parameter.grad.abs().max() > 0) != ((name, key) in WITHOUT_GRADIENT), key


@each_grid
def test_samples_do_not_see_each_other(name, grid):
    mixer, x = build(name, grid), maps(grid)
    with torch.no_grad():
        assert_near(torch.cat([mixer(part) for part in x.split([1, 2])]), mixer(x))


@each_rank
def test_memory_layout_of_the_input_does_not_matter(name, rank):
    grid = GRIDS[rank][0]
    mixer, x = build(name, grid), maps(grid)
    channels_first = x.movedim(-1, 1).contiguous().movedim(1, -1)
    with torch.no_grad():
        assert_near(mixer(channels_first), mixer(x))


@each_rank
def test_half_precision_stays_half_and_near(name, rank):
    grid = GRIDS[rank][0]
    mixer, x = build(name, grid), maps(grid)
    with torch.no_grad():
        expected = mixer(x)
        y = mixer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    # bfloat16 has 8 bits; 2 are left for the rounding of a few layers
    assert (y.float() - expected).abs().max() < 2**-6 * max(1.0, expected.abs().max().item()) * 4


@each_rank
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(name, rank, dtype):
    grid = GRIDS[rank][0]
    mixer, x = build(name, grid).train(), maps(grid).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    # a float32 input may leave its linear layers narrower, never wider than it came
    assert y.dtype in {dtype, torch.bfloat16}
    y.float().square().sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == p.dtype for p in mixer.parameters() if p.requires_grad)


@each_rank
def test_compiles_without_graph_breaks(name, rank):
    grid = GRIDS[rank][0]
    mixer, x = build(name, grid), maps(grid)
    # recompilations are limited, and a mixer's ranks share its code
    torch.compiler.reset()
    outputs, gradients = [], []
    for run in (mixer, torch.compile(mixer, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        outputs.append(run(leaf))
        outputs[-1].square().sum().backward()
        gradients.append(leaf.grad)
    assert_near(*outputs)
    assert_near(*gradients)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_agrees_with_eager():
    grid = GRIDS[2][0]
    mixer, x = build("separable_conv", grid), maps(grid)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(mixer)(x), mixer(x), rtol=1e-4, atol=1e-5)


@each_rank
def test_exports_with_a_free_batch(name, rank):
    grid = GRIDS[rank][0]
    mixer, x = build(name, grid), maps(grid)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(mixer, (x,), dynamic_shapes=({0: batch},))
    assert "mixzoo" not in program.graph_module.code, "a program must run where this package is not"
    with torch.no_grad():
        assert_near(program.module()(x[:2]), mixer(x[:2]))


@each_rank
def test_device_and_dtype_reach_every_tensor(name, rank):
    mixer = mixzoo.create_mixer(name, DIM, rank=rank, grid_size=GRIDS[rank][0], device="meta", dtype=torch.float64)
    tensors = [*mixer.parameters(), *mixer.buffers()]
    assert all(t.device.type == "meta" for t in tensors)
    assert all(t.dtype == torch.float64 for t in tensors if t.is_floating_point())
    x = torch.empty(2, *GRIDS[rank][0], DIM, device="meta", dtype=torch.float64)
    assert mixer(x).shape == x.shape


@each_rank
def test_nchw_wraps_without_changing_anything(name, rank):
    grid = GRIDS[rank][0]
    mixer, x = build(name, grid), maps(grid)
    with torch.no_grad():
        assert_near(mixzoo.nchw(mixer)(x.movedim(-1, 1)), mixer(x).movedim(-1, 1))


@each_rank
def test_state_dict_is_complete(name, rank):
    grid = GRIDS[rank][0]
    mixer, x = build(name, grid), maps(grid)
    other = mixzoo.create_mixer(name, DIM, rank=rank, grid_size=grid).eval()
    other.load_state_dict(mixer.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other(x), mixer(x))


@each_rank
def test_takes_any_grid_unless_it_says_otherwise(name, rank):
    first, second = GRIDS[rank]
    if MIXERS[name].needs_grid:
        with pytest.raises(ValueError, match="grid_size"):
            mixzoo.create_mixer(name, DIM, rank=rank)
        with pytest.raises(ValueError, match=re.escape(str(list(second)))):
            build(name, first)(maps(second))
    else:
        mixer = mixzoo.create_mixer(name, DIM, rank=rank)
        assert mixer(maps(first)).shape[1:-1] == first
        assert mixer(maps(second)).shape[1:-1] == second


@grid_mixers
@pytest.mark.parametrize("trainable", [False, True])
def test_set_grid_size(name, rank, trainable):
    first, second = GRIDS[rank]
    mixer = build(name, first, dtype=torch.float64)
    frozen = {key for key, p in mixer.named_parameters() if not p.requires_grad}
    mixer.requires_grad_(trainable)
    before = {key: value.clone() for key, value in mixer.state_dict().items()}
    mixer.set_grid_size(first)
    assert all(torch.equal(value, before[key]) for key, value in mixer.state_dict().items())
    mixer.set_grid_size(second)
    assert mixer(maps(second, dtype=torch.float64)).isfinite().all()
    for key, parameter in mixer.named_parameters():
        assert parameter.requires_grad == (trainable and key not in frozen), key
        assert parameter.dtype == torch.float64
    with pytest.raises(ValueError, match=re.escape(str(list(first)))):
        mixer(maps(first, dtype=torch.float64))


@each_mixer
def test_unknown_options_are_refused(name):
    accepted = ", ".join(sorted(MIXERS[name].options)) or "none"
    message = f"{name!r} has no option 'no_such_option'; accepted: {accepted}"
    with pytest.raises(TypeError, match=re.escape(message)):
        mixzoo.create_mixer(name, DIM, grid_size=(4, 4), no_such_option=1)
    with pytest.raises(TypeError, match=re.escape(message)):
        mixzoo.create_mixer((name, {"no_such_option": 1}), DIM, grid_size=(4, 4))


@each_mixer
@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4])
def test_ranks_that_are_not_claimed_are_refused(name, rank):
    if rank in MIXERS[name].ranks:
        return
    with pytest.raises(ValueError, match=f"{name}.*rank={rank}"):
        mixzoo.create_mixer(name, DIM, rank=rank, grid_size=(3,) * rank)


@each_mixer
@pytest.mark.parametrize("dim", [0, -1, 2.5, True, "8"])
def test_impossible_widths_are_refused(name, dim):
    with pytest.raises(ValueError, match="dim"):
        mixzoo.create_mixer(name, dim, grid_size=(4, 4))


@each_mixer
def test_metadata_is_true(name):
    info: MixerInfo = MIXERS[name]
    assert info.name == name
    assert set(info.ranks) <= {1, 2, 3}
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|", info.paper)
    assert inspect.getdoc(info.factory)
    constructor = inspect.signature(info.factory).parameters
    assert {"rank", "grid_size", "device", "dtype"} <= set(constructor)
    assert all(p.kind is p.KEYWORD_ONLY for key, p in constructor.items() if key != "dim")
    assert info.needs_grid == (constructor["grid_size"].default is inspect.Parameter.empty)
    forward = inspect.signature(info.factory.forward).parameters
    assert list(forward)[1] == "x"
    assert set(info.extra_inputs) == set(list(forward)[2:])
    assert all(forward[key].default is None for key in info.extra_inputs)


@each_rank
def test_defaults_spelt_out_give_the_same_mixer(name, rank):
    grid = GRIDS[rank][0]
    x = maps(grid)
    plain, spelt = build(name, grid), build(name, grid, **MIXERS[name].options)
    with torch.no_grad():
        assert torch.equal(plain(x), spelt(x))


def test_unknown_mixer_is_named_with_its_neighbours():
    with pytest.raises(ValueError, match=r"'poolin'.*'pooling'"):
        mixzoo.create_mixer("poolin", DIM)
    assert set(MIXERS) == set(TOKEN_MIXERS.infos())
