"""The spectral mixers against their equations written out with `torch.fft`, plain convolutions and complex numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixzoo
from mixzoo import weights
from mixzoo.mixers import _dtcwt, _dtcwt_cells
from mixzoo.mixers._dtcwt_cells import _blocks

GRIDS = {1: ((9,), (8,), (1,)), 2: ((5, 7), (8, 12), (1, 6), (7, 1), (2, 2), (36, 5)), 3: ((3, 5, 4),)}
RANKED = [(rank, grid) for rank, grids in GRIDS.items() for grid in grids]
# 84 rows and 128 columns are cut into blocks
CELLS = ((28, 6), (24, 9), (26, 4), (7, 9), (3, 1), (2, 6), (3, 128), (84, 3))


def build(name: str, grid: tuple[int, ...], dim: int = 16, **options) -> nn.Module:
    torch.manual_seed(0)
    mixer = mixzoo.create_mixer(name, dim, rank=len(grid), grid_size=grid, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.3)
    return mixer


def maps(grid: tuple[int, ...], dim: int = 16, batch: int = 2, dtype=torch.float64) -> Tensor:
    return torch.randn(batch, *grid, dim, generator=torch.Generator().manual_seed(1), dtype=dtype)


def assert_twins(mixer: nn.Module, naive, x: Tensor) -> None:
    """Equal values and gradients of the input and of every parameter."""
    results = []
    for run in (mixer, naive):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        r = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
        results.append([y, *torch.autograd.grad((y * r).sum(), [leaf, *mixer.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.fixture(params=[False, True], ids=["eager", "exporting"])
def exporting(request, monkeypatch) -> bool:
    """Both formulations: that of eager mode and, by matrices alone, that of exported graphs."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: request.param)
    return request.param


@pytest.mark.parametrize("norm", ["backward", "ortho"])
@pytest.mark.parametrize(("rank", "grid"), RANKED)
def test_fourier(rank, grid, norm, exporting):
    def naive(x: Tensor) -> Tensor:
        return torch.fft.fftn(x, dim=tuple(range(1, x.ndim)), norm=norm).real

    for dim in (16, 15):
        assert_twins(build("fourier", grid, dim, norm=norm), naive, maps(grid, dim))


@pytest.mark.parametrize(("rank", "grid"), RANKED)
def test_global_filter(rank, grid, exporting):
    mixer, axes = build("global_filter", grid), tuple(range(1, rank + 1))

    def naive(x: Tensor) -> Tensor:
        s = torch.fft.rfftn(x, dim=axes, norm="ortho")
        return torch.fft.irfftn(s * torch.view_as_complex(mixer.complex_weight), s=grid, dim=axes, norm="ortho")

    assert_twins(mixer, naive, maps(grid))


@pytest.mark.parametrize("grid", [(4, 3), (36, 2)])
def test_second_derivatives_of_a_global_filter(grid):
    mixer, x = build("global_filter", grid, dim=2), maps(grid, dim=2, batch=1).requires_grad_()
    weight = mixer.complex_weight

    def slope(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.func.functional_call(mixer, {"complex_weight": weight}, x)
        return torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)

    assert torch.autograd.gradcheck(slope, (x, weight), fast_mode=True)


@pytest.mark.parametrize("act", ["silu", "relu"])
@pytest.mark.parametrize(("rank", "grid"), RANKED)
def test_aff(rank, grid, act, exporting):
    mixer, axes = build("aff", grid, num_blocks=4, sparsity_threshold=0.1, act=act), tuple(range(1, rank + 1))

    def parts(z: Tensor, function) -> Tensor:
        return torch.complex(function(z.real), function(z.imag))

    def naive(x: Tensor) -> Tensor:
        w1, b1, w2, b2 = (torch.complex(*p) for p in (mixer.w1, mixer.b1, mixer.w2, mixer.b2))
        s = torch.fft.rfftn(x, dim=axes, norm="ortho").unflatten(-1, (4, 4))
        h = parts(torch.einsum("...gi,gio->...go", s, w1) + b1, getattr(F, act))
        mask = parts(torch.einsum("...gi,gio->...go", h, w2) + b2, lambda t: F.softshrink(t, 0.1))
        return x + torch.fft.irfftn((mask * s).flatten(-2), s=grid, dim=axes, norm="ortho")

    assert_twins(mixer, naive, maps(grid))


