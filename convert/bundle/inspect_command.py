"""`hotcold inspect`: what is in a GGUF file, a bundle or a predictor bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from hotcold.files.json import json_text

HELP = (
    "Show what is in a GGUF file, a bundle, a predictor bundle or a GPU index: metadata, tensors, "
    "predictors, and which neurons are hot."
)
EXAMPLE = "hotcold inspect bundle/ --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "path", type=Path, metavar="FILE|DIR", help="a GGUF file, GPU index, bundle or predictor bundle"
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the description on stdout."""
    from hotcold.convert.bundle.inspect import describe, render

    described = describe(args.path)
    print(json_text(described, ensure_ascii=False) if args.json else render(described))
    return 0
