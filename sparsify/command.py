"""`hotcold sparsify`: from a dense model to an HF checkpoint of a sparsely activated one."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hotcold.cpus import torch_threads
from hotcold.errors import InputError
from hotcold.ownership import beside, check_growing, check_replaceable
from hotcold.sparsify.config import REDUCTIONS, Config, load_config, recipes
from hotcold.sparsify.methods.relu import DEFAULT_GENERATED, DEFAULT_L1, DEFAULT_TOKENS, relu_config

if TYPE_CHECKING:
    from hotcold.sparsify.methods.prosparse import Result

HELP = (
    "Replace the FFN activation by a sparse one and train the model until it works with it. --method relu "
    "takes minutes on a CPU for a small model; --method prosparse does what a config file says, on any "
    "number of GPUs (start it with `accelerate launch` or `torchrun`); --method pretrained takes trained "
    "FFNs of smollm2, where a version of hotcold comes with them; --method teal trains nothing: matrices "
    "leave out their smallest inputs. Interrupted, it goes on where it stopped when it is run again."
)
EXAMPLE = "hotcold sparsify --model smollm2 --method relu --out sparse-smollm2"

METHODS = ("relu", "prosparse", "pretrained", "teal")
_QUICK = ("text", "tokens", "generated", "l1", "l1_reduction", "quantize", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; those of --method relu that are left out keep its defaults."""
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="HF directory, .gguf file, hub id, or smollm2")
    add("--method", default="relu", metavar="NAME", help=f"{' | '.join(METHODS)} (default: %(default)s)")
    add("--out", required=True, type=Path, metavar="DIR", help="where the HF checkpoint goes")
    add(
        "--work", type=Path, metavar="DIR",
        help="folder for what it takes to go on after a kill (default: OUT.training)",
    )  # fmt: skip
    add(
        "--config", metavar="FILE",
        help=f"for --method prosparse: a YAML file, or one of {', '.join(recipes())}",
    )  # fmt: skip
    add("--dry-run", action="store_true", help="print stages, tokens, memory and time, and do nothing")
    quick = parser.add_argument_group("for --method relu")
    add = quick.add_argument
    add(
        "--text", metavar="SRC",
        help="file, glob, data set id, or stdlib, the text that Python carries (default: stdlib)",
    )  # fmt: skip
    add(
        "--tokens", type=int, metavar="N",
        help=f"tokens to train on, in all phases together; the time goes with it (default: {DEFAULT_TOKENS})",
    )  # fmt: skip
    add(
        "--generated", type=float, metavar="SHARE",
        help=f"share of them from text that the dense model writes itself (default: {DEFAULT_GENERATED})",
    )  # fmt: skip
    add(
        "--l1", type=float, metavar="PEAK",
        help=f"final factor of the L1 term: higher is sparser and less exact (default: {DEFAULT_L1})",
    )  # fmt: skip
    add(
        "--l1-reduction", metavar="R",
        help=f"over what the L1 norm is averaged: {' | '.join(REDUCTIONS)} (default: mean)",
    )  # fmt: skip
    add(
        "--no-quantize", dest="quantize", action="store_const", const=False,
        help="do not train for the rounding of Q4_0",
    )  # fmt: skip
    add("--seed", type=int, metavar="S", help="of sampling and shuffling (default: 0)")
    inputs = parser.add_argument_group("for --method teal, which takes --text and --tokens too")
    add = inputs.add_argument
    add("--sparsity", type=float, metavar="SHARE", help="of inputs to leave out, at each site and layer")
    add(
        "--sites", default="qkv,o,gate_up,down", metavar="LIST",
        help="where inputs are left out (default: %(default)s)",
    )  # fmt: skip
    add(
        "--score", default="magnitude", metavar="NAME",
        help="what tells small inputs: magnitude | wina, which weighs them by what they are multiplied by "
        "(default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Sparsify, save, and print the summary table."""
    config = None if args.method == "teal" else _config(args)
    check_replaceable(args.out, "checkpoint", [args.model])
    torch_threads()
    if config is None:
        from hotcold.sparsify.methods import teal

        return teal.run(args)
    if args.method == "pretrained":
        return _unpack(args)
    if args.dry_run:
        from hotcold.sparsify.training.plan import plan

        print(plan(args.model, config))
        return 0
    check_growing(_work_path(args), "training", [args.model])

    from hotcold.model import checkpoint
    from hotcold.sparsify.measure.evaluate import table
    from hotcold.sparsify.methods.prosparse import prosparse
    from hotcold.sparsify.standalone import standalone_files
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


def _config(args: argparse.Namespace) -> Config:
    """What the arguments ask for. InputError for an unknown method, and for options of another one."""
    if args.method not in METHODS:
        raise InputError("unknown method", where="--method", got=args.method, expected=" | ".join(METHODS))
    if args.dry_run and args.method == "pretrained":
        raise InputError("there is nothing to plan", where="--method", got=args.method)
    quick = {name: getattr(args, name) for name in _QUICK if getattr(args, name) is not None}
    if args.method != "prosparse" and args.config is not None:
        raise InputError("is for another method", where="--config", fix="add --method prosparse")
    if args.method == "relu":
        return relu_config(**quick)
    if args.config is None and args.method == "prosparse":
        known = " | ".join(recipes())
        raise InputError("--method prosparse needs a config", expected=f"--config FILE or one of {known}")
    if quick:
        option = "--no-quantize" if "quantize" in quick else f"--{next(iter(quick)).replace('_', '-')}"
        fix = f"say it in {args.config}" if args.config else None
        raise InputError("is for --method relu", where=option, fix=fix)
    return load_config(args.config) if args.config else Config()


def _unpack(args: argparse.Namespace) -> int:
    """Put the trained FFNs into the dense model, and print what its card says of it."""
    from hotcold.model import checkpoint
    from hotcold.shipped import CARD
    from hotcold.sparsify.methods.pretrained import unpack

    dense = checkpoint.load_model(args.model)
    sparse = unpack(dense, checkpoint.fingerprint(args.model))
    tokenizer, files = checkpoint.load_tokenizer(args.model), {"README.md": CARD.read_bytes()}
    checkpoint.save(sparse.half(), tokenizer, args.out, like=args.model, files=files)
    print(f"{args.out}: how it was made and what it scores says {args.out / 'README.md'}")
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
