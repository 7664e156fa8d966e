"""Token MLPs and rafts against their equations written out with transposes, gathers and unfolded windows."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

import mixzoo
from mixzoo.mixers import _layers
from mixzoo.mixers.raft import BicubicResize
from mixzoo.models.raftmlp import RaftMLPBlock, ScaledPatches

FLOAT64 = {"dtype": torch.float64}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def drawn(module: nn.Module) -> nn.Module:
    """The module with values that show every parameter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def assert_twins(fast, naive, x: Tensor) -> None:
    """Equal values and gradients of the input and of every parameter."""
    parameters = tuple(fast.parameters()) if isinstance(fast, nn.Module) else ()
    results = []
    for run in (fast, naive):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        r = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
        results.append([y, *torch.autograd.grad((y * r).sum(), [leaf, *parameters])])
    tolerance = TOLERANCE[x.dtype]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max()))


def layer(module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def naive_token_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(1, -2).transpose(1, 2)  # (B, C, N)
    return layer(mlp.fc2, mlp.act(layer(mlp.fc1, tokens))).transpose(1, 2).reshape(x.shape)


def naive_nin_gating(gating: nn.Module, x: Tensor) -> Tensor:
    gate = x + naive_token_mlp(gating.token, gating.token_norm(x))
    hidden = F.gelu(layer(gating.channel.fc1, gating.channel_norm(gate)))
    return layer(gating.proj, x) * (gate + layer(gating.channel.fc2, hidden))


def naive_raft_axis(axis: nn.Module, x: Tensor, joined: str) -> Tensor:
    """One half of a raft block; the norm sees the channels raft after raft."""
    r = axis.raft_size
    tokens = axis.norm(rearrange(x, "b h w (k o) -> b h w (o k)", k=r))
    tokens = rearrange(tokens, f"b h w (o k) -> {joined}", k=r)
    tokens = layer(axis.fc2, F.gelu(layer(axis.fc1, tokens)))
    return x + rearrange(tokens, f"{joined} -> b h w (k o)", k=r)


def naive_resize(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return F.interpolate(x.permute(0, 3, 1, 2), size=grid, mode="bicubic").permute(0, 2, 3, 1)


def naive_raft(raft: nn.Module, x: Tensor) -> Tensor:
    grid = x.shape[1:3]
    x = naive_resize(x, raft.weight_grid)
    x = naive_raft_axis(raft.vertical, x, "b w o (k h)")
    x = naive_raft_axis(raft.horizontal, x, "b h o (k w)")
    return naive_resize(x, grid)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("grid", [(9,), (1,), (5, 7), (6, 6), (2, 3, 4)])
@pytest.mark.parametrize("name", ["mlp", "nin_gating"])
def test_token_mixers(name, grid, dtype):
    mixer = drawn(mixzoo.create_mixer(name, 12, rank=len(grid), grid_size=grid, hidden=10, dtype=dtype))
    naive = {"mlp": naive_token_mlp, "nin_gating": naive_nin_gating}[name]
    assert_twins(mixer, lambda x: naive(mixer, x), torch.randn(3, *grid, 12, dtype=dtype))


def test_token_mlps_mix_slices_of_the_batch_unless_a_hook_would_see_them(monkeypatch):
    monkeypatch.setattr(_layers, "SLICE_ELEMENTS", 1)
    mixer = drawn(mixzoo.create_mixer("mlp", 12, grid_size=(5, 7), dtype=torch.float64))
    x, seen = torch.randn(3, 5, 7, 12, **FLOAT64), []
    assert_twins(mixer, lambda x: naive_token_mlp(mixer, x), x)
    mixer.fc1.register_forward_hook(lambda module, args, output: seen.append(output.shape[0]))
    mixer(x)
    assert seen == [3]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("raft_size", [1, 2, 4])
@pytest.mark.parametrize(("weight_grid", "grid"), [((5, 7), (5, 7)), ((4, 4), (6, 3)), ((6, 3), (4, 4))])
def test_raft(raft_size, weight_grid, grid, dtype):
    options = {"raft_size": raft_size, "weight_grid": weight_grid}
    mixer = drawn(mixzoo.create_mixer("raft", 12, grid_size=grid, **options, dtype=dtype))
    assert_twins(mixer, lambda x: naive_raft(mixer, x), torch.randn(2, *grid, 12, dtype=dtype))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="without oneDNN biases are copied")
@pytest.mark.parametrize(("raft_size", "copies"), [(1, 0), (2, 2), (4, 2)])
def test_a_raft_block_gathers_its_rafts_and_copies_no_map_besides(raft_size, copies):
    block = RaftMLPBlock(8, weight_grid=(32, 32), token_mixer=("raft", {"raft_size": raft_size}))
    x = torch.randn(2, 32, 32, 8)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode(), torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        block(x)
    copied = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    assert sum(math.prod(shape) >= x.numel() for shape in copied) == copies


@pytest.mark.parametrize("kernels", [(4,), (4, 8), (2, 4, 8)])
def test_patches_at_several_scales_are_one_linear_map_of_all_windows(kernels):
    patches = drawn(ScaledPatches(3, 6, kernels, **FLOAT64))
    p = kernels[0]

    def naive(x: Tensor) -> Tensor:
        h, w = (-(-side // p) for side in x.shape[2:])
        x = F.interpolate(x, size=(h * p, w * p), mode="bicubic")
        windows = [F.unfold(x, k, stride=p, padding=(k - p) // 2) for k in kernels]
        weight = torch.cat([conv.weight.flatten(1) for conv in patches.convs], dim=1)
        return (weight @ torch.cat(windows, dim=1) + patches.convs[0].bias[:, None]).unflatten(2, (h, w))

    for size in ((16, 24), (17, 21)):
        assert_twins(patches, naive, torch.randn(2, 3, *size, **FLOAT64))


@pytest.mark.parametrize(("old", "new"), [((58, 50), (56, 56)), ((5, 9), (7, 7)), ((7, 7), (9, 5)), ((1, 3), (2, 3))])
def test_bicubic_resizing_rounds_as_torch_does(old, new):
    x = torch.randn(2, *old, 5)
    # positions in float64 would be 2e-5 away
    torch.testing.assert_close(BicubicResize()(x, *new), naive_resize(x, new), rtol=0, atol=5e-6)
    assert_twins(lambda x: BicubicResize()(x, *new), lambda x: naive_resize(x, new), x.double())


def small_mixer(**options) -> nn.Module:
    return mixzoo.create_model("mixer_s16_224", depth=2, dim=24, num_classes=5, **options)


SIZES = [(64, 96), (96, 64), (48, 48)]


@pytest.mark.parametrize("size", SIZES)
def test_weights_of_another_size_are_resampled_and_said_to_be_approximate(size):
    source = drawn(small_mixer(img_size=64))
    loaded, images = small_mixer(img_size=size).eval(), torch.randn(2, 3, *size)
    report = mixzoo.load_checkpoint(loaded, source.state_dict())
    assert len(report.adapted) == 2
    assert all(re.search("from grid 4x4 to .* approximation", how) for how in report.adapted.values())
    with pytest.warns(UserWarning, match="approximation to be fine-tuned"):
        source.set_input_size(size)
    assert torch.equal(source.eval()(images), loaded(images))
    assert source.img_size == size


@pytest.mark.filterwarnings("ignore:a token MLP was resampled")
@pytest.mark.parametrize("old", [(4,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("factor", [2, 3])
def test_resampled_token_mlps_treat_constant_maps_as_before(old, factor):
    mlp = drawn(mixzoo.create_mixer("mlp", 6, rank=len(old), grid_size=old, hidden=5, **FLOAT64))
    with torch.no_grad():
        # so that the output is constant over the tokens too
        for tensor in (mlp.fc2.weight, mlp.fc2.bias):
            tensor.copy_(tensor[:1].expand_as(tensor))
    row = torch.randn(6, **FLOAT64)
    before = mlp(row.expand(1, *old, 6))
    mlp.set_grid_size([factor * side for side in old])
    after = mlp(row.expand(1, *mlp.grid_size, 6))
    # resampling is float32 inside
    torch.testing.assert_close(after, before.flatten(0, -2)[0].expand_as(after), rtol=1e-5, atol=1e-5)


def google_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The weights as Google's files name and lay them out."""
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    arrays = {"stem/kernel": state["stem.conv.weight"].transpose(2, 3, 1, 0), "stem/bias": state["stem.conv.bias"]}
    names = {"token": ("LayerNorm_0", "token_mixing"), "channel": ("LayerNorm_1", "channel_mixing")}
    for i in range(len(model.stages)):
        for branch, (norm, mlp) in names.items():
            ours, theirs = f"stages.{i}.blocks.0.{branch}", f"MixerBlock_{i}"
            arrays[f"{theirs}/{norm}/scale"] = state[f"{ours}.norm.weight"]
            arrays[f"{theirs}/{norm}/bias"] = state[f"{ours}.norm.bias"]
            for k in (0, 1):
                arrays[f"{theirs}/{mlp}/Dense_{k}/kernel"] = state[f"{ours}.op.fc{k + 1}.weight"].T
                arrays[f"{theirs}/{mlp}/Dense_{k}/bias"] = state[f"{ours}.op.fc{k + 1}.bias"]
    arrays |= {"pre_head_layer_norm/scale": state["norm.weight"], "pre_head_layer_norm/bias": state["norm.bias"]}
    return arrays | {"head/kernel": state["head.fc.weight"].T, "head/bias": state["head.fc.bias"]}


@pytest.mark.parametrize("depth", [2, 12])
def test_googles_files_bring_their_activation(depth, tmp_path):
    options = {"depth": depth, "dim": 24, "img_size": 32}
    source = drawn(mixzoo.create_model("mixer_s16_224", **options, act="gelu_tanh", num_classes=21843)).eval()
    np.savez(tmp_path / "Mixer-S_16.npz", **google_arrays(source))
    model = mixzoo.create_model("mixer_s16_224", **options, num_classes=21843).eval()
    images = torch.randn(2, 3, 32, 32)
    report = mixzoo.load_checkpoint(model, tmp_path / "Mixer-S_16.npz")
    assert (report.layout, report.activation, report.fresh, report.ignored) == ("google", "gelu_tanh", {}, {})
    assert torch.equal(model(images), source(images))
    # timm's weights take the exact form back
    theirs = MlpMixer(patch_size=16, num_blocks=depth, embed_dim=24, img_size=32, num_classes=21843).eval()
    assert mixzoo.load_checkpoint(model, drawn(theirs).state_dict()).activation == model.act == "gelu"
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-4)
