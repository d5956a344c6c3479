"""`hotcold sparsify`: from a dense model to an HF checkpoint of a sparsely activated one."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hotcold.errors import InputError, StorageError
from hotcold.sparsify.methods import METHODS, load_method
from hotcold.sparsify.recipe import REDUCTIONS, Recipe

if TYPE_CHECKING:
    from hotcold.sparsify.relu import Result

HELP = "Replace the FFN activation by a sparse one and repair the model by distillation from its dense self."
EXAMPLE = "hotcold sparsify --model smollm2 --method relu --out sparse-smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; those left out keep the recipe's defaults."""
    add, default = parser.add_argument, Recipe()
    add("--model", required=True, metavar="M", help="HF directory, .gguf file, hub id, or smollm2")
    add("--method", default="relu", metavar="NAME", help=f"{' | '.join(METHODS)} (default: %(default)s)")
    add("--out", required=True, type=Path, metavar="DIR", help="where the HF checkpoint goes")
    add(
        "--text", default="stdlib", metavar="SRC",
        help="file, glob, data set id, or stdlib, the text that Python carries (default: %(default)s)",
    )  # fmt: skip
    add(
        "--tokens", type=int, default=default.tokens, metavar="N",
        help="tokens to train on, in all phases together; the time goes with it (default: %(default)s)",
    )  # fmt: skip
    add(
        "--generated", type=float, default=default.generated_share, metavar="SHARE",
        help="share of them from text that the dense model writes itself (default: %(default)s)",
    )  # fmt: skip
    add(
        "--l1", type=float, default=default.l1_peak, metavar="PEAK",
        help="final factor of the L1 term: higher is sparser and less exact (default: %(default)s)",
    )  # fmt: skip
    add(
        "--l1-reduction", default=default.l1_reduction, metavar="R",
        help=f"over what the L1 norm is averaged: {' | '.join(REDUCTIONS)} (default: %(default)s)",
    )  # fmt: skip
    add("--no-quantise", action="store_true", help="do not train for the rounding of Q4_0")
    add(
        "--seed",
        type=int,
        default=default.seed,
        metavar="S",
        help="of sampling and shuffling (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Sparsify, save, and print the summary table."""
    method = load_method(args.method)
    _check_out(args.out)
    recipe = _recipe(args)

    from hotcold import checkpoint
    from hotcold.sparsify.evaluate import table
    from hotcold.sparsify.memory import keep_big_buffers

    keep_big_buffers()
    tokenizer = checkpoint.load_tokenizer(args.model)
    lines: list[str] = []
    result = method(
        checkpoint.load_model(args.model),
        tokenizer,
        args.text,
        recipe,
        lambda record: lines.append(json.dumps(record)),
    )
    files = {
        "training.jsonl": "".join(f"{line}\n" for line in lines).encode(),
        "sparsify.json": (json.dumps(_summary(args, recipe, result), indent=2) + "\n").encode(),
    }
    # Half the size, and Q4_0 makes the same blocks of these weights as of the float32 ones.
    checkpoint.save(result.model.half(), tokenizer, args.out, like=args.model, files=files)
    print(table(result.dense, result.sparse))
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    chosen = Recipe(
        tokens=args.tokens,
        generated_share=args.generated,
        l1_peak=args.l1,
        l1_reduction=args.l1_reduction,
        seed=args.seed,
    )
    return replace(chosen, quantise_from=1.0) if args.no_quantise else chosen


def _check_out(out: Path) -> None:
    """Refuse, before minutes of work, an `--out` that cannot be written or holds something else."""
    if out.exists() and not out.is_dir():
        raise InputError("is a file", where=out, fix="name a folder in --out")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise InputError(
            "this folder holds something else than a checkpoint", where=out, fix="name another folder"
        )
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(error.strerror or str(error), where=parent) from error
    if not os.access(parent, os.W_OK):
        raise StorageError("no permission to write here", where=parent)


def _summary(args: argparse.Namespace, recipe: Recipe, result: Result) -> dict[str, object]:
    return {
        "method": args.method,
        "text": args.text,
        "recipe": asdict(recipe),
        "perplexity_dense": result.dense.perplexity,
        "perplexity_sparse": result.sparse.perplexity,
        "heldout_tokens": result.sparse.tokens,
        "sparsity": result.sparse.mean_sparsity,
        "sparsity_per_layer": result.sparse.sparsity,
    }
