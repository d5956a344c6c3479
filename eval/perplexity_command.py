"""`hotcold perplexity`: how well a bundle predicts a text, in any of our modes or in llama.cpp."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotcold.eval.perplexity import Quality
    from hotcold.eval.sides import Side

HELP = (
    "Measure perplexity in any mode, with its standard error. Every mode sees the same windows of token ids; "
    "each window starts from an empty context and is scored from its second token on. No BOS is put in "
    "unless the tokenizer adds one."
)
EXAMPLE = "hotcold perplexity --bundle demo/bundle --mode exact,predicted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold perplexity`."""
    parser.add_argument("--bundle", required=True, metavar="DIR", help="a folder that `hotcold export` wrote")
    parser.add_argument(
        "--mode", default="predicted", metavar="LIST",
        help="of dense, exact, predicted, auto, llama.cpp (default predicted)",
    )  # fmt: skip
    parser.add_argument(
        "--gguf", metavar="M",
        help="also measure this dense GGUF file in llama.cpp, with the bundle's tokenizer; or smollm2",
    )  # fmt: skip
    parser.add_argument(
        "--text", default="stdlib", metavar="SRC",
        help="file, glob, data set id, or stdlib: the held-out part of Python's own English text (default)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="tokens of text (default 8192)")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens a window (default 512)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: all CPUs)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per mode, the last of them as the last line",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print one perplexity per mode."""
    from hotcold.eval import machine, windows
    from hotcold.eval.perplexity import perplexity
    from hotcold.eval.sides import LLAMA_CPP, MODES, checked_modes
    from hotcold.progress import Progress

    modes = checked_modes(args.mode, (*MODES, LLAMA_CPP))
    args.threads = machine.thread_count(args.threads)
    tokenizer = windows.load_tokenizer(args.bundle)
    ids = windows.text_ids(args.text, tokenizer, args.tokens)
    cut = windows.windows(ids, args.window, tokenizer)
    for name, side in _sides(args, modes):
        with Progress(f"perplexity, {name}", total=len(cut) * args.window, unit="tok") as progress:
            _show(name, perplexity(side, cut, progress.advance), as_json=args.json)
    return 0


def _sides(args: argparse.Namespace, modes: list[str]) -> Iterator[tuple[str, Side]]:
    """One side after the other, so that only one is in memory."""
    from hotcold.eval.sides import open_gguf, open_side

    size = {"n_threads": args.threads, "n_ctx": args.window}
    for mode in modes:
        yield mode, open_side(args.bundle, mode, **size)
    if args.gguf:
        yield args.gguf, open_gguf(args.gguf, **size)


def _show(name: str, quality: Quality, *, as_json: bool) -> None:
    if as_json:
        found = {"mode": name, "ppl": quality.ppl, "stderr": quality.stderr, "tokens": quality.tokens}
        print(json.dumps(found), flush=True)
    else:
        figures = f"{quality.ppl:.4f} ± {quality.stderr:.4f} over {quality.tokens} tokens"
        print(f"{name}: perplexity {figures}", flush=True)
