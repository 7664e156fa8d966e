"""The command ``mixzoo``: one sub-command for every script.

mixzoo report "poolformer*"
mixzoo finetune poolformerv2_s12 --data digits
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "report": "parameters, multiply-adds and published figures of models",
    "finetune": "train a model on your data, from scratch or from released weights",
    "bench": "throughput and memory, alone or against other models",
    "convert": "checkpoints of the authors to safetensors, and back",
    "onnx": "graphs for other runtimes, checked against the model",
    "timm-suite": "run timm's own test-suite on the models of the zoo",
}


def _usage() -> str:
    lines = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
    return f"usage: mixzoo COMMAND [arguments]   (mixzoo COMMAND --help explains one)\n\ncommands:\n{lines}"


def main(argv: list[str] | None = None) -> int:
    """Run the sub-command that ``argv`` (default: the command line) names; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from mixzoo import __version__

        print(__version__)
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        print(f"mixzoo: no command {command!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"mixzoo.scripts.{command.replace('-', '_')}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
