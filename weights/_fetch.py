"""Find a release by name and download its file, checked against its hash where one is known."""

from __future__ import annotations

import re
from pathlib import Path

from ..models._registry import RELEASES, Release, resolve_name
from ._files import HUB_FILES, CheckpointError, sha256

_HUB_URL = re.compile(r"https://huggingface\.co/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


def find_release(name: str) -> tuple[str, Release]:
    """The release called ``arch.tag``, by an alias, or an architecture's first one.

    Raises:
        ValueError: there is none; the message names close ones.
    """
    spec, full = resolve_name(name)
    if full is None:
        raise ValueError(f"no weights were released for {spec.name!r}; mixzoo.list_models(pretrained=True) lists all")
    return full, RELEASES[full]


def fetch(name: str) -> Path:
    """Download a release into the cache of huggingface_hub or torch.hub, or find it there.

    Raises:
        ValueError: no such release.
        CheckpointError: no source could be reached, or a file has another hash than it should.
    """
    full, release = find_release(name)
    attempts = []
    if release.hf_hub_id:
        attempts.append((f"https://huggingface.co/{release.hf_hub_id}", lambda: _from_hub(release.hf_hub_id)))
    if release.url:
        attempts.append((release.url, lambda: _from_url(release.url)))
    failures = []
    for place, download in attempts:
        try:
            path = download()
        except Exception as error:
            # every network, proxy, disk and authorisation error ends here, and the next place is tried
            failures.append(f"{place}: {_first_line(error)}")
            continue
        _verify(path, release, full)
        return path
    tried = "; ".join(failures) or f"the release has no address; {release.note}".rstrip("; ")
    raise CheckpointError(
        f"could not download {full} ({tried}). Download it by hand"
        f"{' from ' + release.url if release.url else ''} and give the path of the file instead"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def _from_hub(repo: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    for file in HUB_FILES:
        try:
            return Path(hf_hub_download(repo, file))
        except LocalEntryNotFoundError:
            # the Hub did not answer, so nothing is known of the other file either
            raise
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"{repo} has neither {' nor '.join(HUB_FILES)}")


def _from_url(url: str) -> Path:
    hub = _HUB_URL.fullmatch(url)
    if hub:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(hub["repo"], hub["file"], revision=hub["revision"]))
    from timm.models._hub import download_cached_file

    folder, file = url.rsplit("/", 2)[1:]
    # the cache goes by the last part of the address, which some publishers give to several files
    shared = any(r.url != url and r.url.endswith(f"/{file}") for r in RELEASES.values())
    return Path(download_cached_file((url, f"{folder}-{file}") if shared else url, progress=True))


def known_hash(path: Path, release: Release) -> str:
    """The SHA-256 that a release's file must have; the Hub's cache names large files by theirs. Empty if unknown."""
    stored = path.resolve().name
    return release.sha256 or (stored if re.fullmatch(r"[0-9a-f]{64}", stored) else "")


def _verify(path: Path, release: Release, name: str) -> None:
    expected = known_hash(path, release)
    if expected and sha256(path) != expected:
        raise CheckpointError(
            f"{path}: downloaded for {name} but its SHA-256 is not {expected}; delete the file and try again"
        )
