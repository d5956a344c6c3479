"""`hotcold bench-shared`: decoding where CPUs are few, limited by a quota, or shared with other programs."""

from __future__ import annotations

import argparse

from hotcold.errors import InputError
from hotcold.files.json import json_text

HELP = (
    "Measure decoding on one CPU, under a cgroup quota of one CPU (where cgroups can be created), with more "
    "threads than CPUs, and next to busy programs of equal and of low priority. Each situation is compared "
    "with an undisturbed run. Use a machine that does nothing else."
)
EXAMPLE = "hotcold bench-shared --bundle demo/bundle --mode exact"

_PROMPT = "A computer program is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold bench-shared`."""
    add = parser.add_argument
    add(
        "-m",
        "--model",
        "--bundle",
        dest="bundle",
        required=True,
        metavar="PATH",
        help="a model, as for `hotcold run`",
    )
    add("--mode", default="exact", metavar="M", help="dense, exact, or predicted (default: %(default)s)")
    add("-r", "--repetitions", type=int, default=5, metavar="N", help="rounds (default: %(default)s)")
    add("-n", "--n-gen", type=int, default=256, metavar="N", help="tokens per run (default: %(default)s)")
    add("-o", "--output", default="md", choices=("md", "json"))


def run(args: argparse.Namespace) -> int:
    """Measure, and print a row per situation."""
    from hotcold.eval.shared_bench import measure, situations, table

    for option, value in (("-r", args.repetitions), ("-n", args.n_gen)):
        if value < 1:
            raise InputError("must be at least 1", where=option, got=value)
    arguments = ["-m", args.bundle, "--mode", args.mode, "-p", _PROMPT, "-n", str(args.n_gen)]
    arguments += ["--temp", "0", "--ignore-eos"]
    results = measure(arguments, situations(), args.repetitions)
    if args.output == "json":
        rows = [{"situation": r.situation.name, "tok_s": r.tok_s, "ratio": r.ratio} for r in results]
        print(json_text({"mode": args.mode, "rows": rows}))
    else:
        print(table(results))
    return 0
