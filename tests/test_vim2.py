"""ViM2: published sizes, the averaged chain against its plain form, odd sizes, VMamba's weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mixzoo
from mixzoo.models._averaging import WeightedAverages, weighted_sum
from mixzoo.models.vim2 import PatchMerging

# parameters without the classifier and with it, multiply-adds of matrix products and of scans (G), at 224
SIZES = {
    "vim2_t": (23_260_017, 24_029_017, 4.07, 0.228),
    "vim2_s": (42_942_864, 43_711_864, 7.85, 0.372),
    "vim2_b": (74_600_368, 75_625_368, 13.59, 0.496),
}
SMALL = {"dims": (16, 32, 48, 64), "img_size": 64, "num_classes": 5}


def small(**options) -> nn.Module:
    torch.manual_seed(0)
    return mixzoo.create_model("vim2_t", **SMALL | options).eval()


def images(*sides: int) -> Tensor:
    return torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(1))


def averages(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("averages.weight")]


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    headless, total, macs, elements = SIZES[name]
    model = mixzoo.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == total
    assert total - sum(p.numel() for p in model.get_classifier().parameters()) == headless
    counted = mixzoo.complexity(model)
    assert not counted.uncounted
    assert counted.macs / 1e9 == pytest.approx(macs, abs=0.006)
    assert counted.transform_macs / 2e9 == pytest.approx(elements, abs=0.0006)


def test_number_of_averages_is_the_published_one():
    # l (2 l + 3) for l layers of each kind in turn
    assert WeightedAverages(["token", "channel"] * 6).weight.numel() == 6 * (2 * 6 + 3)
    assert [p.numel() for p in averages(mixzoo.create_model("vim2_s", device="meta"))] == [9, 9, 405, 9]


def test_begins_as_the_plain_residual_chain():
    x = images(64, 64)
    torch.testing.assert_close(small()(x), plain_weights(small(weighted_average=False))(x))


def plain_weights(model: nn.Module) -> nn.Module:
    """Those of the averaged model."""
    state = {key: value for key, value in small().state_dict().items() if "averages" not in key}
    model.load_state_dict(state)
    return model


def plain_stage(stage: nn.Module, x: Tensor) -> Tensor:
    """Equations 19 and 20 as they stand."""
    x = stage.downsample(x).permute(0, 2, 3, 1)
    tokens, channels, weights = [x], [x], list(stage.averages.weight)
    for block in stage.blocks:
        for branch, results in ((block.first, tokens), (block.second, tokens), (block.channel, channels)):
            total = sum(weights.pop(0) * y for y in [*tokens]) + sum(weights.pop(0) * y for y in [*channels])
            x = branch(total)
            results.append(x)
    assert not weights
    return x.permute(0, 3, 1, 2)


def test_averages_equal_the_equations():
    model = small().double()
    with torch.no_grad():
        for weight in averages(model):
            weight += 0.3 * torch.randn_like(weight)
    stage, x = model.stages[2], torch.randn(2, 32, 5, 6, dtype=torch.float64, requires_grad=True)
    wanted = [x, *stage.parameters()]
    results = [(y, *torch.autograd.grad(y.sin().sum(), wanted)) for y in (stage(x), plain_stage(stage, x))]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_every_average_counts():
    model, x = small(), images(64, 64)
    model(x).square().sum().backward()
    for weight in averages(model):
        assert (weight.grad != 0).all()


def test_any_model_of_blocks_may_average():
    torch.manual_seed(0)
    model = mixzoo.create_model("metaformer_s12", weighted_average=True, depths=(1, 2, 1, 1), dims=(8, 8, 8, 8)).eval()
    plain = mixzoo.create_model("metaformer_s12", depths=(1, 2, 1, 1), dims=(8, 8, 8, 8)).eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "averages" not in key})
    x = images(64, 64)
    torch.testing.assert_close(model(x), plain(x))
    assert [p.numel() for p in averages(model)] == [5, 14, 5, 5]


@pytest.mark.parametrize("sides", [(33, 47), (200, 97), (8, 8), (1, 64)])
def test_odd_sizes(sides):
    model = small()
    if min(sides) < 4:
        with pytest.raises(ValueError, match="at least 4"):
            model(images(*sides))
        return
    maps = model.forward_intermediates(images(*sides), intermediates_only=True)
    grid = tuple(side // 4 for side in sides)
    for y in maps:
        assert y.shape[2:] == grid
        grid = tuple(-(-side // 2) for side in grid)


def test_patch_merging_is_that_of_vmamba():
    merge = PatchMerging(3, 5).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    y = merge(x)
    assert y.shape == (2, 5, 3, 2)
    corners = torch.cat([x[:, :, 2, 2], x[:, :, 3, 2], x[:, :, 2, 3], x[:, :, 3, 3]], 1)
    torch.testing.assert_close(y[:, :, 1, 1], merge.reduction(merge.norm(corners)))
    corners = torch.cat([x[:, :, 4, 2], torch.zeros(2, 3), x[:, :, 4, 3], torch.zeros(2, 3)], 1)
    torch.testing.assert_close(y[:, :, 2, 1], merge.reduction(merge.norm(corners)))
    with pytest.raises(ValueError, match="kernel=3"):
        PatchMerging(3, 5, 3)


def test_what_is_not_decayed():
    model = small()
    exempt = model.no_weight_decay()
    assert "stages.2.blocks.1.second.op.mix.scans.A_log" in exempt
    assert "stages.3.blocks.0.channel.op.mix.scans.dt_bias" in exempt
    assert {name.rpartition(".")[2] for name in exempt} == {"A_log", "D", "dt_bias"}
    assert all(weight.ndim == 1 for weight in averages(model))


def vmamba(model: nn.Module, norm: str = "ln_1", op: str = "self_attention") -> dict[str, Tensor]:
    """A state dict of VMamba's first release that agrees with the token branches of a model."""
    names = {"mix.conv": "conv2d", "mix.norm": "out_norm", "mix.scans.x_proj": "x_proj_weight"}
    names |= {"mix.scans.dt_proj": "dt_projs_weight", "mix.scans.dt_bias": "dt_projs_bias"}
    names |= {"mix.scans.A_log": "A_logs", "mix.scans.D": "Ds"}
    state = {f"patch_embed.proj.{key}": value for key, value in model.stem.conv.state_dict().items()}
    state |= {f"patch_embed.norm.{key}": value for key, value in model.stem.norm.state_dict().items()}
    for s, stage in enumerate(model.stages):
        for i, block in enumerate(stage.blocks):
            for j, branch in enumerate((block.first, block.second)):
                place = f"layers.{s}.blocks.{3 * i + j}."
                state |= {f"{place}{norm}.{key}": value for key, value in branch.norm.state_dict().items()}
                for key, value in branch.op.state_dict().items():
                    for ours, theirs in names.items():
                        key = key.replace(ours, theirs)
                    state[f"{place}{op}.{key}"] = value.flatten(0, 1) if key in ("A_logs", "Ds") else value
        if s:
            entry = stage.downsample.state_dict()
            state |= {f"layers.{s - 1}.downsample.{key}": value for key, value in entry.items()}
    place = "layers.2.blocks.2."
    state |= {place + key[len("layers.2.blocks.0.") :]: v for key, v in state.items() if "layers.2.blocks.0." in key}
    state |= {f"norm.{key}": value for key, value in model.head.norm.state_dict().items()}
    return state | {f"head.{key}": value for key, value in model.head.fc.state_dict().items()}


def test_weights_of_vmamba_fill_the_token_branches():
    source = small()
    torch.manual_seed(5)
    model = mixzoo.create_model("vim2_t", **SMALL)
    report = mixzoo.load_checkpoint(model, vmamba(source))
    assert report.layout == "vmamba"
    assert all(".channel." in key or key.endswith("averages.weight") for key in report.fresh)
    assert all("blocks.2." in key for key in report.ignored)
    loaded = model.state_dict()
    for key, value in source.state_dict().items():
        assert torch.equal(loaded[key], value) or key in report.fresh, key


@pytest.mark.parametrize("count", [1, 3])
def test_weighted_sum_is_well_behaved(count):
    maps = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    weights = torch.randn(count, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(weighted_sum, (maps, weights))
    assert torch.autograd.gradcheck(lambda w, *m: weighted_sum(list(m), w), (weights, *maps))


def test_swapped_token_mixers():
    model = small(token_mixer=["pooling", "identity", "spatial_fc", "attention"])
    assert model(images(64, 64)).shape == (2, 5)
    model.set_input_size(96)
    assert model(images(96, 96)).shape == (2, 5)
