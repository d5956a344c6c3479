"""`hotcold sparsify` with a method that trains: dry run, working folder, training, checkpoint, table."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hotcold.cpus import torch_threads
from hotcold.ownership import beside, check_growing, check_replaceable
from hotcold.sparsify.config import Config

if TYPE_CHECKING:
    from hotcold.sparsify.methods.prosparse import Result

__all__ = ["train"]


def train(args: argparse.Namespace, config: Config) -> int:
    """Train as `config` says, save, and print the summary table; or print the plan alone."""
    check_replaceable(args.out, "checkpoint", [args.model])
    torch_threads()
    if args.dry_run:
        from hotcold.sparsify.training.plan import plan

        print(plan(args.model, config))
        return 0
    check_growing(_work_path(args), "training", [args.model])

    from hotcold.model import checkpoint
    from hotcold.model.standalone import standalone_files
    from hotcold.sparsify.measure.evaluate import table
    from hotcold.sparsify.methods.prosparse import prosparse
    from hotcold.sparsify.training.memory import keep_big_buffers
    from hotcold.sparsify.training.records import Records

    keep_big_buffers()
    work = _work_folder(args, config)
    tokenizer = checkpoint.load_tokenizer(args.model)
    with Records(work.path / "tensorboard") as records:
        result = prosparse(lambda: checkpoint.load_model(args.model), tokenizer, config, work, records.add)
    if result is None:
        return 0
    files = {
        "training.jsonl": work.log_path.read_bytes(),
        "sparsify.json": (json.dumps(_summary(args, config, result), indent=2) + "\n").encode(),
    }
    files |= standalone_files(result.model)
    # Half the size, and Q4_0 makes the same blocks of these weights as of the float32 ones.
    checkpoint.save(result.model.half(), tokenizer, args.out, like=args.model, files=files)
    print(table(result.dense, result.sparse))
    return 0


def _work_folder(args: argparse.Namespace, config: Config):  # noqa: ANN202 - imported here only
    from hotcold.model import checkpoint
    from hotcold.sparsify.methods.prosparse import PHASES
    from hotcold.sparsify.training.state import WorkFolder
    from hotcold.text import PARTS

    identity = {"model": checkpoint.fingerprint(args.model), "config": config.digest()}
    identity["text_parts"] = " ".join(PARTS)  # an older run counted its documents in other parts
    return WorkFolder(_work_path(args), identity, PHASES, config.checkpoints.keep)


def _work_path(args: argparse.Namespace) -> Path:
    return args.work or beside(args.out, ".training")


def _summary(args: argparse.Namespace, config: Config, result: Result) -> dict[str, object]:
    return {
        "method": args.method,
        "config": asdict(config),
        "perplexity_dense": result.dense.perplexity,
        "perplexity_sparse": result.sparse.perplexity,
        "heldout_tokens": result.sparse.tokens,
        "sparsity": result.sparse.mean_sparsity,
        "sparsity_per_layer": result.sparse.sparsity,
    }
