"""TimeMixer against a plain transcription of its equations: every task and option, values and gradients in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixzoo
from mixzoo import weights
from mixzoo.mixers import _decomposition
from mixzoo.mixers._decomposition import moving_average, strongest_frequencies
from mixzoo.models.timemixer import FREQUENCIES

KERNEL = 5
SIZES = {"context_length": 50, "prediction_length": 9, "num_channels": 3, "dim": 8, "hidden": 12, "kernel": KERNEL}


def plain_average(x: Tensor, kernel: int = KERNEL) -> Tensor:
    """Trend of ``(B, L, C)``: ends repeated, then pooled."""
    k = (kernel - 1) // 2
    padded = torch.cat([x[:, :1].repeat(1, k, 1), x, x[:, -1:].repeat(1, k, 1)], 1)
    return F.avg_pool1d(padded.transpose(1, 2), kernel, 1).transpose(1, 2)


def plain_dft(x: Tensor, top_k: int) -> Tensor:
    """Season of ``(B, L, C)``, one series after the other."""
    rows = []
    for row in x.transpose(1, 2).flatten(0, 1):
        bins = torch.fft.rfft(row)
        keep = torch.zeros_like(bins.real)
        keep[bins.abs()[1:].topk(top_k).indices + 1] = 1
        rows.append(torch.fft.irfft(bins * keep, n=len(row)))
    return torch.stack(rows).reshape(len(x), x.shape[2], -1).transpose(1, 2)


class Plain:
    """The forward pass in the order of the authors' equations, from weights under the authors' keys."""

    def __init__(self, model: nn.Module, split):
        self.p = weights.export(model.state_dict(), "timemixer")
        self.model, self.split, self.levels = model, split, len(model.lengths) - 1

    def linear(self, key: str, x: Tensor) -> Tensor:
        return F.linear(x, self.p[f"{key}.weight"], self.p[f"{key}.bias"])

    def mlp(self, key: str, x: Tensor) -> Tensor:
        return self.linear(f"{key}.2", F.gelu(self.linear(f"{key}.0", x)))

    def block(self, e: int, maps: list[Tensor]) -> list[Tensor]:
        key, M, mixed = f"pdm_blocks.{e}", self.levels, self.model.mixed
        parts = [self.split(h) for h in maps]
        if mixed:
            parts = [tuple(self.mlp(f"{key}.cross_layer", part) for part in pair) for pair in parts]
        S, T = [s for s, _ in parts], [t for _, t in parts]
        down, up = f"{key}.mixing_multi_scale_season.down_sampling_layers", f"{key}.mixing_multi_scale_trend"
        for i in range(M):
            S[i + 1] = S[i + 1] + self.mlp(f"{down}.{i}", S[i].transpose(1, 2)).transpose(1, 2)
        for i in reversed(range(M)):
            coarse = T[i + 1].transpose(1, 2)
            T[i] = T[i] + self.mlp(f"{up}.up_sampling_layers.{M - 1 - i}", coarse).transpose(1, 2)
        if mixed:
            return [s + t for s, t in zip(S, T, strict=True)]
        return [h + self.mlp(f"{key}.out_cross_layer", s + t) for h, s, t in zip(maps, S, T, strict=True)]

    def temporal(self, marks: Tensor) -> Tensor:
        key = "enc_embedding.temporal_embedding"
        if f"{key}.embed.weight" in self.p:
            return F.linear(marks, self.p[f"{key}.embed.weight"])
        fields = [("month", 0), ("day", 1), ("weekday", 2), ("hour", 3), ("minute", 4)]
        tables = [
            (self.p.get(f"{key}.{f}_embed.weight"), self.p.get(f"{key}.{f}_embed.emb.weight"), i) for f, i in fields
        ]
        return sum(
            (a if b is None else b)[marks[..., i].long()] for a, b, i in tables if a is not None or b is not None
        )

    def embed(self, x: Tensor, marks: Tensor | None) -> Tensor:
        conv = self.p["enc_embedding.value_embedding.tokenConv.weight"]
        e = F.conv1d(F.pad(x.transpose(1, 2), (1, 1), mode="circular"), conv).transpose(1, 2)
        return e if marks is None else e + self.temporal(marks)

    def scales(self, x: Tensor) -> list[Tensor]:
        pool = F.avg_pool1d if self.model.downsample == "avg" else F.max_pool1d
        found = [x]
        for _ in range(self.levels):
            found.append(pool(found[-1].transpose(1, 2), self.model.window).transpose(1, 2))
        return found

    def mixed_maps(self, scales: list[Tensor], marks: Tensor | None = None) -> list[Tensor]:
        maps = []
        for x in scales:
            rows = x if self.model.mixed else x.transpose(1, 2).reshape(-1, x.shape[1], 1)
            given = marks
            if marks is not None:
                given = marks[:, : x.shape[1]]
                given = given if self.model.mixed else given.repeat_interleave(x.shape[2], 0)
                marks = marks[:, :: self.model.window]
            maps.append(self.embed(rows, given))
        for e in range(len(self.model.blocks)):
            maps = self.block(e, maps)
        return maps

    def norm(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.mean(1, keepdim=True).detach()
        std = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt().detach()
        key = f"normalize_layers.{i}.affine"
        return (x - mean) / std * self.p[f"{key}_weight"] + self.p[f"{key}_bias"], mean, std

    def denorm(self, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        key = "normalize_layers.0.affine"
        return (y - self.p[f"{key}_bias"]) / (self.p[f"{key}_weight"] + 1e-10) * std + mean

    def forecast(self, x: Tensor, marks: Tensor | None = None, future: Tensor | None = None) -> Tensor:
        B, C, H = len(x), x.shape[2], self.model.prediction_length
        scales, statistics = self.scales(x), None
        if self.model.norms:
            normed = [self.norm(i, z) for i, z in enumerate(scales)]
            scales, statistics = [z for z, _, _ in normed], normed[0][1:]
        parts = [self.split(z) for z in scales]
        maps = self.mixed_maps([s for s, _ in parts] if self.model.mixed else scales, marks)
        total = 0
        for i, h in enumerate(maps):
            y = self.linear(f"predict_layers.{i}", h.transpose(1, 2)).transpose(1, 2)
            if future is not None:
                y = y + self.temporal(future).repeat_interleave(C, 0)
            y = self.linear("projection_layer", y)
            if self.model.mixed:
                bypass = self.linear(f"out_res_layers.{i}", parts[i][1].transpose(1, 2))
                y = y + self.linear(f"regression_layers.{i}", bypass).transpose(1, 2)
            else:
                y = y.reshape(B, C, H).transpose(1, 2)
            total = total + y
        return total if statistics is None else self.denorm(total, *statistics)

    def read(self, h: Tensor, batch: int) -> Tensor:
        y = self.linear("projection_layer", h)
        if self.model.mixed and not self.model.legacy:
            return y
        return y.reshape(batch, self.model.num_channels, -1).transpose(1, 2)

    def anomaly(self, x: Tensor) -> Tensor:
        normed = [self.norm(i, z) for i, z in enumerate(self.scales(x))]
        return self.denorm(self.read(self.mixed_maps([z for z, _, _ in normed])[0], len(x)), *normed[0][1:])

    def imputation(self, x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum(1, keepdim=True)
        x = x.masked_fill(mask == 0, 0)
        mean = (x.sum(1, keepdim=True) / count).detach()
        z = (x - mean).masked_fill(mask == 0, 0)
        std = ((z * z).sum(1, keepdim=True) / count + 1e-5).sqrt().detach()
        return self.read(self.mixed_maps(self.scales(z / std))[0], len(x)) * std + mean

    def classification(self, x: Tensor, mask: Tensor) -> Tensor:
        h = F.gelu(self.mixed_maps(self.scales(x))[0]) * mask.unsqueeze(-1)
        return self.linear("projection", h.flatten(1))


def create(**options) -> nn.Module:
    model = mixzoo.create_model("timemixer", **SIZES | options).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            p.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else p + 0.2 * noise)
    return model.eval()


def series(length: int = 50, channels: int = 3) -> Tensor:
    noise = torch.randn(4, length, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return noise.cumsum(1).requires_grad_()


def random_marks(model: nn.Module, length: int, embed: str = "timeF") -> Tensor:
    marks = torch.rand(4, length, model.num_marks, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return marks if embed == "timeF" else (4 * marks).floor()


def assert_same(ours: Tensor, plain: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(ours, plain)
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, plain)]
    torch.testing.assert_close(*gradients)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    trend = plain_average(x)
    return x - trend, trend


FORECASTS = {
    "plain": {},
    "no marks": {"embed": None},
    "no norm": {"use_norm": False},
    "maximum": {"downsample": "max", "levels": 2, "window": 3},
    "one scale": {"levels": 0},
    "minutes": {"freq": "t"},
    "fixed": {"embed": "fixed"},
    "learned with minutes": {"embed": "learned", "freq": "t"},
    "future": {"future_marks": True},
    "mixed": {"channel_independence": False, "use_norm": False, "embed": None},
    "mixed with marks and norm": {"channel_independence": False},
    "mixed and narrow": {"channel_independence": False, "num_channels": 11, "embed": None},
}


@pytest.mark.parametrize("name", FORECASTS)
@pytest.mark.parametrize("pooled", [False, True])
def test_forecasts(name, pooled, monkeypatch):
    if pooled:
        # long series are pooled, shorter ones go through a matrix
        monkeypatch.setattr(_decomposition, "MATRIX_LENGTH", 0)
    options = FORECASTS[name]
    model, x = create(**options), series(channels=options.get("num_channels", 3))
    embed = options.get("embed", "timeF")
    marks = {} if embed is None else {"past_time_features": random_marks(model, 50, embed)}
    if options.get("future_marks"):
        marks["future_time_features"] = random_marks(model, 9)
    assert_same(model(x, **marks), Plain(model, split).forecast(x, *marks.values()), x)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_series_are_restored(mixed, legacy):
    options = {"channel_independence": not mixed, "legacy": legacy}
    x = series()
    model = create(task="anomaly", **options)
    assert_same(model(x), Plain(model, split).anomaly(x), x)
    model = create(task="imputation", **options)
    mask = (torch.rand(4, 50, 3, generator=torch.Generator().manual_seed(4)) > 0.3).double()
    assert_same(model(x, past_observed_mask=mask), Plain(model, split).imputation(x, mask), x)
    # what stands where nothing was observed does not matter
    other = torch.where(mask > 0, x, float("nan"))
    assert torch.equal(model(other, past_observed_mask=mask), model(x, past_observed_mask=mask))


def test_series_are_classified():
    model, x = create(task="classification", channel_independence=False, num_classes=4), series()
    mask = torch.arange(50) < torch.tensor([[50], [30], [7], [1]])
    assert_same(model(x, past_observed_mask=mask), Plain(model, split).classification(x, mask), x)
    model.reset_classifier(7)
    assert model(x).shape == (4, 7)
    with pytest.raises(ValueError, match="no classifier"):
        create().reset_classifier(7)


def test_frequencies_split_every_series_by_itself():
    def by_frequency(x: Tensor) -> tuple[Tensor, Tensor]:
        season = plain_dft(x, 3)
        return season, x - season

    model, x = create(decomposition="dft", top_k=3, embed=None), series()
    with torch.no_grad():
        torch.testing.assert_close(model(x), Plain(model, by_frequency).forecast(x))
        torch.testing.assert_close(model(x), torch.cat([model(row) for row in x.split(1)]))


@pytest.mark.parametrize("length", [3, 25, 300])
@pytest.mark.parametrize("kernel", [1, 5, 25])
def test_either_form_of_the_moving_average(length, kernel):
    x = torch.randn(length, 2, 3, dtype=torch.float64, requires_grad=True)
    want = plain_average(x.transpose(0, 1), kernel).transpose(0, 1)
    assert_same(moving_average(x, kernel), want, x)


def test_strongest_frequencies_leave_the_mean_out():
    t = torch.arange(64, dtype=torch.float64).unsqueeze(1)
    wave, small = torch.sin(2 * torch.pi * 5 * t / 64), 0.1 * torch.cos(2 * torch.pi * 9 * t / 64)
    torch.testing.assert_close(strongest_frequencies(7 + wave + small, 1), wave)
    assert strongest_frequencies((7 + wave).bfloat16(), 1).dtype == torch.bfloat16


def test_a_learned_convolution_makes_scales_too():
    model = create(downsample="conv", embed=None)
    x = series()
    torch.autograd.grad(model(x).sum(), [*model.pool.parameters(), x])
    exported = mixzoo.create_model("timemixer", **SIZES, downsample="conv", embed=None)
    report = mixzoo.load_checkpoint(exported, model.state_dict())
    assert not report.fresh


@pytest.mark.parametrize("freq", FREQUENCIES)
def test_marks_of_every_frequency(freq):
    model = create(freq=freq)
    assert model.num_marks == FREQUENCIES[freq]
    assert model(series(), past_time_features=random_marks(model, 50)).shape == (4, 9, 3)


def test_any_mixer_takes_the_place_of_decomposable_mixing():
    for mixer in ("attention", "pooling", ["fourier", "decomposable_mixing"]):
        model = create(token_mixer=mixer, embed=None)
        assert model(series()).shape == (4, 9, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "regression"}, "task.*'regression'"),
        ({"downsample": None}, "downsample.*None"),
        ({"kernel": 4}, "kernel must be odd.*4"),
        ({"decomposition": "wavelet"}, "decomposition.*'wavelet'"),
        ({"freq": "y"}, "freq.*'y'"),
        ({"embed": "none"}, "embed.*'none'"),
        ({"levels": 6}, r"50 steps cannot be divided by 2 6 times.*at least 64"),
        ({"window": 1}, "window must be at least 2"),
        ({"task": "classification"}, "channel_independence=False"),
        ({"future_marks": True, "embed": None}, "future_marks"),
        ({"prediction_length": 0}, "prediction_length.*0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_inputs_without_use_or_of_another_length_are_refused():
    model = create(embed=None)
    with pytest.raises(ValueError, match=r"no use for past_time_features; optional inputs: none"):
        model(series(), past_time_features=torch.zeros(4, 50, 4))
    with pytest.raises(ValueError, match=r"past_time_features must be \(4, 50, \.\.\.\), got \(4, 49, 4\)"):
        create()(series(), past_time_features=torch.zeros(4, 49, 4))
    with pytest.raises(ValueError, match=r"past_values must be \(B, 50, 3\), got \(4, 51, 3\)"):
        model(torch.zeros(4, 51, 3))
