"""The `hotcold` command: a table of sub-commands, each imported only when it is called.

A sub-command is a module with `HELP`, `EXAMPLE`, `add_arguments(parser)` and `run(args) -> int`. Such modules import
torch and transformers inside `run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from hotcold import __version__
from hotcold.errors import HotcoldError

__all__ = ["main"]

# name -> (module, one line for `hotcold --help`)
COMMANDS: dict[str, tuple[str, str]] = {
    "sparsify": ("hotcold.sparsify.command", "make a model sparsely activated"),
    "collect-traces": ("hotcold.predictor.collect_command", "record which neurons fire, and on what input"),
    "train-predictors": ("hotcold.predictor.train_command", "learn to predict which neurons will fire"),
    "export": ("hotcold.convert.export_command", "write GGUF files and the predictor bundle"),
    "run": ("hotcold.runtime.command", "generate text"),
    "bench": ("hotcold.eval.bench_command", "measure tokens/s against llama.cpp, with quality in the same row"),
    "perplexity": ("hotcold.eval.perplexity_command", "measure perplexity in any mode"),
    "demo": ("hotcold.eval.demo_command", "all of the above on SmolLM2-135M"),
}

_INTERRUPTED = 130
_USER_ERROR = 2


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:<18}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="hotcold",
        description="Make LLMs sparsely activated, predict which neurons fire, and run only those.",
        epilog=f"commands:\n{lines}\n\nexample:\n  hotcold demo --out demo\n\n`hotcold COMMAND --help` tells the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hotcold {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help="one of those below")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="its own arguments")
    return parser


def _run_command(name: str, arguments: Sequence[str], prog: str) -> int:
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(
        prog=prog,
        description=module.HELP,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(arguments)
    try:
        return module.run(args)
    except HotcoldError as error:
        if args.debug:
            raise
        print(f"{prog}: error: {error}", file=sys.stderr)
        return _USER_ERROR
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"{prog}: interrupted; what was committed stays, run the same command again to go on", file=sys.stderr)
        return _INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0, 2 for a user's error, 130 after Ctrl-C)."""
    args = _parser().parse_args(argv)
    return _run_command(args.command, args.arguments, f"hotcold {args.command}")


def collect_traces() -> int:
    """Entry point `collect-traces`."""
    return _run_command("collect-traces", sys.argv[1:], "collect-traces")


def train_predictors() -> int:
    """Entry point `train-predictors`."""
    return _run_command("train-predictors", sys.argv[1:], "train-predictors")
