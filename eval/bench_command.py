"""`hotcold bench`: tokens/s against llama.cpp, with quality in the same row."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hotcold.cpus import thread_count
from hotcold.errors import InputError
from hotcold.runtime.generation.llama_options import add_llama_options
from hotcold.runtime.model_argument import add_model_arguments, add_quant_argument, model_path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from tokenizers import Tokenizer

    from hotcold.eval.bench import Plan
    from hotcold.eval.results import Report, StockSpeed
    from hotcold.eval.sides import EngineSide, Peer

HELP = (
    "Measure tokens/s against llama.cpp, as ratios with confidence intervals. llama.cpp on the dense file "
    "and hotcold in each mode take turns on the same text with the same number of threads, one token at a "
    "time. Each row also shows quality: sparsity, recall, perplexity, the KL divergence from llama.cpp's "
    "logits, and how often both agree on the top token. llama.cpp runs the faster of two dense files: one "
    "that computes the same function, and a plain `llama` file with the same tensors. Memory bandwidth is "
    "measured next to each run, as the better of two read loops. Quality is not shown for random weights."
)
EXAMPLE = "hotcold bench --bundle demo/bundle -t 2 -r 7 -o md"

AS_IT_CAME = "as it came (llama.cpp)"
_QUALITY_TOKENS = 4096
_SYNTHETIC_QUANT = "q4_0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold bench`; those that llama-bench has bear its names."""
    add_model_arguments(parser).add_argument(
        "--synthetic", metavar="SHAPE",
        help="use random weights in the shape of llama-2-7b, llama-2-13b, mistral-7b, or smollm2-135m",
    )  # fmt: skip
    add = parser.add_argument
    add("-t", "--threads", type=int, metavar="N", help="threads (default: all CPUs)")
    add("-r", "--repetitions", type=int, default=7, metavar="N", help="rounds (default 7)")
    add("-p", "--n-prompt", type=int, default=128, metavar="N", help="tokens per prompt (default 128)")
    add("-n", "--n-gen", type=int, default=64, metavar="N", help="tokens per generation (default 64)")
    add(
        "--modes", "--mode", metavar="LIST",
        help="modes from dense, exact, predicted, auto (default: all that the model offers)",
    )  # fmt: skip
    add(
        "--input-sparsity", type=float, default=0.0, metavar="SHARE",
        help="also run each mode with this share of the attention inputs skipped",
    )  # fmt: skip
    add("-o", "--output", default="md", choices=("md", "csv", "json", "jsonl"))
    add("--save", metavar="FILE", help="also write the report as JSON to this file")
    add(
        "--text", default="stdlib", metavar="SRC",
        help="file, glob, or data set id, measured as a whole; or stdlib (default): the test part of the "
        "English text that comes with Python, which no training or tuning uses",
    )  # fmt: skip
    add(
        "--quality-tokens", type=int, metavar="N",
        help=f"tokens for perplexity and KL; 0: skip them (default {_QUALITY_TOKENS}; 0 for random weights)",
    )  # fmt: skip
    add("--window", type=int, default=512, metavar="N", help="tokens per perplexity window (default 512)")
    add(
        "--original", metavar="DIR",
        help="a bundle of the model that this one was made from; its dense file also runs, in llama.cpp and "
        "in hotcold, and every row shows its ratios to both",
    )  # fmt: skip
    add(
        "--gguf", metavar="M",
        help="also run this dense GGUF file in llama.cpp, such as the original model; or smollm2",
    )  # fmt: skip
    add(
        "--llama-bench", metavar="PATH",
        help="also run this llama-bench from llama.cpp on the same files, with as many threads and tokens",
    )  # fmt: skip
    _add_synthetic_arguments(parser.add_argument_group("synthetic models"))
    add_llama_options(parser)


