"""TSM2 against its equations written out for one sample, one series and one patch at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mixzoo

SMALL = {
    "context_length": 29,
    "prediction_length": 7,
    "num_channels": 3,
    "patch_length": 6,
    "patch_stride": 4,
    "dim": 8,
}


def create(**options) -> nn.Module:
    torch.manual_seed(0)
    model = mixzoo.create_model("tsm2", **SMALL | options).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms and averages that do nothing would hide where they stand
            if "norm" in name or "averages" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(model: nn.Module, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, dtype=torch.float64, generator=generator)

    L, T, C = model.context_length, model.prediction_length, model.num_channels
    given = {"past_values": 5 + 3 * draw(L, C)}
    if model.num_static:
        given["static_features"] = draw(C, model.num_static)
    if model.num_future:
        given["future_time_features"] = draw(T, C, model.num_future)
    return given


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * norm.weight + norm.bias


def branch(module: nn.Module, x: Tensor, kind: str) -> Tensor:
    """x + mixer(norm(x)) of one sample ``(C, P, D)``."""
    z, mixer = normed(x, module.norm), module.op.mixer
    if kind == "token":
        return x + torch.stack([mixer(z[c][None])[0] for c in range(len(z))])
    return x + torch.stack([mixer(z[:, p][None])[0] for p in range(z.shape[1])], 1)


def plain(model: nn.Module, x: Tensor, static: Tensor | None, future: Tensor | None) -> Tensor:
    """Forecast ``(T, C)`` of one sample."""
    mean, std = x.mean(0), (x.var(0, correction=0) + 1e-5).sqrt()
    steps = [((x - mean) / std).t()]
    if future is not None:
        z = future.transpose(0, 1)
        for kind, module in model.future.block.branches:
            z = branch(module, z, kind)
        steps.append(torch.stack([model.future.proj(series.flatten()) for series in z]))
    if static is not None:
        steps.append(torch.stack([model.static(series) for series in static]))
    s, p = model.patch_stride, model.patch_length
    rows = []
    for series in torch.cat(steps, 1):
        series = torch.cat([series, series[-1:].expand(s)])
        rows.append(torch.stack([model.embedding(series[i : i + p]) for i in range(0, len(series) - p + 1, s)]))
    h = torch.stack(rows)
    tokens, channels, weights = [h], [h], iter(model.averages.weight.split(model.averages.sizes))
    for block in model.blocks:
        for kind, module in block.branches:
            combined = sum(w * y for w, y in zip(next(weights), tokens + channels, strict=True))
            (tokens if kind == "token" else channels).append(branch(module, combined, kind))
    h = normed(channels[-1], model.norm)
    return torch.stack([model.head.time(series.flatten()) for series in h], 1) * std + mean


@pytest.mark.parametrize("covariates", [{}, {"num_static": 2}, {"num_future": 3}, {"num_static": 2, "num_future": 3}])
def test_equals_its_equations(covariates):
    model = create(**covariates)
    given = inputs(model)
    expected = [
        plain(
            model,
            given["past_values"][i],
            given["static_features"][i] if model.num_static else None,
            given["future_time_features"][i] if model.num_future else None,
        )
        for i in range(2)
    ]
    assert (model(**given) - torch.stack(expected)).abs().max() < 1e-10


def test_published_size():
    # d = 32, 64 patches of 16 steps, horizon 96, two layers of two branches and 14 averages
    model = mixzoo.create_model("tsm2")
    assert sum(p.numel() for p in model.parameters()) == 244_814
    assert model.num_patches == 64
    assert model.averages.weight.numel() == 14


def test_begins_as_the_plain_chain():
    torch.manual_seed(0)
    averaged = mixzoo.create_model("tsm2", **SMALL).eval()
    chain = mixzoo.create_model("tsm2", **SMALL, weighted_average=False).eval()
    chain.load_state_dict({k: v for k, v in averaged.state_dict().items() if not k.startswith("averages")})
    x = torch.randn(2, 29, 3)
    torch.testing.assert_close(averaged(x), chain(x))


def test_future_features_of_all_series_are_those_of_each():
    model = create(num_future=3)
    given = inputs(model)
    common = given["future_time_features"][:, :, 0]
    each = common.unsqueeze(2).expand(-1, -1, 3, -1)
    past = given["past_values"]
    torch.testing.assert_close(
        model(past, future_time_features=common), model(past, future_time_features=each), rtol=0, atol=0
    )


def test_any_number_of_series():
    model = create()
    assert model(torch.randn(2, 29, 11, dtype=torch.float64)).shape == (2, 7, 11)
    fixed = create(series_mixer="spatial_fc")
    with pytest.raises(ValueError, match=r"\(B, 29, 3\)"):
        fixed(torch.randn(2, 29, 11, dtype=torch.float64))


def test_unknown_values_do_not_count():
    model = create()
    past = inputs(model)["past_values"]
    known = torch.ones_like(past)
    known[:, :5] = 0
    statistics = model.scaler(past, known)[1:]
    shifted = past.clone()
    shifted[:, :5] += 100
    for a, b in zip(statistics, model.scaler(shifted, known)[1:], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(model(past, torch.ones_like(past)), model(past))


@pytest.mark.parametrize(
    ("options", "changed", "named"),
    [
        ({"num_static": 2}, {"static_features": None}, "created with static_features"),
        ({"num_static": 2}, {"static_features": torch.zeros(2, 3, 5)}, r"static_features must be \(2, 3, 2\)"),
        ({"num_future": 2}, {"future_time_features": torch.zeros(2, 7, 9)}, r"must be \(2, 7, 2\) or \(2, 7, 3, 2\)"),
        ({}, {"static_features": torch.zeros(2, 3, 5)}, "no use for static_features"),
    ],
)
def test_wrong_inputs_are_named(options, changed, named):
    model = create(**options)
    with pytest.raises(ValueError, match=named):
        model(**inputs(model) | changed)


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match="patch_length=99"):
        mixzoo.create_model("tsm2", **SMALL | {"patch_length": 99})
    with pytest.raises(ValueError, match="depth"):
        mixzoo.create_model("tsm2", **SMALL, depth=0)


def test_saved_with_its_covariates(tmp_path):
    model = create(num_static=2, num_future=3).float()
    mixzoo.save(model, tmp_path / "m.safetensors")
    given = {name: x.float() for name, x in inputs(model).items()}
    torch.testing.assert_close(mixzoo.load(tmp_path / "m.safetensors").eval()(**given), model(**given))
