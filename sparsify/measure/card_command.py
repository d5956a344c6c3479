"""`hotcold sparsity-card`: the table of a sparse model's card, on any text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hotcold.cpus import torch_threads
from hotcold.errors import InputError
from hotcold.sparsify.config import Config, load_config

if TYPE_CHECKING:
    from hotcold.sparsify.measure.card import Load

HELP = (
    "Measure perplexity and the sparsity of each layer, and print tables in Markdown. Rows are the dense "
    "model, the same model with a sparse activation but no training, each stage that a training run kept "
    "(checkpoints.stages in its config), and other models."
)
EXAMPLE = "hotcold sparsity-card --dense smollm2 --model sparse --text wikitext.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold sparsity-card`."""
    add = parser.add_argument
    add("--dense", required=True, metavar="M", help="the original dense model")
    add("--model", action="append", default=[], metavar="M", help="a sparse model; can be repeated")
    add("--config", metavar="FILE", help="config of the training run (default: ReLU)")
    add("--work", type=Path, metavar="DIR", help="working folder of the run, to include its stages")
    add("--q4-0", action="store_true", help="round every matrix to Q4_0")
    add("--text", default="stdlib", metavar="SRC", help="file, glob, data set id, or stdlib (default)")
    add(
        "--part", default="test", choices=("test", "calibrate", "all"),
        help="part of the text: test, which no training or tuning uses; calibrate, which thresholds are "
        "chosen on; or all (default: %(default)s)",
    )  # fmt: skip
    add(
        "--tokens",
        type=int,
        default=8192,
        metavar="N",
        help="number of tokens to measure (default: %(default)s)",
    )
    add("--window", type=int, default=512, metavar="N", help="tokens per window (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure one model after the other, and print both tables."""
    if args.work is not None and args.config is None:
        raise InputError("needs the run's config", where="--work", fix="add --config FILE")
    config = load_config(args.config) if args.config else Config()

    torch_threads()
    from hotcold import text
    from hotcold.model import checkpoint
    from hotcold.progress import log
    from hotcold.sparsify.measure.card import layer_table, measured, summary_table
    from hotcold.sparsify.training.data import read_windows
    from hotcold.sparsify.training.memory import keep_big_buffers

    keep_big_buffers()
    documents = text.documents(args.text, None if args.part == "all" else args.part)
    tokenizer = checkpoint.load_tokenizer(args.dense)
    where = f"{args.text}, {args.part} part" if args.part != "all" else args.text
    windows = read_windows(documents, tokenizer, args.window, args.tokens, where)
    rows = []
    for row in measured(_models(args, config), windows, q4_0=args.q4_0):
        log(f"{row.name}: perplexity {row.quality.perplexity:.3f}, sparsity {row.quality.mean_sparsity:.2%}")
        rows.append(row)
    print(f"{summary_table(rows)}\n\n{layer_table(rows)}")
    return 0


def _models(args: argparse.Namespace, config: Config) -> Iterator[tuple[str, Load]]:
    from hotcold.model import checkpoint
    from hotcold.sparsify.measure.card import steps

    stages = args.work / "stages" if args.work else None
    yield from steps(lambda: checkpoint.load_model(args.dense), config, stages)
    for name in args.model:
        yield Path(name).name, lambda name=name: checkpoint.load_model(name)
