"""Releases: the table, and downloading with hash checks (no test reaches the network)."""

from __future__ import annotations

import hashlib
import re

import pytest
import timm
import torch

import mixzoo
from mixzoo import weights
from mixzoo.models._registry import RELEASES, Release
from mixzoo.weights import CheckpointError, _fetch

FAMILIES = ("poolformer", "metaformer", "identityformer", "randformer", "convformer", "caformer")
METAFORMERS = {name: release for name, release in RELEASES.items() if name.startswith(FAMILIES)}
SMALL = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)}


def tiny(name: str = "caformer_s18", **options) -> torch.nn.Module:
    return mixzoo.create_model(name, **SMALL | options)


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_release_is_complete():
    assert {name.split(".")[0] for name in RELEASES} <= set(mixzoo.list_models())
    for name, release in METAFORMERS.items():
        assert release.url.startswith("https://"), name
        assert release.licence, name
        assert release.interpolation == "bicubic", name
        assert not release.hf_hub_id or release.hf_hub_id == f"timm/{name}", name
        assert not release.sha256 or re.fullmatch(r"[0-9a-f]{64}", release.sha256), name


def test_releases_agree_with_timm():
    tagged = set(timm.list_models(include_tags=True))
    shared = [name for name, release in METAFORMERS.items() if name in tagged and release.hf_hub_id]
    assert len(shared) == 50
    for name in shared:
        release, cfg = RELEASES[name], timm.get_pretrained_cfg(name)
        assert (release.hf_hub_id, release.input_size, release.crop_pct) == (
            cfg.hf_hub_id,
            cfg.input_size,
            cfg.crop_pct,
        )
        assert (release.num_classes, release.mean, release.std) == (cfg.num_classes, cfg.mean, cfg.std)
        assert (release.interpolation, release.licence) == (cfg.interpolation, cfg.license)


@pytest.mark.parametrize(
    ("name", "full", "file"),
    [
        ("caformer_s18", "caformer_s18.sail_in1k", "caformer/caformer_s18.pth"),
        ("caformer_s18_384", "caformer_s18.sail_in1k_384", "caformer/caformer_s18_384.pth"),
        ("caformer_m36_in21k", "caformer_m36.sail_in22k", "caformer/caformer_m36_in21k.pth"),
        ("convformer_b36_384_in21ft1k", "convformer_b36.sail_in22k_ft_in1k_384", "convformer_b36_384_in21ft1k.pth"),
        ("poolformer_m48.sail_in1k", "poolformer_m48.sail_in1k", "poolformer_m48.pth.tar"),
    ],
)
def test_names_of_releases(name, full, file):
    found, release = weights.find_release(name)
    assert found == full
    assert release.url.endswith(file)


@pytest.fixture
def hosted(tmp_path, monkeypatch):
    """A release of a shallow CAFormer, and the hosts that are down."""
    source = randomised(tiny())
    path = tmp_path / "hosted.pth"
    torch.save(weights.export(source.state_dict(), "sail"), path)
    release = Release(url="https://example.com/hosted.pth", hf_hub_id="timm/hosted", licence="mit")
    monkeypatch.setitem(RELEASES, "caformer_s18.hosted", release)
    down = set()

    def get(place):
        def download(_):
            if place in down:
                raise ConnectionError(f"{place} is down\nsecond line")
            return path

        return download

    monkeypatch.setattr(_fetch, "_from_hub", get("hub"))
    monkeypatch.setattr(_fetch, "_from_url", get("url"))
    return source, path, down


def test_a_release_is_downloaded_and_loaded(hosted):
    source, path, down = hosted
    for _ in range(2):
        model = tiny()
        report = weights.load_pretrained(model, "caformer_s18.hosted")
        assert report.layout == "sail"
        assert equal(model.state_dict(), source.state_dict())
        assert model.config["weights"]["source"] == "caformer_s18.hosted"
        assert model.config["weights"]["licence"] == "mit"
        down.add("hub")
    assert weights.fetch("caformer_s18.hosted") == path


def test_pretrained_through_create_model(hosted):
    source, _, _ = hosted
    model = mixzoo.create_model("caformer_s18.hosted", pretrained=True, num_classes=5, **SMALL)
    assert torch.equal(model.stem.conv.weight, source.stem.conv.weight)


def test_unreachable_hosts_are_all_named(hosted):
    _, _, down = hosted
    down |= {"hub", "url"}
    with pytest.raises(CheckpointError, match=r"could not download caformer_s18\.hosted") as caught:
        mixzoo.load_checkpoint(tiny(), "caformer_s18.hosted")
    message = str(caught.value)
    assert "https://huggingface.co/timm/hosted: ConnectionError: hub is down;" in message
    assert "by hand from https://example.com/hosted.pth" in message
    assert "second line" not in message


def test_a_wrong_hash_is_refused(hosted, monkeypatch):
    _, path, _ = hosted
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    for digest in (right, "0" * 64):
        release = Release(url="https://example.com/hosted.pth", sha256=digest)
        monkeypatch.setitem(RELEASES, "caformer_s18.hosted", release)
        if digest == right:
            assert weights.fetch("caformer_s18.hosted") == path
        else:
            with pytest.raises(CheckpointError, match="its SHA-256 is not 000"):
                weights.fetch("caformer_s18.hosted")


def test_the_hash_that_the_hub_stores_is_checked(hosted, tmp_path, monkeypatch):
    """The Hub's cache links a file to one that is named by its SHA-256."""
    _, path, _ = hosted
    blob, link = tmp_path / hashlib.sha256(path.read_bytes()).hexdigest(), tmp_path / "model.pth"
    blob.write_bytes(path.read_bytes())
    link.symlink_to(blob)
    monkeypatch.setattr(_fetch, "_from_hub", lambda _: link)
    model = tiny()
    weights.load_pretrained(model, "caformer_s18.hosted")
    assert model.config["weights"]["sha256"] == blob.name
    blob.write_bytes(b"changed")
    with pytest.raises(CheckpointError, match="its SHA-256 is not"):
        weights.fetch("caformer_s18.hosted")


def test_a_model_without_release_says_so():
    with pytest.raises(ValueError, match="no weights were released for 'metaformer_s24'"):
        weights.find_release("metaformer_s24")
    with pytest.raises(ValueError, match=r"no release named 'caformer_s18\.nope'"):
        weights.find_release("caformer_s18.nope")
