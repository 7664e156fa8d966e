"""Models as ONNX graphs, checked with onnxruntime against what they compute here. Needs ``mixzoo[onnx]``.

    mixzoo onnx gfnet_ti --output gfnet_ti.onnx
    mixzoo onnx tuned.safetensors --output tuned.onnx --dynamic-batch
    mixzoo onnx "gfnet_*" "svt_*" affnet_et --format markdown

The first form writes a file; the last one tells for every model whether its graph runs and how far its outputs are from
the model's. The difference is the largest one of any output, over the largest value of that output. Graphs hold matrix
products where models have Fourier transforms, so that a runtime needs neither these nor complex numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

import mixzoo
from mixzoo.models import example_inputs
from mixzoo.scripts import _tables
from mixzoo.scripts._runs import write_atomically

# of the largest value; float32 in another order of additions stays below
TOLERANCE = 1e-3

COLUMNS = [
    _tables.Column("model", "model", left=True),
    _tables.Column("input", "input", left=True),
    _tables.Column("status", "status", left=True),
    _tables.Column("difference", "difference", "{:.0e}".format),
    _tables.Column("opset", "opset"),
    _tables.Column("nodes", "nodes"),
    _tables.Column("mb", "MB", "{:.1f}".format),
]


def _floats(output: Any) -> list[Tensor]:
    """Tensors of an output, in the order in which a graph returns them."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [tensor for value in values if value is not None for tensor in _floats(value)]


def write_graph(model: nn.Module, inputs: dict[str, Tensor], path: Path, dynamic_batch: bool = False) -> dict[str, Any]:
    """Write the graph of a model in eval mode; returns its ``opset``, ``nodes`` and ``mb``, weights included."""
    shapes = {name: {0: torch.export.Dim("batch")} for name in inputs} if dynamic_batch else None
    # the exporter tells of every step, on both streams and in its log
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, input_names=list(inputs), verbose=False
        )
    program.save(path, external_data=False)
    graph = program.model.graph
    return {"opset": graph.opset_imports[""], "nodes": graph.num_nodes(), "mb": path.stat().st_size / 1e6}


def difference(model: nn.Module, inputs: dict[str, Tensor], path: Path) -> float:
    """Largest difference of any output between model and graph, over the largest value of that output."""
    import onnxruntime

    with torch.no_grad():
        expected = _floats(model(**inputs))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    pairs = zip(expected, map(torch.from_numpy, found), strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def _model(source: str, img_size: list[int] | None) -> nn.Module:
    """A model by name or from a file of this library, in eval mode."""
    if source.endswith(".safetensors"):
        if img_size:
            raise ValueError("--img-size needs names: a file knows the size of its model")
        return mixzoo.load(source).eval()
    options = {"img_size": img_size[0] if len(img_size) == 1 else tuple(img_size)} if img_size else {}
    torch.manual_seed(0)
    return mixzoo.create_model(source, **options).eval()


def row(source: str, args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Write the graph of a model to ``path`` and check it; a failure is the row's status and leaves what was there."""
    model = _model(source, args.img_size)
    inputs = example_inputs(model, args.batch_size)
    row = {"model": source, "input": " ".join("x".join(map(str, x.shape)) for x in inputs.values())}

    def write(temporary: Path) -> None:
        row.update(write_graph(model, inputs, temporary, args.dynamic_batch))
        row["difference"] = difference(model, inputs, temporary)

    try:
        write_atomically(path, write)
    except Exception as error:
        # the exporter and the runtime have errors of their own, of any class
        return row | {"status": f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    return row | {"status": "ok" if row["difference"] <= TOLERANCE else f"differs by more than {TOLERANCE:g}"}


def build_parser() -> argparse.ArgumentParser:
    """Arguments of ``mixzoo onnx``."""
    head, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="mixzoo onnx", description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name, shell pattern, or file of this library")
    parser.add_argument("--output", type=Path, metavar="FILE.onnx", help="write the graph of one model there")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="PX", help="side, or height and width, in pixels")
    parser.add_argument("--batch-size", type=int, default=2, help="samples of the graph (default: %(default)s)")
    parser.add_argument("--dynamic-batch", action="store_true", help="a graph for any number of samples")
    parser.add_argument("--format", choices=_tables.FORMATS, default="text", help="of the table (default: %(default)s)")
    return parser


def _check(args: argparse.Namespace) -> list[str]:
    """Sources that the patterns stand for.

    Raises:
        ValueError: with one line for the user, before any work.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed; install mixzoo[onnx]")
    if args.img_size and len(args.img_size) > 2:
        raise ValueError(f"--img-size takes a side, or height and width, not {len(args.img_size)} numbers")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be positive, not {args.batch_size}")
    sources = []
    for model in args.models:
        found = [model] if model.endswith(".safetensors") else mixzoo.list_models(model)
        if not found:
            raise ValueError(f"no model is named {model!r}; mixzoo report lists them")
        sources += found
    if args.output is None:
        return sources
    if len(sources) > 1:
        raise ValueError(f"--output is for one model, not {len(sources)}")
    if args.output.suffix != ".onnx":
        raise ValueError(f"--output must end in .onnx, not {args.output.name!r}")
    if not args.output.parent.is_dir():
        raise ValueError(f"the folder {args.output.parent} does not exist")
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists; give --overwrite to replace it")
    return sources


def main(argv: list[str] | None = None) -> int:
    """``mixzoo onnx``; returns the exit status, 1 if a graph failed."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        sources = _check(args)
        bar = tqdm(sources, unit="model", file=sys.stderr, delay=2, leave=False, disable=None)
        with tempfile.TemporaryDirectory() as folder, bar:
            rows = [row(source, args, args.output or Path(folder) / "graph.onnx") for source in bar]
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    print(_tables.RENDER[args.format](COLUMNS, rows))
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
