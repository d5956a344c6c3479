"""`hotcold perplexity`: how well a bundle predicts a text, in any of our modes or in llama.cpp."""

from __future__ import annotations

import argparse
import json

HELP = (
    "Measure perplexity in any mode, with its standard error. Every mode sees the same windows of token ids; "
    "each window starts from an empty context and is scored from its second token on. No BOS is put in "
    "unless the tokenizer adds one."
)
EXAMPLE = "hotcold perplexity --bundle demo/bundle --mode predicted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold perplexity`."""
    parser.add_argument("--bundle", required=True, metavar="DIR", help="a folder that `hotcold export` wrote")
    parser.add_argument(
        "--text", default="stdlib", metavar="SRC",
        help="file, glob, data set id, or stdlib: the held-out part of Python's own English text (default)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="tokens of text (default 8192)")
    parser.add_argument(
        "--window", type=int, default=512, metavar="N", help="tokens per window (default 512)"
    )
    parser.add_argument(
        "--mode", default="predicted", choices=("dense", "exact", "predicted", "auto", "llama.cpp")
    )
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: all CPUs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Measure and print one perplexity."""
    from hotcold.eval import machine, sides, windows
    from hotcold.eval.perplexity import perplexity
    from hotcold.progress import Progress

    tokenizer = windows.load_tokenizer(args.bundle)
    ids = windows.text_ids(args.text, tokenizer, args.tokens)
    cut = windows.windows(ids, args.window, tokenizer)
    side = sides.open_side(
        args.bundle, args.mode, n_threads=args.threads or machine.cpu_count(), n_ctx=args.window
    )
    with Progress(f"perplexity, {args.mode}", total=len(cut) * args.window, unit="tok") as progress:
        quality = perplexity(side, cut, progress.advance)
    if args.json:
        found = {"mode": args.mode, "ppl": quality.ppl, "stderr": quality.stderr, "tokens": quality.tokens}
        print(json.dumps(found))
    else:
        print(
            f"{args.mode}: perplexity {quality.ppl:.4f} ± {quality.stderr:.4f} over {quality.tokens} tokens"
        )
    return 0
