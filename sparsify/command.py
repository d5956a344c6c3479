"""`hotcold sparsify`: from a dense model to an HF checkpoint of a sparsely activated one."""

from __future__ import annotations

import argparse
from pathlib import Path

from hotcold.sparsify.config import REDUCTIONS, recipes
from hotcold.sparsify.methods import METHODS, run_method, shared_by
from hotcold.sparsify.methods.relu import DEFAULT_GENERATED, DEFAULT_L1, DEFAULT_TOKENS

HELP = (
    "Replace the FFN activation by a sparse one and train the model until it works with it. --method relu "
    "takes minutes on a CPU for a small model; --method prosparse does what a config file says, on any "
    "number of GPUs (start it with `accelerate launch` or `torchrun`); --method cats trains nothing: it "
    "keeps SiLU or GELU and makes the smallest values zero; nor does --method teal, by which matrices "
    "leave out their smallest inputs; --method pretrained takes trained FFNs of smollm2, where a version of "
    "hotcold comes with them. Interrupted, it goes on where it stopped when it is run again."
)
EXAMPLE = "hotcold sparsify --model smollm2 --method relu --out sparse-smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all methods; those that are left out keep the method's defaults."""
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="Hugging Face directory, .gguf file, hub id, or smollm2")
    add("--method", default="relu", metavar="NAME", help=f"{' | '.join(METHODS)} (default: %(default)s)")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the sparse checkpoint")
    add(
        "--work", type=Path, metavar="DIR",
        help="working folder, needed to resume (default: OUT.training)",
    )  # fmt: skip
    add(
        "--config", metavar="FILE",
        help=f"for --method prosparse: a YAML file, or one of {', '.join(recipes())}",
    )  # fmt: skip
    add(
        "--dry-run",
        action="store_const",
        const=True,
        help="print stages, tokens, memory, and time, and exit",
    )
    add(
        "--sparsity", type=float, metavar="S",
        help=f"for --method {shared_by('sparsity')}: the share of values or inputs to make zero, say 0.5",
    )  # fmt: skip
    add = parser.add_argument_group(f"for --method {shared_by('text')}").add_argument
    add(
        "--text", metavar="SRC",
        help="file, glob, data set id, or stdlib, the text that comes with Python (default: stdlib)",
    )  # fmt: skip
    add(
        "--tokens", type=int, metavar="N",
        help="tokens to train on, in all phases together, or to take thresholds from; the time goes with it "
        f"(default: {DEFAULT_TOKENS}, or 8192)",
    )  # fmt: skip
    add = parser.add_argument_group(f"for --method {shared_by('l1')}").add_argument
    add(
        "--generated", type=float, metavar="SHARE",
        help=f"share of the tokens that the dense model generates (default: {DEFAULT_GENERATED})",
    )  # fmt: skip
    add(
        "--l1", type=float, metavar="PEAK",
        help=f"final factor of the L1 term; higher is sparser and less accurate (default: {DEFAULT_L1})",
    )  # fmt: skip
    add(
        "--l1-reduction", metavar="R",
        help=f"how the L1 norm is reduced: {' | '.join(REDUCTIONS)} (default: mean)",
    )  # fmt: skip
    add(
        "--no-quantize", dest="quantize", action="store_const", const=False,
        help="do not train for the rounding of Q4_0",
    )  # fmt: skip
    add("--seed", type=int, metavar="S", help="random seed for sampling and shuffling (default: 0)")
    add = parser.add_argument_group(f"for --method {shared_by('sites')}").add_argument
    add(
        "--sites", metavar="LIST",
        help="where inputs are left out (default: qkv,o,gate_up,down)",
    )  # fmt: skip
    add(
        "--score", metavar="NAME",
        help="what tells small inputs: magnitude | wina, which weighs them by what they are multiplied by "
        "(default: magnitude)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Sparsify, save, and print the summary table."""
    return run_method(args)