def naive_scattering(mixer: nn.Module, x: Tensor) -> Tensor:
    """The equations in complex numbers, on maps ``(B, H, W, C)``."""

    def network(z: Tensor, names: tuple[str, str], equation: str, places) -> Tensor:
        for i, name in enumerate(names):
            weight, bias = (torch.complex(*getattr(mixer, name.format(part))) for part in ("weight", "bias"))
            z = torch.einsum(equation, z, weight) + places(bias)
            z = z if i else torch.complex(z.real.relu(), z.imag.relu())
        return z

    H, W = x.shape[1:3]
    x = x.permute(0, 3, 1, 2)  # (B, C, H, W)
    tokens = mixer.form == "channel_token"
    if tokens:
        plain, x = x.chunk(2, 1)
        plain = F.conv2d(plain, mixer.conv.weight, mixer.conv.bias, padding=1, groups=plain.shape[1])
    low, (high,) = mixzoo.dtcwt_forward(x, biort=mixer.biort)
    z = torch.view_as_complex(high).unflatten(1, (mixer.num_blocks, -1))  # (B, G, D, 6, h, w)
    z = network(z, ("{}1", "{}2"), "bgiohw,gij->bgjohw", lambda b: b[..., None, None, None])
    if tokens:
        z = network(z, ("token_{}1", "token_{}2"), "bgdohw,hwk->bgdohk", lambda b: b)
    low = low * mixer.low_weight.permute(2, 0, 1)
    y = mixzoo.dtcwt_inverse(low, [torch.view_as_real(z.flatten(1, 2))], biort=mixer.biort)[..., :H, :W]
    if tokens:
        y = torch.stack([plain, y], 2).flatten(1, 2)
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize("biort", ["near_sym_b", "legall"])
@pytest.mark.parametrize("form", ["channel", "channel_token"])
@pytest.mark.parametrize("grid", CELLS)
def test_scattering(grid, form, biort):
    mixer = build("scattering", grid, form=form, num_blocks=2, biort=biort)
    assert_twins(mixer, lambda x: naive_scattering(mixer, x), maps(grid))


@pytest.mark.parametrize("form", ["channel", "channel_token"])
def test_slices_of_a_batch_change_nothing(form, monkeypatch):
    mixer, x = build("scattering", (6, 4), form=form), maps((6, 4), batch=5)
    whole = mixer(x)
    # of two, two and one, or of three and two where half of the channels are scattered
    monkeypatch.setattr(mixzoo.mixers._layers, "SLICE_ELEMENTS", 2 * 4 * 6 * 4 * 16)
    torch.testing.assert_close(mixer(x), whole, rtol=1e-12, atol=1e-12)
    assert_twins(mixer, lambda x: naive_scattering(mixer, x), x)
    y = mixer(x.requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), y, rtol=1e-12, atol=1e-12)
    once, twice = (torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-12)


def test_second_derivatives_of_scattering():
    # with a bias this large no coefficient is near the kink of a rectifier
    mixer, x = build("scattering", (2, 4), dim=4), maps((2, 4), dim=4, batch=1).requires_grad_()
    with torch.no_grad():
        mixer.bias1.copy_(torch.where(mixer.bias1 > 0, 9.0, -9.0))
    names = ("low_weight", "weight1", "weight2")
    inputs = x, *(getattr(mixer, name) for name in names)

    def slope(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        y = torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), x)
        return torch.autograd.grad(y.square().sum(), (x, *values), create_graph=True)

    assert torch.autograd.gradcheck(slope, inputs, fast_mode=True)


