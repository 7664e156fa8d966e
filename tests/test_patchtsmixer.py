"""PatchTSMixer beyond the fixtures: against `transformers` where it is installed, its heads, masks and losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mixzoo
from mixzoo import weights
from mixzoo.models._series import make_scaler
from mixzoo.models._series_heads import CrossChannelHead, PatchMask, ScaleInjection

SIZES = {"context_length": 70, "patch_length": 8, "patch_stride": 5, "prediction_length": 12}
OURS = SIZES | {"num_channels": 3, "dim": 12, "ratio": 2.0, "depth": 2}


def create(**options) -> nn.Module:
    model = mixzoo.create_model("patchtsmixer", **OURS | options)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            p.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else p + 0.1 * noise)
    return model.eval()


def series(batch: int = 4, channels: int = 3) -> Tensor:
    return 3 + torch.randn(batch, 70, channels, generator=torch.Generator().manual_seed(1)).cumsum(1)


def observed(batch: int = 4) -> Tensor:
    return (torch.rand(batch, 70, 3, generator=torch.Generator().manual_seed(2)) > 0.3).float()


# against transformers

COMMON = {"num_input_channels": 3, "d_model": 12, "expansion_factor": 2, "num_layers": 2}
VARIANTS = {
    "forecast": ("ForPrediction", {}),
    "mixed channels": ("ForPrediction", {"mode": "mix_channel"}),
    "batch norm": ("ForPrediction", {"norm_mlp": "BatchNorm", "mode": "mix_channel"}),
    "no gates": ("ForPrediction", {"gated_attn": False, "mode": "mix_channel"}),
    "attention": (
        "ForPrediction",
        {"self_attn": True, "self_attn_heads": 3, "use_positional_encoding": True, "norm_mlp": "BatchNorm"},
    ),
    "mean scaler": ("ForPrediction", {"scaling": "mean"}),
    "scaler True": ("ForPrediction", {"scaling": True}),
    "no scaler": ("ForPrediction", {"scaling": None}),
    "some channels": ("ForPrediction", {"prediction_channel_indices": [2, 0]}),
    "student": ("ForPrediction", {"loss": "nll"}),
    "normal": ("ForPrediction", {"loss": "nll", "distribution_output": "normal", "prediction_channel_indices": [0, 1]}),
    "counts": ("ForPrediction", {"loss": "nll", "distribution_output": "negative_binomial", "scaling": "mean"}),
    "masked": ("ForPretraining", {"mask_type": "forecast", "num_forecast_mask_patches": [2]}),
    "classes": ("ForTimeSeriesClassification", {"num_targets": 5}),
    "classes of all": ("ForTimeSeriesClassification", {"num_targets": 5, "head_aggregation": None, "scaling": None}),
    "regression": ("ForRegression", {"num_targets": 2, "output_range": [-1, 4], "head_aggregation": "avg_pool"}),
    "regression by last": ("ForRegression", {"loss": "nll", "num_targets": 2, "head_aggregation": "use_last"}),
}


@pytest.fixture
def theirs(request):
    """A model of transformers with telling weights."""
    transformers = pytest.importorskip("transformers")
    kind, options = VARIANTS[request.param]
    config = transformers.PatchTSMixerConfig(**SIZES, **COMMON, **options)
    model = getattr(transformers, f"PatchTSMixer{kind}")(config)
    with torch.no_grad():
        for i, (_, tensor) in enumerate(sorted(model.state_dict().items())):
            if tensor.is_floating_point() and "position" not in _:
                noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
                tensor.copy_(noise * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 1 + 0.1 * noise)
    return model.eval()


def close(ours: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5 * want.abs().mean().item() + 1e-6)


@pytest.mark.parametrize("theirs", VARIANTS, indirect=True)
def test_folders_of_transformers_give_its_outputs(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    model = mixzoo.load(tmp_path).eval()
    x = series().abs().requires_grad_()
    kind = type(theirs).__name__.removeprefix("PatchTSMixer")
    if kind in ("ForPrediction", "ForPretraining"):
        output = theirs(past_values=x, observed_mask=observed(), return_loss=False)
        ours = model(x, observed())
    else:
        output, ours = theirs(past_values=x, return_loss=False), model(x)
    want = output.regression_outputs if kind == "ForRegression" else output.prediction_outputs
    if model.family is not None:
        given = observed() if kind == "ForPrediction" else None
        parameters = model.distribution_parameters(x, given)
        # transformers scales the logits of counts in place
        for got, parameter in list(zip(parameters, want, strict=True))[: 1 if len(want) == 2 else 3]:
            close(got, parameter)
        if kind == "ForRegression":
            return
        mean = theirs.generate(x.detach(), given).sequences.mean(1).shape
        assert mean == ours.shape
        theirs_mean = theirs.distribution_output.distribution(
            tuple(p.clone() for p in parameters), loc=output.loc, scale=output.scale
        ).mean
        close(ours, theirs_mean)
        return
    close(ours, want)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, want)))
    exported = weights.export(model.state_dict(), "patchtsmixer")
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(exported[key], tensor) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("theirs", ["forecast", "some channels", "masked", "classes", "regression"], indirect=True)
def test_losses_are_those_of_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    model = mixzoo.load(tmp_path).eval()
    x = series()
    targets = {
        "forecast": torch.randn(4, 12, 3),
        "classification": torch.tensor([0, 4, 2, 2]),
        "regression": torch.randn(4, 2),
    }
    if model.task == "pretraining":
        close(model.loss(x), theirs(past_values=x).loss)
        return
    target = targets[model.task]
    name = "future_values" if model.task == "forecast" else "target_values"
    close(model.loss(x, target), theirs(past_values=x, **{name: target}).loss)


def test_a_bare_model_of_transformers_fills_the_encoder(tmp_path):
    transformers = pytest.importorskip("transformers")
    bare = transformers.PatchTSMixerModel(transformers.PatchTSMixerConfig(**SIZES, **COMMON)).eval()
    model = create()
    report = mixzoo.load_checkpoint(model, bare.state_dict())
    assert {key.split(".")[0] for key in report.fresh} == {"head"}
    close(model.forward_features(series()), bare(series()).last_hidden_state)


# checkpoints


def test_pretraining_starts_a_forecaster():
    pretrained, model = create(task="pretraining"), create()
    head = model.head.time.weight.clone()
    report = mixzoo.load_checkpoint(model, weights.export(pretrained.state_dict(), "patchtsmixer"))
    assert set(report.fresh) == {"head.time.weight", "head.time.bias"}
    assert set(report.ignored) == {"head.patch.weight", "head.patch.bias"}
    assert torch.equal(model.head.time.weight, head)
    close(model.forward_features(series()), pretrained.forward_features(series()))


def test_another_length_resizes_the_mixers():
    model = create(context_length=140)
    report = mixzoo.load_checkpoint(model, {k: t for k, t in create().state_dict().items() if "head" not in k})
    assert all("resized from grid 13 to 27" in note for note in report.adapted.values())
    assert model(series().repeat(1, 2, 1)).isfinite().all()


def test_what_is_no_folder_of_a_known_model_is_refused(tmp_path):
    with pytest.raises(weights.CheckpointError, match=r"config\.json"):
        mixzoo.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(weights.CheckpointError, match=r"'bert'.*patchtsmixer"):
        mixzoo.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "patchtsmixer", "seq_len": 512}')
    with pytest.raises(weights.CheckpointError, match=r"transformers 4\.36"):
        mixzoo.load(tmp_path)


# inputs


def test_common_channels_take_any_number_of_series():
    model, x = create(), series(channels=5)
    y = model(x)
    assert y.shape == (4, 12, 5)
    close(y[..., :3], model(x[..., :3]))
    with pytest.raises(ValueError, match=r"\(B, 70, 3\), got \(4, 70, 5\)"):
        create(mode="mix_channel")(x)


@pytest.mark.parametrize("scaling", ["std", "mean", None])
def test_scalers_leave_unobserved_values_out(scaling):
    x, mask = series(), observed()
    scaler = make_scaler(scaling)
    _, loc, scale = scaler(x, mask)
    _, *other = scaler(torch.where(mask > 0, x, 50.0), mask)
    close(loc, other[0])
    close(scale, other[1])
    filled = scaler(x, torch.zeros_like(x))
    assert all(part.isfinite().all() for part in filled)


def test_unused_inputs_are_refused():
    with pytest.raises(ValueError, match=r"no use for patch_mask; optional inputs: past_observed_mask"):
        create()(series(), patch_mask=torch.zeros(4, 3, 13))
    with pytest.raises(ValueError, match=r"past_values must be \(B, 70, C\), got \(4, 71, 3\)"):
        create()(torch.zeros(4, 71, 3))


# masks


def mask_of(**options) -> PatchMask:
    common = {"kind": "random", "ratio": 0.4, "counts": (2,), "consistent": True, "exempt": (), "value": 0.0}
    return PatchMask(3, 10, **common | options)


@pytest.mark.parametrize("consistent", [True, False])
def test_random_masks_hide_a_share(consistent):
    mask = mask_of(consistent=consistent, exempt=(1,)).train()(6, torch.zeros(1))
    assert (mask[:, [0, 2]].sum(-1) == 4).all()
    assert (mask[:, 1] == 0).all()
    assert torch.equal(mask[:, 0], mask[:, 2]) == consistent


def test_forecast_masks_hide_the_last_patches():
    mask = mask_of(kind="forecast", counts=(2, 3)).train()(6, torch.zeros(1))
    assert sorted(mask[:, 0].sum(-1).tolist()) == [2, 2, 2, 3, 3, 3]
    assert (mask[..., -2:] == 1).all()
    assert (mask[..., :-3] == 0).all()


def test_masks_of_evaluation_stay_the_same():
    mask = mask_of().eval()
    assert torch.equal(mask(2, torch.zeros(1)), mask(3, torch.zeros(1))[:2])
    model = create(task="pretraining", mask="random")
    assert torch.equal(model.loss(series()), model.loss(series()))


def test_hidden_patches_do_not_reach_the_output():
    model = create(task="pretraining", scaling=None, patch_stride=8)
    x, hidden = series(), torch.zeros(4, 3, 8)
    hidden[:, :, 3] = 1
    changed = x.clone()
    changed[:, 6 + 24 : 6 + 32] = 9
    close(model(x, patch_mask=hidden), model(changed, patch_mask=hidden))
    assert not torch.allclose(model(x), model(changed))


# heads


def test_injection_is_four_linear_layers():
    injection = ScaleInjection(6).double()
    h, loc, scale = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 5, 6), (2, 1, 3), (2, 1, 3)))
    s = injection.scale_outer(injection.scale_inner(torch.stack([loc, scale], -1)[:, 0]))
    s = s.unsqueeze(2).expand(-1, -1, 5, -1)
    want = injection.outer(injection.inner(torch.cat([h, s], -1)))
    torch.testing.assert_close(injection(h, loc, scale), want)


def test_cross_channel_head_sees_a_window():
    head = CrossChannelHead(3, 2).double()
    y = torch.randn(2, 7, 3, dtype=torch.float64)
    padded = nn.functional.pad(y, (0, 0, 2, 2))
    for t in range(7):
        window = padded[:, t : t + 5].transpose(1, 2).flatten(1)
        gated = window * head.gate.fc(window).softmax(-1)
        torch.testing.assert_close(head(y)[:, t], y[:, t] + head.fc(gated))


def test_reconciled_losses_train_their_heads():
    model = create(hierarchical=True, cross_channel=1).train()
    assert model(series()).shape == (4, 12, 3)
    model.loss(series(), torch.randn(4, 12, 3)).backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_reconciled_loss_is_zero_for_the_truth():
    model = create(hierarchical=True)
    with torch.no_grad():
        for head in (model.head, model.aggregate):
            head.time.weight.zero_()
            head.time.bias.zero_()
    flat = torch.full((4, 70, 3), 2.0)
    # 12 steps are a whole patch of 8 and a half: the sum of the second lacks four steps
    loss = model.loss(flat, torch.full((4, 12, 3), 2.0))
    torch.testing.assert_close(loss, torch.tensor(2 * 64 / 2 / 8))


@pytest.mark.parametrize("distribution", ["student_t", "normal", "negative_binomial"])
def test_distributions_have_the_mean_of_the_forecast(distribution):
    model = create(distribution=distribution, scaling="mean" if distribution == "negative_binomial" else "std")
    d = model.distribution(series().abs())
    assert d.sample().shape == (4, 12, 3)
    if distribution == "negative_binomial":
        close(model(series().abs()), d.mean)
    else:
        (affine,) = d.transforms
        close(model(series().abs()), d.base_dist.mean * affine.scale + affine.loc)
    model.loss(series().abs(), series()[:, :12].abs().round()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "translation"}, "task.*'translation'"),
        ({"mode": "flatten"}, "mode.*'flatten'"),
        ({"distribution": "cauchy"}, "distribution.*student_t.*'cauchy'"),
        ({"distribution": "normal", "task": "classification"}, "not for classification"),
        ({"output_channels": [2, 0]}, r"ascending.*\[2, 0\]"),
        ({"cross_channel": 1, "distribution": "normal"}, "cross_channel"),
        ({"context_length": 8}, "context_length must be more than patch_length=8"),
        ({"mask_patches": (13,), "mask": "forecast", "task": "pretraining"}, "mask_patches.*12"),
        ({"positions": "learned"}, "positions.*'learned'"),
        ({"scaling": "max"}, "scaling.*'max'"),
        ({"attn_heads": 5}, "attn_heads must divide the 12 channels"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_any_mixer_takes_the_place_of_the_patches():
    for mode in ("common_channel", "mix_channel"):
        for mixer in ("attention", "pooling", ["fourier", ("mlp", {"ratio": 2.0})]):
            assert create(mode=mode, token_mixer=mixer)(series()).shape == (4, 12, 3)
