"""`hotcold bench`: tokens/s against llama.cpp, with the quality that was paid for it in the same row."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from hotcold.eval.bench import Plan
    from hotcold.eval.results import Report

HELP = (
    "Measure tokens/s against llama.cpp. llama.cpp on the dense file and hotcold in each mode run in turns, "
    "with as many threads, on the same held-out text, fed token by token. Each row has its quality: "
    "sparsity, recall, perplexity, and the share of equal top tokens and the KL divergence against "
    "llama.cpp's logits. llama.cpp's speed is that of the faster of two dense files: the one that computes "
    "the same function, and a plain `llama` file with the same tensors."
)
EXAMPLE = "hotcold bench --bundle demo/bundle -t 2 -r 7 -o md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold bench`; those that llama-bench has bear its names."""
    parser.add_argument("--bundle", required=True, metavar="DIR", help="a folder that `hotcold export` wrote")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: all CPUs)")
    parser.add_argument("-r", "--repetitions", type=int, default=7, metavar="N", help="rounds (default 7)")
    parser.add_argument(
        "-p", "--n-prompt", type=int, default=128, metavar="N", help="tokens per prompt (default 128)"
    )
    parser.add_argument(
        "-n", "--n-gen", type=int, default=64, metavar="N", help="tokens per generation (default 64)"
    )
    parser.add_argument(
        "-m", "--modes", default="dense,exact,predicted", metavar="LIST",
        help="of dense, exact, predicted, auto (default dense,exact,predicted)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", default="md", choices=("md", "csv", "json", "jsonl"))
    parser.add_argument("--save", metavar="FILE", help="write the JSON object to this file too")
    parser.add_argument(
        "--text", default="stdlib", metavar="SRC",
        help="file, glob, data set id, or stdlib: the held-out part of Python's own English text (default)",
    )  # fmt: skip
    parser.add_argument(
        "--quality-tokens", type=int, default=4096, metavar="N", help="tokens for perplexity (default 4096)"
    )
    parser.add_argument(
        "--window", type=int, default=512, metavar="N", help="tokens per window of perplexity (default 512)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, and print the report to stdout."""
    import tempfile
    from pathlib import Path

    from hotcold import storage
    from hotcold.eval import machine
    from hotcold.eval.bench import Plan
    from hotcold.eval.report import as_json_object, render

    plan = Plan(args.repetitions, args.n_prompt, args.n_gen)
    args.threads = args.threads or machine.cpu_count()
    with tempfile.TemporaryDirectory(prefix="hotcold-bench-") as scratch:
        report = _measure(args, plan, Path(scratch))
    if args.save:
        storage.write_json(args.save, as_json_object(report))
    print(render(report, args.output), flush=True)
    return 0


def _measure(args: argparse.Namespace, plan: Plan, scratch: Path) -> Report:
    from dataclasses import replace

    from hotcold.eval import machine, sides, windows
    from hotcold.eval.bench import bench, segments

    tokenizer = windows.load_tokenizer(args.bundle)
    ids = windows.text_ids(args.text, tokenizer, plan.n_tokens + args.quality_tokens)
    cut = windows.windows(ids[: args.quality_tokens], args.window, tokenizer)
    n_ctx = max(plan.n_prompt + plan.n_gen, args.window)
    peers, truth = sides.open_peers(args.bundle, scratch, n_threads=args.threads, n_ctx=n_ctx)
    ours = {
        mode: sides.open_side(args.bundle, mode, n_threads=args.threads, n_ctx=n_ctx)
        for mode in sides.checked_modes(args.modes)
    }
    texts = segments(ids[args.quality_tokens :], plan)
    report = bench(peers, ours, texts, cut, truth=truth, n_threads=args.threads)
    return replace(report, settings=_settings(args, plan), machine=machine.describe())


def _settings(args: argparse.Namespace, plan: Plan) -> dict[str, object]:
    return {
        "bundle": str(args.bundle),
        "text": args.text,
        "threads": args.threads,
        "rounds": plan.rounds,
        "n_prompt": plan.n_prompt,
        "n_gen": plan.n_gen,
        "quality_tokens": args.quality_tokens,
        "window": args.window,
    }
