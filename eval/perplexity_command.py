"""`hotcold perplexity`: how well a bundle predicts a text, in any of our modes or in llama.cpp."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hotcold.cpus import thread_count
from hotcold.errors import InputError
from hotcold.files.json import json_text
from hotcold.runtime.backends import add_input_sparsity
from hotcold.runtime.generation.llama_options import add_llama_options
from hotcold.runtime.model_argument import add_model_arguments, add_quant_argument, model_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotcold.eval.perplexity import Quality
    from hotcold.eval.sides import Side

HELP = (
    "Measure perplexity in any mode, with its standard error. Every mode sees the same windows of token ids; "
    "each window starts from an empty context and is scored from its second token on. BOS is added only if "
    "the tokenizer adds it."
)
EXAMPLE = "hotcold perplexity --bundle demo/bundle --mode exact,predicted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold perplexity`."""
    add_model_arguments(parser)
    add_quant_argument(parser)
    parser.add_argument(
        "--mode", "--modes", default="auto", metavar="LIST",
        help="modes from dense, exact, predicted, llama.cpp, and auto (default), the fastest that the model "
        "offers; dense and exact differ slightly where down is quantized, along a different axis in each",
    )  # fmt: skip
    parser.add_argument(
        "--gguf", metavar="M",
        help="also measure this dense GGUF file (or smollm2) in llama.cpp, with the bundle's tokenizer",
    )  # fmt: skip
    parser.add_argument(
        "--text", default="stdlib", metavar="SRC",
        help="file, glob, or data set id, measured as a whole; or stdlib (default): the test part of the "
        "English text that comes with Python, which no training or tuning uses",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=8192, metavar="N", help="number of tokens to measure (default 8192)"
    )
    parser.add_argument(
        "--window", type=int, default=512, metavar="N", help="tokens per window (default 512)"
    )
    parser.add_argument(
        "--reference", metavar="MODE",
        help="also compare the distributions with this mode's: mean KL divergence, and how often both agree "
        "on the top token. `--mode llama.cpp --reference dense` shows how far off llama.cpp is when it "
        "cannot compute the model's function",
    )  # fmt: skip
    add_input_sparsity(parser)
    add_llama_options(parser)
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: all CPUs)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per mode, one per line",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print one perplexity per mode."""
    from hotcold.eval import windows
    from hotcold.eval.perplexity import compare
    from hotcold.eval.sides import LLAMA_CPP, MODES, check_offered, checked_modes, chosen_modes
    from hotcold.progress import Progress

    known = (*MODES, LLAMA_CPP)
    modes = checked_modes(args.mode, known)
    if args.input_sparsity and LLAMA_CPP in modes:
        raise InputError("llama.cpp cannot skip inputs", where="--input-sparsity", got=args.input_sparsity)
    reference = checked_modes(args.reference, known)[0] if args.reference else None
    args.threads = thread_count(args.threads)
    args.bundle = model_path(args)
    check_offered([*modes, *([reference] if reference else [])], args.bundle)
    tokenizer = windows.load_tokenizer(args.bundle)
    ids = windows.text_ids(args.text, tokenizer, args.tokens)
    cut = windows.windows(ids, args.window, tokenizer)
    modes = chosen_modes(modes, args.bundle, args.threads)
    reference = chosen_modes([reference], args.bundle, args.threads)[0] if reference else None
    truth = {reference: _open(args, reference)} if reference else {}
    for name, side in _sides(args, modes):
        sides = truth | {name: truth.get(name, side)}
        total = len(cut) * args.window * len(sides)
        with Progress(f"perplexity, {name}", total=total, unit="tok") as progress:
            found = compare(sides, cut, reference, progress.advance)
        _show(name, found[name], reference, as_json=args.json, left_out=_left_out(side, args.input_sparsity))
    return 0


def _left_out(side: Side, asked: float) -> dict[str, object]:
    """By site, what share of its inputs a side of ours has left out; and what it was asked to."""
    from hotcold.eval.sides import EngineSide

    shares = side.engine.stats().input_sparsity if isinstance(side, EngineSide) else {}
    return {**({"input_sparsity": asked} if asked else {}), "inputs_left_out": shares} if shares else {}


def _sides(args: argparse.Namespace, modes: list[str]) -> Iterator[tuple[str, Side]]:
    """One side after the other, so that only one is in memory, besides the reference."""
    from hotcold.eval.sides import open_llama_cpp, side_name

    for mode in modes:
        yield side_name(mode, args.input_sparsity), _open(args, mode, args.input_sparsity)
    if args.gguf:
        yield args.gguf, open_llama_cpp(args.gguf, n_threads=args.threads, n_ctx=args.window)


def _open(args: argparse.Namespace, mode: str, input_sparsity: float = 0.0) -> Side:
    from hotcold.eval.sides import open_side

    return open_side(
        args.bundle, mode, n_threads=args.threads, n_ctx=args.window, input_sparsity=input_sparsity
    )


def _show(
    name: str, quality: Quality, reference: str | None, *, as_json: bool, left_out: dict[str, object]
) -> None:
    distances = quality.kl is not None and quality.same_top is not None
    if as_json:
        found = {
            "mode": name,
            "ppl": quality.ppl,
            "stderr": quality.stderr,
            "tokens": quality.tokens,
        }
        found |= left_out
        found |= {"kl": quality.kl, "same_top": quality.same_top} if distances else {}
        print(json_text(found), flush=True)
    else:
        figures = f"{quality.ppl:.4f} ± {quality.stderr:.4f} over {quality.tokens} tokens"
        if distances:
            figures += (
                f"; KL({reference} ‖ {name}) {quality.kl:.5f} nats, same top token {quality.same_top:.1%}"
            )
        if left_out:
            from hotcold.runtime.stats import show_inputs

            figures += f"; inputs left out: {show_inputs(left_out['inputs_left_out'])}"
        print(f"{name}: perplexity {figures}", flush=True)
