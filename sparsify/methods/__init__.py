"""The methods of `hotcold sparsify`: one row and one file each.

A method's module is imported when it runs. Its `run(args, given)` gets the command line and, by name, those
of the method's own options that were given.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass

from hotcold.errors import InputError

__all__ = ["METHODS", "Method", "run_method", "shared_by"]

_TRAINING = ("work", "dry_run")


@dataclass(frozen=True, slots=True)
class Method:
    """`takes` are options of the command that not all methods have, as argparse calls them."""

    module: str
    takes: tuple[str, ...] = ()


METHODS = {
    "relu": Method(
        "relu", ("text", "tokens", "generated", "l1", "l1_reduction", "quantize", "seed", *_TRAINING)
    ),
    "prosparse": Method("prosparse_command", ("config", *_TRAINING)),
    "pretrained": Method("pretrained_command"),
    "cats": Method("cats", ("sparsity", "text", "tokens")),
    "teal": Method("teal", ("sparsity", "text", "tokens", "sites", "score")),
}
_OPTIONS = sorted({option for method in METHODS.values() for option in method.takes})
_FLAGS = {"quantize": "--no-quantize"}


def run_method(args: argparse.Namespace) -> int:
    """Run the method that was asked for. InputError for an unknown one, and for an option of another one."""
    if args.method not in METHODS:
        raise InputError("unknown method", where="--method", got=args.method, expected=" | ".join(METHODS))
    method = METHODS[args.method]
    given = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    for option in given:
        if option not in method.takes:
            fix = f"say it in {args.config}" if args.config and "config" in method.takes else None
            raise InputError(f"is for --method {shared_by(option)}", where=_flag(option), fix=fix)
    return importlib.import_module(f"{__name__}.{method.module}").run(args, given)


def shared_by(option: str) -> str:
    """The names of the methods that have an option."""
    return " or ".join(name for name, method in METHODS.items() if option in method.takes)


def _flag(option: str) -> str:
    return _FLAGS.get(option, f"--{option.replace('_', '-')}")
