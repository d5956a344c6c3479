"""How a command line names the model that is to be run: the same for `run`, `bench` and `perplexity`."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_model_arguments", "add_quant_argument", "model_path"]

_WHAT = "a bundle, a GGUF file (PowerInfer's included), a Hugging Face directory or hub id, or smollm2"


def add_model_arguments(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Declare the model, as a positional or an option; returns the group, for alternatives to it."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("path", nargs="?", metavar="MODEL", help=_WHAT)
    group.add_argument("-m", "--model", "--bundle", dest="bundle", metavar="MODEL", help="the same as MODEL")
    return group


def add_quant_argument(group: argparse._ActionsContainer, more: str = "") -> None:
    """Declare the type of a checkpoint's matrices."""
    group.add_argument(
        "--quant", metavar="Q",
        help=f"type to convert a Hugging Face model to: q8_0 (default), q4_0, f16, …{more}",
    )  # fmt: skip


def model_path(args: argparse.Namespace) -> Path:
    """The bundle or GGUF file that the arguments name, converted if need be."""
    from hotcold.runtime.bundle_files import find_model

    return find_model(args.bundle or args.path, args.quant)
