"""Run timm's own public test-suite on the models of the zoo.

    mixzoo timm-suite --models "*_s12" "*_s18"
    mixzoo timm-suite --tests timm-1.0.31/tests -- -m cfg -x

The tests are in timm's source distribution, not in its wheel: without --tests, pip fetches the one of the installed
version into a cache. Everything after `--` goes to pytest. All models take about an hour on two cores; `-m cfg`
checks every model and release on the meta device within minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm

PLUGIN = "mixzoo.scripts._timm_suite_plugin"
# shell patterns of the models to test, separated by commas
MODELS_VARIABLE = "MIXZOO_TIMM_SUITE_MODELS"


@dataclass(frozen=True)
class Exclusion:
    """A test that is skipped on some models; shell patterns over the test's name and over our model names."""

    test: str
    models: str
    reason: str


_SCRIPT = "TorchScript is deprecated; torch.compile and torch.export are tested instead"
EXCLUSIONS = (
    Exclusion("test_model_forward_torchscript", "*", _SCRIPT),
    Exclusion("test_model_forward_fx_torchscript", "*", _SCRIPT),
    Exclusion("test_model_load_pretrained", "*", "downloads every released checkpoint"),
    Exclusion("test_model_features_pretrained", "*", "downloads every released checkpoint"),
)


def cache_folder() -> Path:
    """Where fetched suites are kept: ``$XDG_CACHE_HOME/mixzoo``, by default ``~/.cache/mixzoo``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixzoo"


def fetch_tests() -> Path:
    """The folder of the installed timm version's tests, fetched by pip if it is not in the cache.

    Raises:
        RuntimeError: pip could not fetch the source distribution.
    """
    tests = cache_folder() / f"timm-{timm.__version__}-tests"
    if tests.is_dir():
        return tests
    requirement = f"timm=={timm.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("timm-*.tar.gz"))
        if done.returncode != 0 or not archives:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RuntimeError(f"pip could not download the source of {requirement} ({reason}); give --tests DIR")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
        tests.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(next(Path(folder).glob("timm-*/tests")), tests)
    return tests


def run_suite(tests: Path, models: Sequence[str] = ("*",), pytest_args: Sequence[str] = ()) -> int:
    """Run timm's model tests on our models of the given patterns; returns pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        # run beside the unpacked source, pytest would import timm from there instead of the installed one
        suite = Path(folder) / "suite"
        shutil.copytree(tests, suite / "tests")
        command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-c", os.devnull, "--rootdir", str(suite)]
        command += ["-p", "no:cacheprovider", "-q", "-rfEs", *pytest_args, str(suite / "tests" / "test_models.py")]
        environment = {**os.environ, MODELS_VARIABLE: ",".join(models), "PYTHONSAFEPATH": "1"}
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def build_parser() -> argparse.ArgumentParser:
    """Arguments of ``mixzoo timm-suite``."""
    exclusions = "\n".join(f"  {e.test} on {e.models}: {e.reason}" for e in EXCLUSIONS)
    parser = argparse.ArgumentParser(
        prog="mixzoo timm-suite",
        usage="%(prog)s [--tests DIR] [--models PATTERN ...] [-- PYTEST_ARGUMENT ...]",
        description=__doc__,
        epilog=f"exclusions:\n{exclusions}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tests", type=Path, metavar="DIR", help="the folder `tests` of timm's source distribution")
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help="our models (default: all)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    import mixzoo

    unknown = [pattern for pattern in args.models if not mixzoo.list_models(pattern, modality="image")]
    if unknown:
        parser.error(f"no image model of the zoo fits {unknown[0]!r}; see mixzoo report --help")
    if args.tests is not None and not (args.tests / "test_models.py").is_file():
        parser.error(f"--tests {args.tests}: there is no test_models.py; give the folder `tests` of timm's source")
    try:
        tests = args.tests or fetch_tests()
    except RuntimeError as error:
        parser.error(str(error))
    return run_suite(tests, args.models, argv[split + 1 :])
