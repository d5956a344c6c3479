"""`hotcold demo`: the whole job on SmolLM2-135M, ending with a table of the results."""

from __future__ import annotations

import argparse

from hotcold.cpus import thread_count

HELP = (
    "Run every step on SmolLM2-135M: make it sparse with the trained FFNs that come with hotcold, record its "
    "activations, train predictors, export, generate, and measure perplexity and tokens/s next to the "
    "original model, in llama.cpp and in hotcold. Only needs the package registry. If interrupted, run the "
    "same command again to continue. The figures go to DIR/report.json."
)
EXAMPLE = "hotcold demo --out demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold demo`."""
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for everything the demo makes")
    parser.add_argument(
        "--model", default="smollm2", metavar="M", help="a small GGUF model (default smollm2)"
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="train the sparse model now, which takes 12 minutes on two cores",
    )
    parser.add_argument("--quant", default="q4_0", metavar="Q", help="q4_0 (default), q8_0, f16, or bf16")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: all CPUs)")


def run(args: argparse.Namespace) -> int:
    """Run what is left of the demo, and print its summary."""
    from pathlib import Path

    from hotcold.eval.demo.demo import demo, summary

    out = Path(args.out)
    threads = thread_count(args.threads)
    report = demo(out, model=args.model, quant=args.quant, n_threads=threads, from_scratch=args.from_scratch)
    print(f"\n{summary(report)}\n\n{out / 'report.json'}", flush=True)
    return 0
