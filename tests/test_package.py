"""The package as it is laid out, built and imported."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
FOLDERS = ("mixers", "models", "weights", "scripts")
# what each layer may import: dependencies point one way
BELOW = {
    "mixers": (),
    "models": ("mixers",),
    "weights": ("models", "mixers"),
    "scripts": ("weights", "models", "mixers"),
}
# create_model reaches upwards in one place, late
LATE = {("models/timm_bridge.py", "weights")}


def _imports(path: Path) -> set[str]:
    """Sub-packages of mixzoo that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            found.add((node.module or node.names[0].name).partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("mixzoo."):
            found.add(node.module.split(".")[1])
    return found & set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_dependencies_point_one_way(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        allowed = {*BELOW[folder], folder}
        upwards = {(f"{folder}/{path.name}", name) for name in _imports(path) - allowed}
        assert upwards <= LATE


@pytest.mark.parametrize("folder", ["mixers", "models", "weights"])
def test_the_init_imports_every_public_file(folder: str) -> None:
    init = (ROOT / folder / "__init__.py").read_text(encoding="utf-8")
    missing = [
        path.stem
        for path in (ROOT / folder).glob("[!_]*.py")
        if not re.search(rf"^from \.(?:{path.stem} import|\s*import .*\b{path.stem}\b)", init, re.MULTILINE)
        and not re.search(rf"^from \. import \(?[^)]*\b{path.stem}\b", init, re.MULTILINE)
    ]
    # the bridge is called by the root once the releases are known
    assert missing in ([], ["timm_bridge"])


def test_the_package_list_matches_the_folders() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    assert sorted(packages) == sorted(["mixzoo", *(f"mixzoo.{folder}" for folder in folders)])


def _python(code: str, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run([*command, str(folder / "source")], check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert {n.split("/")[0] for n in names} == {"mixzoo"}
    assert not [n for n in names if "test" in n]
    assert {f"mixzoo/{folder}/__init__.py" for folder in FOLDERS} <= set(names)


def test_the_wheel_imports_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import mixzoo; print(mixzoo.__file__); print(len(mixzoo.list_models()))"
    file, models = _python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert Path(file).is_relative_to(tmp_path)
    assert int(models) > 40


def test_import_is_lean(tmp_path: Path) -> None:
    heavy = ["fvcore", "accelerate", "sklearn", "matplotlib", "pandas", "tqdm.gui", "transformers"]
    code = f"import json, sys, timm; before = set(sys.modules); import mixzoo; print(json.dumps([m for m in {heavy} "
    loaded = json.loads(_python(code + "if m in set(sys.modules) - before]))", tmp_path))
    assert loaded == []


def test_timm_keeps_its_own_entries() -> None:
    import timm

    import mixzoo

    for name in mixzoo.list_models(modality="image"):
        if name in timm.list_models() and timm.is_model(f"mixzoo_{name}"):
            assert "timm.models" in timm.model_entrypoint(name).__module__
    assert type(timm.create_model("mixzoo_poolformer_s12", depths=(1, 1, 1, 1))) is mixzoo.MetaFormer
    assert type(timm.create_model("identityformer_s12", depths=(1, 1, 1, 1))) is mixzoo.MetaFormer