def test_long_axes_are_cut_into_blocks(monkeypatch):
    assert [_blocks(half, 28) for half in (56, 42, 33, 32, 28)] == [4, 3, 1, 1, 1]
    monkeypatch.setattr(_dtcwt_cells, "_WHOLE", 0)
    assert [_blocks(half, 12) for half in (28, 14, 13, 12, 7, 2, 1)] == [4, 2, 1, 2, 1, 1, 1]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("grid", [(56, 3), (28, 6), (26, 64), (27, 33)])
@pytest.mark.parametrize("form", ["channel", "channel_token"])
def test_blocks_change_nothing(form, grid, batch, monkeypatch):
    mixer, x = build("scattering", grid, form=form, num_blocks=2), maps(grid, batch=batch)
    monkeypatch.setattr(_dtcwt_cells, "_WHOLE", 0)
    monkeypatch.setattr(_dtcwt_cells, "_ROWS", 12)
    monkeypatch.setattr(_dtcwt_cells, "_COLUMNS", 16)
    assert_twins(mixer, lambda x: naive_scattering(mixer, x), x)


@pytest.mark.parametrize("biort", _dtcwt.BIORT)
@pytest.mark.parametrize("size", [(16, 16), (11, 9), (2, 6), (1, 3), (20, 36), (64, 20)])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_wavelets_reconstruct(size, levels, biort):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    low, highs = mixzoo.dtcwt_forward(x, levels, biort=biort)
    assert len(highs) == levels
    y = mixzoo.dtcwt_inverse(low, highs, biort=biort)
    assert y.shape[2:] == tuple(side + side % 2 for side in size)
    torch.testing.assert_close(y[..., : size[0], : size[1]], x, rtol=0, atol=1e-12)


def test_first_level_is_a_convolution_with_symmetric_extension():
    x = torch.randn(1, 1, 6, 4, dtype=torch.float64)
    taps = torch.tensor(_dtcwt.first_filters("near_sym_b")[0], dtype=torch.float64)
    index = torch.arange(-6, 12) % 12
    rows = x[:, :, torch.minimum(index, 11 - index)]  # numpy's "symmetric"
    rows = F.conv2d(rows, taps.reshape(1, 1, -1, 1))
    index = torch.arange(-6, 10) % 8
    low = F.conv2d(rows[..., torch.minimum(index, 7 - index)], taps.reshape(1, 1, 1, -1))
    torch.testing.assert_close(mixzoo.dtcwt_forward(x)[0], low, rtol=1e-12, atol=1e-12)


def test_wavelets_name_what_is_wrong():
    x = torch.zeros(1, 1, 8, 8)
    low, highs = mixzoo.dtcwt_forward(x, 2)
    with pytest.raises(ValueError, match=r"levels.*0"):
        mixzoo.dtcwt_forward(x, 0)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\).*\(8, 8\)"):
        mixzoo.dtcwt_forward(x[0, 0])
    with pytest.raises(ValueError, match=r"biort.*near_sym_b.*'haar'"):
        mixzoo.dtcwt_forward(x, biort="haar")
    with pytest.raises(ValueError, match="at least one level"):
        mixzoo.dtcwt_inverse(low, [])
    with pytest.raises(ValueError, match=r"level 2.*\(8, 8\).*\(2, 2\)"):
        mixzoo.dtcwt_inverse(x, highs)


# precision

ISLANDS = {
    "fourier": {},
    "global_filter": {},
    "aff": {},
    "scattering": {"form": "channel"},
}


