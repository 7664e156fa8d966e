"""Convert checkpoints: any layout the library knows to its own safetensors files, and back to the authors' layouts.

mixzoo convert caformer_s18.pth caformer_s18.safetensors --model caformer_s18
mixzoo convert mine.safetensors mine.pth --to sail

The first form stores the model's description with the weights, so that `mixzoo.load` rebuilds it from the file alone.
Classes and input channels are those of the source unless others are asked for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn as nn

import mixzoo
from mixzoo import weights
from mixzoo.weights._files import FORMAT, read, sha256
from mixzoo.weights._load import source_options
from mixzoo.weights._save import write_bytes, write_safetensors

_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")


def build_parser() -> argparse.ArgumentParser:
    """Arguments of ``mixzoo convert``."""
    head, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="mixzoo convert", description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", help="a file, or the name of a release (downloaded)")
    parser.add_argument("out", nargs="?", type=Path, help="file to write: .safetensors, or with --to also .pth")
    parser.add_argument("--model", help="model the weights belong to; a file of this library knows it")
    parser.add_argument("--num-classes", type=int, help="classes of the head (default: the source's)")
    parser.add_argument("--in-chans", type=int, help="input channels (default: the source's)")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="PX", help="side, or height and width, in pixels")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="names of the classes, one a line")
    parser.add_argument(
        "--reparameterize", action="store_true", help="fold branches and batch norms; with --to branches alone"
    )
    parser.add_argument("--to", metavar="LAYOUT", help="write another layout, without description; see --list-layouts")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--list-layouts", action="store_true", help="show the known layouts and exit")
    return parser


def _list_layouts() -> None:
    for layout in weights.LAYOUTS:
        if not layout.bridge:
            print(f"{layout.name:<12} {layout.title}")


def _check(args: argparse.Namespace) -> None:
    """Everything that can be wrong with the arguments, before any work.

    Raises:
        ValueError: with one line for the user.
    """
    if args.source is None or args.out is None:
        raise ValueError("give SOURCE and OUT, or --list-layouts")
    allowed = (".safetensors", *_TORCH_SUFFIXES) if args.to else (".safetensors",)
    if args.out.suffix not in allowed:
        raise ValueError(f"OUT must end in {' or '.join(allowed)}, not {args.out.name!r}")
    known = sorted({layout.name for layout in weights.LAYOUTS if not layout.bridge})
    if args.to and args.to not in known:
        raise ValueError(f"--to must be one of {', '.join(known)}, not {args.to!r}")
    if args.img_size and len(args.img_size) > 2:
        raise ValueError(f"--img-size takes a side, or height and width, not {len(args.img_size)} numbers")
    if not args.out.parent.is_dir():
        raise ValueError(f"the folder {args.out.parent} does not exist")
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} exists; give --overwrite to replace it")


def _model(args: argparse.Namespace) -> nn.Module:
    """The model with the source's weights in it; prints what became of every tensor."""
    options = {"num_classes": args.num_classes, "in_chans": args.in_chans}
    if args.img_size:
        options["img_size"] = args.img_size[0] if len(args.img_size) == 1 else tuple(args.img_size)
    given = {key: value for key, value in options.items() if value is not None}
    if args.model is None:
        if not Path(args.source).is_file() or read(args.source).metadata.get("format") != FORMAT:
            raise ValueError(f"{args.source} does not say which model it belongs to; give --model")
        if given or args.class_names:
            raise ValueError("--num-classes, --in-chans, --img-size and --class-names need --model")
        return mixzoo.load(args.source)
    model = mixzoo.create_model(args.model, **{**source_options(args.model, args.source), **given})
    report = mixzoo.load_checkpoint(model, args.source)
    print(report)
    return model


def _class_names(path: Path, num_classes: int) -> list[str]:
    names = path.read_text(encoding="utf-8").splitlines()
    if len(names) != num_classes:
        raise ValueError(f"{path} has {len(names)} lines for {num_classes} classes")
    return names


def convert(args: argparse.Namespace) -> None:
    """Read, fit, and write the file at once.

    Raises:
        ValueError, OSError: with one message for the user; nothing is written.
    """
    _check(args)
    model = _model(args)
    if args.class_names:
        model.class_names = _class_names(args.class_names, model.num_classes)
    if args.reparameterize:
        mixzoo.reparameterize(model, inplace=True, norms=not args.to)
    if args.to:
        state = weights.export(model.state_dict(), args.to)
        if args.out.suffix == ".safetensors":
            write_safetensors(state, args.out, {"format": "pt"})
        else:
            write_bytes(args.out, lambda file: torch.save(state, file))
    else:
        if Path(args.source).is_file():
            model.config.setdefault("weights", {}).setdefault("sha256", sha256(args.source))
        mixzoo.save(model, args.out)
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.1f} MB, sha256 {sha256(args.out)}")


def main(argv: list[str] | None = None) -> int:
    """``mixzoo convert``; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.list_layouts:
        _list_layouts()
        return 0
    try:
        convert(args)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