def _add_synthetic_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--layers", type=int, metavar="N", help="number of layers (default: all)")
    add(
        "--sparsity",
        type=float,
        default=0.89,
        metavar="S",
        help="mean share of neurons that do not fire (default 0.89)",
    )
    add_quant_argument(group, "; synthetic: q4_0 (default), q8_0, f16 or bf16")
    add("--predictor-quant", default="q8_0", metavar="Q", help="type of the predictors (default q8_0)")
    add(
        "--predictor-rank",
        type=int,
        metavar="R",
        help="rank of the predictors, a multiple of 64 (default: d_model / 16)",
    )
    add(
        "--noise", type=float, default=0.36, metavar="X",
        help="unpredictable part of each gate, relative to the predictable part (default 0.36)",
    )  # fmt: skip
    add("--cache", metavar="DIR", help="keep the synthetic files in this folder for the next run")


def run(args: argparse.Namespace) -> int:
    """Measure, and print the report to stdout."""
    import tempfile
    from pathlib import Path

    from hotcold import storage
    from hotcold.eval.bench import Plan
    from hotcold.eval.report import as_json_object, render
    from hotcold.ownership import check_file

    if args.save:
        check_file(args.save, "report")
    plan = Plan(args.repetitions, args.n_prompt, args.n_gen)
    args.threads = thread_count(args.threads)
    if args.quality_tokens is None:
        args.quality_tokens = 0 if args.synthetic else _QUALITY_TOKENS
    if args.quality_tokens < 0:
        raise InputError("must not be negative", where="--quality-tokens", got=args.quality_tokens)
    with tempfile.TemporaryDirectory(prefix="hotcold-bench-") as scratch:
        report = _measure(args, plan, Path(scratch))
    if args.save:
        check_file(args.save, "report")  # again, because time has passed
        storage.write_json(args.save, as_json_object(report))
    print(render(report, args.output), flush=True)
    return 0


def _measure(args: argparse.Namespace, plan: Plan, scratch: Path) -> Report:
    from dataclasses import replace

    from hotcold.eval import machine, sides
    from hotcold.eval.bench import bench, segments
    from hotcold.runtime.cpu.engine import check_input_sparsity

    check_input_sparsity(args.input_sparsity)
    modes = sides.checked_modes(args.modes) if args.modes else []
    bundle, ids, windows = _synthetic(args, plan, scratch) if args.synthetic else _real(args, plan, modes)
    modes = sides.chosen_modes(modes, bundle, args.threads)
    n_ctx = max(plan.n_prompt + plan.n_gen, args.window if windows else 0)
    peers, truth = sides.open_peers(bundle, scratch, n_threads=args.threads, n_ctx=n_ctx)
    ours = {
        sides.side_name(mode, share): sides.open_ours(
            bundle, mode, n_threads=args.threads, n_ctx=n_ctx, input_sparsity=share
        )
        for mode in modes
        for share in dict.fromkeys((0.0, args.input_sparsity))
    }
    originals = _originals(args, n_ctx)
    stock = _stock(args, plan, peers)
    texts = segments(ids, plan)
    report = bench(peers, ours, texts, windows, truth=truth, n_threads=args.threads, originals=originals)
    return replace(report, settings=_settings(args, plan), machine=machine.describe(), stock=stock)


def _originals(args: argparse.Namespace, n_ctx: int) -> dict[str, Peer | EngineSide]:
    """The requested sides of the model that the bundle was made from."""
    from hotcold.eval import sides

    opened = {}
    if args.gguf:
        opened[AS_IT_CAME] = sides.open_llama_cpp(args.gguf, n_threads=args.threads, n_ctx=n_ctx)
    if args.original:
        for mode in (sides.LLAMA_CPP, "dense"):
            opened[f"original ({mode})"] = sides.open_side(
                args.original, mode, n_threads=args.threads, n_ctx=n_ctx
            )
    return opened