@pytest.mark.parametrize("grid", [(6, 10), (36, 4)])
@pytest.mark.parametrize("name", ISLANDS)
def test_autocast_leaves_spectra_alone(name, grid):
    """Forward and backward in float32, where casts of autocast would leave three digits."""
    mixer, x = build(name, grid, **ISLANDS[name]).float(), maps(grid, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = mixer(leaf)
        assert y.dtype == torch.float32
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *mixer.parameters()])])
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("name", ISLANDS)
def test_a_backward_pass_inside_autocast_is_near(name):
    mixer, x = build(name, (6, 10), **ISLANDS[name]).float(), maps((6, 10), dtype=torch.float32)
    results = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(torch.autograd.grad(mixer(leaf).square().sum(), [leaf, *mixer.parameters()]))
    for plain, cast in zip(*results, strict=True):
        assert cast.dtype == torch.float32
        assert (cast - plain).abs().max() < 0.03 * plain.abs().max()


def test_autocast_in_the_form_with_a_convolution():
    mixer, x = build("scattering", (6, 10), form="channel_token").float(), maps((6, 10), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    expected = mixer(x)
    # the convolution of the even channels is autocast's business
    assert torch.equal(y[..., 1::2], expected[..., 1::2])
    assert (y - expected).abs().max() < 0.02 * expected.abs().max()
    y.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize(("form", "scattered"), [("channel", slice(None)), ("channel_token", slice(1, None, 2))])
def test_scattering_of_narrow_parameters_runs_in_float32(form, scattered):
    narrow, x = build("scattering", (6, 10), form=form).bfloat16(), maps((6, 10)).bfloat16()
    y = narrow(x)
    expected = narrow.float()(x.float()).bfloat16()
    # equal but for roundings of the products that fall on another side; of narrow weights a third would
    assert (y != expected)[..., scattered].double().mean() < 0.01


@pytest.mark.parametrize("name", ["gfnet_ti", "gfnet_h_ti", "affnet_et", "svt_s", "svt_s_paper"])
def test_models_train_under_autocast(name, small):
    model = small(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, *model.img_size)).float().square().mean()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("grid", [(6, 10), (36, 4)])
@pytest.mark.parametrize("name", ISLANDS)
def test_exported_graphs_hold_neither_transforms_nor_complex_numbers(name, grid):
    mixer, x = build(name, grid, **ISLANDS[name]).float().eval(), maps(grid, dtype=torch.float32)
    program = torch.export.export(mixer, (x,))
    for node in program.graph.nodes:
        assert "fft" not in str(node.target)
        value = node.meta.get("val")
        assert not isinstance(value, Tensor) or not value.is_complex()
    torch.testing.assert_close(program.module()(x), mixer(x), rtol=1e-4, atol=1e-4)


# counting


