"""`hotcold verify`: whether a bundle is whole and of one piece."""

from __future__ import annotations

import argparse
from pathlib import Path

from hotcold.errors import MismatchError

HELP = "Check a bundle: the hash of every file, every shape, and that all parts belong to the same model."
EXAMPLE = "hotcold verify bundle/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("bundle", type=Path, metavar="DIR", help="the bundle to check")


def run(args: argparse.Namespace) -> int:
    """Print what is wrong, one line each, or that all is well."""
    from hotcold.convert.bundle.manifest import Manifest
    from hotcold.convert.bundle.verify import verify_bundle

    problems = verify_bundle(args.bundle)
    for problem in problems:
        print(f"{type(problem).__name__}: {problem}")
    if problems:
        raise MismatchError(
            f"the bundle is invalid, problems found: {len(problems)}",
            where=args.bundle,
            fix="export it again",
        )
    files = Manifest.read(args.bundle).files.values()
    size = sum(file.bytes for file in files) / 1e6
    print(f"{args.bundle}: {len(files)} files, {size:.1f} MB, no problems found")
    return 0