def _stock(args: argparse.Namespace, plan: Plan, peers: Mapping[str, Peer]) -> list[StockSpeed]:
    """The figures of a stock llama-bench, taken first, so that a wrong path fails at once."""
    from hotcold.eval.llama_bench import LlamaBench

    if not args.llama_bench:
        return []
    program = LlamaBench(args.llama_bench, args.threads, plan.n_prompt, plan.n_gen)
    return [program.run(name, peer.path) for name, peer in peers.items()]


def _real(
    args: argparse.Namespace, plan: Plan, modes: list[str]
) -> tuple[Path, np.ndarray, list[np.ndarray]]:
    """The bundle, the ids to time it on, and the windows of the text before them to evaluate it on."""
    from hotcold.eval import sides, windows

    args.path, args.bundle = args.bundle or args.path, model_path(args)
    sides.check_offered([*modes, sides.LLAMA_CPP], args.bundle)
    tokenizer = windows.load_tokenizer(args.bundle)
    ids = windows.text_ids(args.text, tokenizer, args.quality_tokens + plan.n_tokens)
    cut = _cut(args, ids, tokenizer)
    return args.bundle, ids[args.quality_tokens :], cut


def _synthetic(
    args: argparse.Namespace, plan: Plan, scratch: Path
) -> tuple[Path, np.ndarray, list[np.ndarray]]:
    """The same with random weights and pseudo-text."""
    from hotcold.eval.synthetic.planted import pseudo_text
    from hotcold.eval.synthetic.shapes import Synthetic, write_synthetic

    synthetic = Synthetic(
        shape=args.synthetic,
        sparsity=args.sparsity,
        quant=args.quant or _SYNTHETIC_QUANT,
        n_layers=args.layers,
        predictor_quant=args.predictor_quant,
        predictor_rank=args.predictor_rank,
        noise=args.noise,
        attention_rows=args.input_sparsity > 0,
    )
    n_vocab = synthetic.config["vocab_size"]
    ids = pseudo_text(n_vocab, args.quality_tokens + plan.n_tokens, seed=synthetic.seed + 2)
    cut = _cut(args, ids)
    return write_synthetic(synthetic, args.cache or scratch), ids[args.quality_tokens :], cut


def _cut(args: argparse.Namespace, ids: np.ndarray, tokenizer: Tokenizer | None = None) -> list[np.ndarray]:
    """The windows to evaluate on; none if no quality is requested."""
    from hotcold.eval.windows import windows

    return windows(ids[: args.quality_tokens], args.window, tokenizer) if args.quality_tokens else []


def _settings(args: argparse.Namespace, plan: Plan) -> dict[str, object]:
    """What the report says about how it was measured."""
    from hotcold.eval.peers.llama_cpp import without_amx
    from hotcold.runtime.bundle_files import ModelPath

    if args.synthetic:
        names = ("synthetic", "layers", "sparsity", "quant", "predictor_quant", "predictor_rank", "noise")
        figures = {name: getattr(args, name) for name in names} | {"quant": args.quant or _SYNTHETIC_QUANT}
        model = {name: figure for name, figure in figures.items() if figure is not None}
        model["planned_sparsity"] = model.pop("sparsity")  # the measured one has this name
    else:
        model = {"bundle": args.path, "text": args.text}
        if not ModelPath(args.bundle).llama_cpp_exact:
            model["llama_cpp"] = "computes another function: it has no such activation"
    if without_amx():
        model["llama_cpp_build"] = "its AMX code fails: without AMX and repacked weights"
    return {
        **model,
        "threads": args.threads,
        "rounds": plan.rounds,
        "n_prompt": plan.n_prompt,
        "n_gen": plan.n_gen,
        **({"input_sparsity": args.input_sparsity} if args.input_sparsity else {}),
        **({"original": args.original} if args.original else {}),
        **({"gguf": args.gguf} if args.gguf else {}),
        **({"quality_tokens": args.quality_tokens, "window": args.window} if args.quality_tokens else {}),
    }