def _fft(points: int, channels: int) -> float:
    """Multiply-adds of a real transform: a quarter of 5 N log2 N flops."""
    return channels * 5 * points * math.log2(points) / 4


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (56, 56)])
def test_counts_of_filters(grid):
    H, W = grid
    bins, C = H * (W // 2 + 1), 32
    counted = mixzoo.complexity(mixzoo.create_mixer("global_filter", C, grid_size=grid), inputs=torch.empty(1, H, W, C))
    assert counted.macs == 0
    assert counted.transform_macs == pytest.approx(2 * _fft(H * W, C) + 3 * bins * C, rel=1e-6)
    counted = mixzoo.complexity(mixzoo.create_mixer("aff", C), inputs=torch.empty(1, H, W, C))
    assert counted.macs == 8 * bins * C * C // 8
    assert counted.transform_macs == pytest.approx(2 * _fft(H * W, C) + 3 * bins * C, rel=1e-6)
    assert not counted.uncounted


def test_count_of_fourier_mixing():
    counted = mixzoo.complexity(mixzoo.create_mixer("fourier", 24, rank=1), inputs=torch.empty(1, 16, 24))
    assert (counted.macs, counted.transform_macs) == (0, pytest.approx(_fft(16 * 24, 1), abs=1))
    assert not counted.uncounted


@pytest.mark.parametrize("form", ["channel", "channel_token"])
def test_count_of_scattering(form):
    H, W, C = 28, 28, 32
    mixer = mixzoo.create_mixer("scattering", C, grid_size=(H, W), form=form)
    counted = mixzoo.complexity(mixer, inputs=torch.empty(1, H, W, C))
    scattered = C if form == "channel" else C // 2
    # taps of both filters over rows, of both over the columns of both bands, and back
    assert counted.transform_macs == 2 * 96 * H * W * scattered
    coefficients = 6 * H * W // 4 * scattered
    macs = 8 * coefficients * scattered // 4
    if form == "channel_token":
        macs += 8 * coefficients * W // 2 + 9 * H * W * scattered
    assert counted.macs == macs
    assert not counted.uncounted


# model: multiply-adds of matrix products and convolutions, of transforms, in M
MODEL_COUNTS = {
    "gfnet_ti": (1271.9, 12.5),
    "gfnet_h_b": (8512.2, 83.2),
    "affnet_et": (356.2, 6.3),
    "affnet_t": (786.5, 9.4),
    "affnet": (1453.7, 13.7),
    "svt_s": (5016.3, 115.6),
    "svt_s_paper": (4272.5, 96.3),
}


@pytest.mark.parametrize("name", MODEL_COUNTS)
def test_counts_of_models(name):
    counted = mixzoo.complexity(mixzoo.create_model(name, device="meta"))
    assert (round(counted.macs / 1e6, 1), round(counted.transform_macs / 1e6, 1)) == MODEL_COUNTS[name]
    assert not counted.uncounted


def test_parameters_of_the_unpublished_affnets():
    counts = {"affnet_base": 17_178_104, "affnet_large": 46_068_088}
    for name, parameters in counts.items():
        assert sum(p.numel() for p in mixzoo.create_model(name, device="meta").parameters()) == parameters


# other grids


@pytest.mark.parametrize(("resize", "mode"), [("spectrum", "bicubic"), ("spectrum_linear", "bilinear")])
def test_filters_are_resampled_with_their_corners_in_place(resize, mode):
    mixer = build("global_filter", (8, 6), resize=resize).float()
    old = mixer.complex_weight.detach().clone()  # (8, 4, C, 2)
    mixer.set_grid_size((11, 9))
    new = mixer.complex_weight.detach()
    images = old.reshape(8, 4, -1).permute(2, 0, 1).unsqueeze(0)
    expected = F.interpolate(images, size=(11, 5), mode=mode, align_corners=True)
    assert torch.equal(new, expected.squeeze(0).permute(1, 2, 0).reshape(11, 5, 16, 2))
    torch.testing.assert_close(new[[0, -1]][:, [0, -1]], old[[0, -1]][:, [0, -1]])


def test_a_resized_kernel_acts_as_before_where_it_reaches():
    mixer = build("global_filter", (5, 7), resize="kernel")
    x = torch.zeros(1, 5, 7, 16, dtype=torch.float64)
    x[:, 2, 3] = torch.randn(16, dtype=torch.float64)
    before = mixer(x)
    mixer.set_grid_size((9, 12))
    padded = F.pad(x, (0, 0, 1, 4, 3, 1))
    torch.testing.assert_close(mixer(padded)[:, 3:8, 1:8], before)


@pytest.mark.parametrize("form", ["channel", "channel_token"])
def test_scattering_resizes_keep_constants(form):
    mixer = build("scattering", (8, 6), form=form)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(0.5)
    mixer.set_grid_size((11, 9))
    assert mixer.low_weight.shape[:2] == (12, 10)
    torch.testing.assert_close(mixer.low_weight, torch.full_like(mixer.low_weight, 0.5))
    if form == "channel_token":
        assert mixer.token_weight1.shape == (2, 6, 5, 5)
        torch.testing.assert_close(
            mixer.token_weight1.sum(2), torch.full((2, 6, 5), 1.5, dtype=torch.float64), rtol=1e-6, atol=0
        )


# SVT's files and heads


@pytest.fixture(scope="module")
def svt_file() -> dict[str, Tensor]:
    model = mixzoo.create_model("svt_s_paper", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), img_size=32)
    return weights.export(model.state_dict(), "svt")


