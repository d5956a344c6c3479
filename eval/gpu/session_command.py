"""`hotcold bench-gpu-all`: every GPU measurement, each in its own process, within a time limit."""

from __future__ import annotations

import argparse

from hotcold.files.json import json_text

HELP = (
    "Run the measurements of docs/performance-gpu.md within a time limit, the most important first, each in "
    "its own process. The JSON file is updated after each part. A part that fails does not stop the others."
)
EXAMPLE = "hotcold bench-gpu-all --save session.json --minutes 9 --parts check,kernels-7b,kernels-13b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold bench-gpu-all`."""
    add = parser.add_argument
    add("--save", required=True, metavar="FILE", help="write the results to this file after each part")
    add("--parts", metavar="LIST", help="parts to run, in their fixed order (default: all)")
    add(
        "--minutes",
        type=float,
        default=9.0,
        metavar="M",
        help="time limit for all parts together (%(default)s)",
    )
    add("--device", default="cuda:0", help="cuda:N, or cpu for a dry run (%(default)s)")
    add("--cache", metavar="DIR", help="keep the synthetic files in this folder for later parts")


def run(args: argparse.Namespace) -> int:
    """Run the parts; 0 if all are done, else 1."""
    from hotcold.errors import InputError
    from hotcold.ownership import check_file

    check_file(args.save, "report")

    from hotcold.eval.gpu.session import PARTS, parts, run_parts
    from hotcold.runtime.gpu.device import open_device

    known = [part.name for part in PARTS]
    names = [name.strip() for name in args.parts.split(",")] if args.parts else known
    for name in names:
        if name not in known:
            raise InputError("unknown part", got=name, expected=", ".join(known))
    open_device(args.device)
    found = run_parts(parts(names, args.device, args.cache), args.save, 60 * args.minutes)
    print(json_text({part["part"]: part["status"] for part in found}))
    return 0 if all(part["status"] == "done" for part in found) else 1
