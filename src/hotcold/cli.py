"""The `hotcold` command: a table of sub-commands, each imported only when it is called.

A sub-command is a module with `HELP`, `EXAMPLE`, `add_arguments(parser)` and `run(args) -> int`. Such modules
import torch and transformers inside `run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from hotcold import __version__
from hotcold.errors import HotcoldError

__all__ = ["main"]

# step of the road -> name -> (module, one line for `hotcold --help`)
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "start here": {
        "demo": ("hotcold.eval.demo.demo_command", "run every step on SmolLM2-135M"),
        "run": ("hotcold.runtime.command", "generate text with any model"),
        "bench": ("hotcold.eval.bench_command", "measure tokens/s and quality against llama.cpp"),
        "perplexity": ("hotcold.eval.perplexity_command", "measure perplexity in any mode"),
        "inspect": ("hotcold.convert.bundle.inspect_command", "show what is in a GGUF file or a bundle"),
    },
    "make a model sparse": {
        "sparsify": ("hotcold.sparsify.command", "make a model sparsely activated"),
        "shift-thresholds": (
            "hotcold.sparsify.methods.shift_thresholds_command",
            "zero more gates within a perplexity budget",
        ),
        "sparsity-card": (
            "hotcold.sparsify.measure.card_command",
            "measure perplexity and sparsity after each step",
        ),
    },
    "predict neurons": {
        "collect-traces": (
            "hotcold.predictor.traces.collect_command",
            "record which neurons fire, and on what input",
        ),
        "train-predictors": (
            "hotcold.predictor.training.train_command",
            "learn to predict which neurons will fire",
        ),
    },
    "write and check files": {
        "export": ("hotcold.convert.bundle.export_command", "write GGUF files and predictors as a bundle"),
        "convert": (
            "hotcold.convert.convert_command",
            "convert between hotcold, PowerInfer, and llama.cpp formats",
        ),
        "verify": (
            "hotcold.convert.bundle.verify_command",
            "check every hash, shape, and reference of a bundle",
        ),
    },
    "measure more": {
        "bench-shared": ("hotcold.eval.shared_bench_command", "measure decoding on few or shared CPUs"),
        "bench-gpu": ("hotcold.eval.gpu.bench_command", "measure decoding on a GPU, alone or with the CPU"),
        "bench-gpu-all": ("hotcold.eval.gpu.session_command", "run all GPU measurements within a time limit"),
        "bench-kernels": ("hotcold.eval.gpu.kernel_bench_command", "measure the sparse GPU operators alone"),
    },
    "clean up": {
        "cache": ("hotcold.cache_command", "list or clear converted models and measurements"),
    },
}
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}

EXAMPLE = "hotcold demo --out demo"

_UNEXPECTED, _USER_ERROR, _INTERRUPTED, _BROKEN_PIPE = 1, 2, 130, 141


class _Parser(argparse.ArgumentParser):
    """An argument parser whose help keeps its lines and whose errors are one line."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        kept = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=kept)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Abbreviate long options only: `-o` is not llama.cpp's `-ot`."""
        found = super()._get_option_tuples(option_string)
        return [match for match in found if match[1].startswith("--") or len(match[1]) == 2]

    def error(self, message: str) -> NoReturn:
        self.exit(_USER_ERROR, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def _listed(title: str, commands: dict[str, tuple[str, str]]) -> str:
    return "\n".join([f"{title}:", *(f"  {name:<18}{text}" for name, (_, text) in commands.items())])


def _parser() -> _Parser:
    groups = "\n\n".join(_listed(title, commands) for title, commands in GROUPS.items())
    parser = _Parser(
        prog="hotcold",
        description="Make LLMs sparsely activated, predict which neurons fire, and compute only those.",
        epilog=f"{groups}\n\nRun `hotcold COMMAND --help` for details.\n\nexample:\n  {EXAMPLE}",
    )
    parser.add_argument("--version", action="version", version=f"hotcold {__version__}")
    parser.add_argument(
        "command", metavar="COMMAND", help="a command from the list below, followed by its options"
    )
    return parser


def _spare_the_terminal() -> None:
    """Print characters outside of the terminal's encoding as `?`, or as an escape on stderr."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _run_command(name: str, arguments: Sequence[str], prog: str) -> int:
    module = importlib.import_module(COMMANDS[name][0])
    parser = _Parser(prog, module.HELP, epilog=f"example:\n  {module.EXAMPLE}")
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    try:
        return module.run(args)
    except BrokenPipeError:
        # The reader closed the pipe: discard what Python still buffers.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            raise
        line, status = _explain(error)
        print(f"{prog}: {line}", file=sys.stderr)
        return status


def _explain(error: BaseException) -> tuple[str, int]:
    """One line and the exit status for whatever ended a command."""
    match error:
        case HotcoldError():
            return f"error: {error}", _USER_ERROR
        case KeyboardInterrupt():
            return "interrupted; finished work is kept, run the same command again to continue", _INTERRUPTED
        case MemoryError():
            return "error: out of memory; use a smaller model, batch, or context", _UNEXPECTED
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"unexpected {what}; use --debug to see where", _UNEXPECTED


def _suggestion(name: str) -> str:
    nearest = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"unknown command {name!r}" + (f", did you mean {nearest[0]!r}?" if nearest else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a user's error, 130 after Ctrl-C."""
    _spare_the_terminal()
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    name = parser.parse_args(argv[:1]).command
    if name not in COMMANDS:
        parser.error(_suggestion(name))
    return _run_command(name, argv[1:], f"hotcold {name}")


def collect_traces() -> int:
    """Entry point `collect-traces`."""
    _spare_the_terminal()
    return _run_command("collect-traces", sys.argv[1:], "collect-traces")


def train_predictors() -> int:
    """Entry point `train-predictors`."""
    _spare_the_terminal()
    return _run_command("train-predictors", sys.argv[1:], "train-predictors")