OPTIONS = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}


def test_filters_of_the_wavelets_are_written_and_checked(svt_file):
    assert svt_file["block1.0.attn.xfm.h0o"].shape == (1, 1, 13, 1)
    assert svt_file["block2.0.attn.ifm.g1b"].shape == (1, 1, 14, 1)
    assert svt_file["block1.0.attn.xfm.h0o"].flatten()[6] == 0.55546875
    converted = weights.convert(svt_file)
    assert not any("xfm" in key or "ifm" in key for key in converted)
    again = weights.export(converted, "svt")
    assert again.keys() == svt_file.keys()
    assert all(torch.equal(again[key], svt_file[key]) for key in again)
    weights.convert({key: t.bfloat16() for key, t in svt_file.items()})
    other = svt_file | {"block1.0.attn.xfm.h0o": 1.01 * svt_file["block1.0.attn.xfm.h0o"]}
    with pytest.raises(mixzoo.weights.CheckpointError, match=r"block1\.0\.attn\.xfm\.h0o is not the constant"):
        weights.convert(other)


def test_another_number_of_classes_resets_both_heads(svt_file):
    model = mixzoo.create_model("svt_s_paper", **OPTIONS, img_size=32, num_classes=7)
    report = mixzoo.load_checkpoint(model, svt_file)
    assert set(report.fresh) == {f"head.fc.{head}.{kind}" for head in ("cls", "aux") for kind in ("weight", "bias")}
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_a_file_for_another_size_is_resized(svt_file):
    model = mixzoo.create_model("svt_s_paper", **OPTIONS, img_size=(61, 90))
    report = mixzoo.load_checkpoint(model, svt_file)
    assert len(report.adapted) == 2
    assert model(torch.zeros(1, 3, 61, 90)).isfinite().all()


def test_without_token_labels():
    model = mixzoo.create_model("svt_s_paper", **OPTIONS, img_size=32, token_label=False)
    theirs = weights.export(model.state_dict(), "svt")
    assert not any(key.startswith("aux_head") for key in theirs)
    assert not mixzoo.load_checkpoint(model, theirs).fresh
    with pytest.raises(ValueError, match="token_label=False"):
        model.forward_token_labels(torch.zeros(1, 3, 32, 32))


def test_token_labels_come_back_to_their_own_image():
    torch.manual_seed(0)
    model = mixzoo.create_model("svt_s", **OPTIONS, img_size=(96, 64), num_classes=5).eval()
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        cls, dense = model.forward_token_labels(x)
        whole_cls, whole_dense = model.forward_token_labels(x, box=(0, 0, 3, 2))
        logits = model(x)
    assert (cls.shape, dense.shape) == ((2, 5), (2, 6, 5))
    torch.testing.assert_close(logits, cls + 0.5 * dense.amax(1))
    # a box around everything swaps the two images, and their positions back
    torch.testing.assert_close(whole_cls, cls.flip(0))
    torch.testing.assert_close(whole_dense, dense)
    with pytest.raises(ValueError, match="multiples of 32"):
        mixzoo.create_model("svt_s", **OPTIONS, img_size=40).forward_token_labels(
            torch.zeros(2, 3, 40, 40), (0, 0, 1, 1)
        )


@pytest.mark.parametrize("name", ["affnet_t", "svt_s_paper"])
def test_releases_without_a_file_say_so(name):
    with pytest.raises(RuntimeError, match=r"1drv\.ms" if name == "affnet_t" else "no weights were released"):
        mixzoo.create_model(name, pretrained=True)
