"""`hotcold collect-traces`: record which neurons fire, and on what input."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hotcold.cpus import torch_threads
from hotcold.errors import InputError
from hotcold.files.json import json_text
from hotcold.ownership import check_growing
from hotcold.progress import log
from hotcold.table import markdown

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from hotcold.predictor.traces.reader import TraceRun, TraceShard

HELP = "Run a model over text and record the input of every FFN layer and the neurons that fired, per token."
EXAMPLE = "hotcold collect-traces --model sparse --text stdlib --tokens 40000 --out traces"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--model", required=True, help="Hugging Face directory, .gguf file, hub id, or smollm2"
    )
    parser.add_argument("--text", default="stdlib", help="file, glob, data set id, or stdlib (default)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=40_000,
        help="tokens to run over, 5%% of them for calibration and 5%% for test",
    )
    parser.add_argument("--out", required=True, help="folder for the traces; run again to resume")
    parser.add_argument("--window", type=int, default=256, help="longest context, in tokens (default 256)")
    parser.add_argument("--shard-tokens", type=int, default=4096, help="tokens per shard (default 4096)")
    parser.add_argument(
        "-t", "--threads", type=int, help="windows to process at a time, one per CPU (default: all CPUs)"
    )
    parser.add_argument("--json", action="store_true", help="print the sparsity table as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Collect what is missing in `--out`, then print the sparsity of each layer."""
    for option in ("tokens", "window", "shard_tokens", "threads"):
        _check_positive(option, getattr(args, option))
    check_growing(args.out, "traces", [args.model, args.text])

    from hotcold.model import checkpoint
    from hotcold.predictor.traces.collect import check_tokens, collect, gather_tokens
    from hotcold.predictor.traces.writer import TraceWriter

    n_threads = torch_threads(args.threads)
    tokens = gather_tokens(args.text, checkpoint.load_tokenizer(args.model), args.tokens)
    model = checkpoint.load_model(args.model)
    check_tokens(model, tokens, args.window)
    described = _describe(args, model, tokens, n_threads)
    with TraceWriter.open(args.out, described, tokens) as writer:
        if writer.shards:
            log(f"{args.out}: resuming after {len(writer.shards)} shards")
        collect(model, checkpoint.ffn_layers(model), tokens, writer, n_threads)
    _report(writer.run, writer.shards, as_json=args.json)
    return 0


def _check_positive(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise InputError("must be positive", where="--" + option.replace("_", "-"), got=value)


def _describe(
    args: argparse.Namespace, model: PreTrainedModel, tokens: dict[str, np.ndarray], threads: int
) -> TraceRun:
    from hotcold.model import checkpoint
    from hotcold.predictor.traces.reader import TraceRun, tokens_digest

    layers = checkpoint.ffn_layers(model)
    return TraceRun(
        model=Path(args.model).name,
        model_fingerprint=checkpoint.fingerprint(args.model),
        n_layers=len(layers),
        d_model=layers[0].gate.in_features,
        d_ff=layers[0].gate.out_features,
        activation=checkpoint.activation_name(model),
        text=args.text,
        text_sha256=tokens_digest(tokens),
        n_tokens=args.tokens,
        shard_tokens=args.shard_tokens,
        window=args.window,
        threads=threads,
    )


def _report(run: TraceRun, shards: list[TraceShard], *, as_json: bool) -> None:
    from hotcold.predictor.traces.reader import sparsity

    layers = sparsity(run, shards)
    clipped = sum(shard.clipped for shard in shards)
    if as_json:
        mean = float(layers.mean())
        print(
            json_text(
                {"tokens": run.n_tokens, "sparsity": mean, "layers": layers.tolist(), "clipped": clipped}
            )
        )
        return
    shares = [(str(layer), f"{share:.4f}") for layer, share in enumerate(layers)]
    print(markdown(("layer", "sparsity"), [*shares, ("mean", f"{layers.mean():.4f}")], left=()))
    print(f"\n{run.n_tokens} tokens; {clipped} inputs clipped to the float16 range")
