"""`hotcold bench`: tokens/s against llama.cpp, with the quality that was paid for it in the same row."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hotcold.runtime.llama_options import add_llama_options

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

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

_QUALITY_TOKENS, _SYNTHETIC_QUALITY_TOKENS = 4096, 512  # a random model's perplexity is not worth minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold bench`; those that llama-bench has bear its names."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--bundle", metavar="DIR", help="a folder that `hotcold export` wrote")
    model.add_argument(
        "--synthetic", metavar="SHAPE",
        help="random weights: llama-2-7b, llama-2-13b, mistral-7b or smollm2-135m",
    )  # fmt: skip
    add = parser.add_argument
    add("-t", "--threads", type=int, metavar="N", help="threads (default: all CPUs)")
    add("-r", "--repetitions", type=int, default=7, metavar="N", help="rounds (default 7)")
    add("-p", "--n-prompt", type=int, default=128, metavar="N", help="tokens per prompt (default 128)")
    add("-n", "--n-gen", type=int, default=64, metavar="N", help="tokens per generation (default 64)")
    add(
        "-m", "--modes", default="dense,exact,predicted", metavar="LIST",
        help="of dense, exact, predicted, auto (default dense,exact,predicted)",
    )  # fmt: skip
    add(
        "--input-sparsity", type=float, default=0.0, metavar="SHARE",
        help="also run each mode, loaded once more, with this share of the attention's inputs left out",
    )  # fmt: skip
    add("-o", "--output", default="md", choices=("md", "csv", "json", "jsonl"))
    add("--save", metavar="FILE", help="write the JSON object to this file too")
    add(
        "--text", default="stdlib", metavar="SRC",
        help="file, glob, data set id, or stdlib: the held-out part of Python's own English text (default)",
    )  # fmt: skip
    add(
        "--quality-tokens", type=int, metavar="N",
        help=f"tokens for perplexity (default {_QUALITY_TOKENS}, synthetic {_SYNTHETIC_QUALITY_TOKENS})",
    )  # fmt: skip
    add("--window", type=int, default=512, metavar="N", help="tokens a window of perplexity (default 512)")
    _add_synthetic_arguments(parser.add_argument_group("synthetic models"))
    add_llama_options(parser)


def _add_synthetic_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--layers", type=int, metavar="N", help="layers (default: all of the shape)")
    add("--sparsity", type=float, default=0.89, metavar="S", help="mean share of idle neurons (default 0.89)")
    add("--quant", default="q4_0", metavar="Q", help="q4_0 (default), q8_0, f16 or bf16")
    add("--predictor-quant", default="q8_0", metavar="Q", help="of the predictors (default q8_0)")
    add("--predictor-rank", type=int, metavar="R", help="multiple of 64 (default: d_model / 16)")
    add(
        "--noise", type=float, default=0.36, metavar="X",
        help="part of a gate that no predictor can know, to 1 that it can (default 0.36)",
    )  # fmt: skip
    add("--cache", metavar="DIR", help="keep the synthetic files here for the next time")


def run(args: argparse.Namespace) -> int:
    """Measure, and print the report to stdout."""
    import tempfile
    from pathlib import Path

    from hotcold import storage
    from hotcold.eval import machine
    from hotcold.eval.bench import Plan
    from hotcold.eval.report import as_json_object, render

    plan = Plan(args.repetitions, args.n_prompt, args.n_gen)
    args.threads = machine.thread_count(args.threads)
    if args.quality_tokens is None:
        args.quality_tokens = _SYNTHETIC_QUALITY_TOKENS if args.synthetic else _QUALITY_TOKENS
    with tempfile.TemporaryDirectory(prefix="hotcold-bench-") as scratch:
        report = _measure(args, plan, Path(scratch))
    if args.save:
        storage.write_json(args.save, as_json_object(report))
    print(render(report, args.output), flush=True)
    return 0


def _measure(args: argparse.Namespace, plan: Plan, scratch: Path) -> Report:
    from dataclasses import replace

    from hotcold.eval import machine, sides
    from hotcold.eval.bench import bench, segments
    from hotcold.runtime.engine import check_input_sparsity

    check_input_sparsity(args.input_sparsity)
    modes = sides.checked_modes(args.modes)
    bundle, ids, windows = _synthetic(args, plan, scratch) if args.synthetic else _real(args, plan)
    n_ctx = max(plan.n_prompt + plan.n_gen, args.window)
    peers, truth = sides.open_peers(bundle, scratch, n_threads=args.threads, n_ctx=n_ctx)
    ours = {
        sides.side_name(mode, share): sides.open_side(
            bundle, mode, n_threads=args.threads, n_ctx=n_ctx, input_sparsity=share
        )
        for mode in modes
        for share in dict.fromkeys((0.0, args.input_sparsity))
    }
    report = bench(peers, ours, segments(ids, plan), windows, truth=truth, n_threads=args.threads)
    return replace(report, settings=_settings(args, plan), machine=machine.describe())


def _real(args: argparse.Namespace, plan: Plan) -> tuple[Path, np.ndarray, list[np.ndarray]]:
    """The bundle, the ids to time it on, and the windows of the text before them to judge it on."""
    from pathlib import Path

    from hotcold.eval import windows

    tokenizer = windows.load_tokenizer(args.bundle)
    ids = windows.text_ids(args.text, tokenizer, args.quality_tokens + plan.n_tokens)
    cut = windows.windows(ids[: args.quality_tokens], args.window, tokenizer)
    return Path(args.bundle), ids[args.quality_tokens :], cut


def _synthetic(
    args: argparse.Namespace, plan: Plan, scratch: Path
) -> tuple[Path, np.ndarray, list[np.ndarray]]:
    """The same with random weights and pseudo-text."""
    from hotcold.eval.planted import pseudo_text
    from hotcold.eval.synthetic import Synthetic, write_synthetic
    from hotcold.eval.windows import windows

    synthetic = Synthetic(
        shape=args.synthetic,
        sparsity=args.sparsity,
        quant=args.quant,
        n_layers=args.layers,
        predictor_quant=args.predictor_quant,
        predictor_rank=args.predictor_rank,
        noise=args.noise,
        attention_rows=args.input_sparsity > 0,
    )
    n_vocab = synthetic.config["vocab_size"]
    ids = pseudo_text(n_vocab, args.quality_tokens + plan.n_tokens, seed=synthetic.seed + 2)
    cut = windows(ids[: args.quality_tokens], args.window)
    return write_synthetic(synthetic, args.cache or scratch), ids[args.quality_tokens :], cut


def _settings(args: argparse.Namespace, plan: Plan) -> dict[str, object]:
    """What the report says about how it was measured."""
    from hotcold.convert.manifest import Manifest

    if args.synthetic:
        names = ("synthetic", "layers", "sparsity", "quant", "predictor_quant", "predictor_rank", "noise")
        figures = {name: getattr(args, name) for name in names}
        model = {name: figure for name, figure in figures.items() if figure is not None}
        model["planned_sparsity"] = model.pop("sparsity")  # the measured one has this name
    else:
        model = {"bundle": args.bundle, "text": args.text}
        if not Manifest.read(args.bundle).llama_cpp_exact:
            model["llama_cpp"] = "computes another function: it has no such activation"
    return {
        **model,
        "threads": args.threads,
        "rounds": plan.rounds,
        "n_prompt": plan.n_prompt,
        "n_gen": plan.n_gen,
        **({"input_sparsity": args.input_sparsity} if args.input_sparsity else {}),
        "quality_tokens": args.quality_tokens,
        "window": args.window,
    }
