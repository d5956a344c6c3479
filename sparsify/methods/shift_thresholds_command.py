"""`hotcold shift-thresholds`: more zeros without training, as far as perplexity allows."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hotcold.cpus import torch_threads
from hotcold.errors import InputError
from hotcold.ownership import beside, check_file, check_replaceable

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedModel

    from hotcold.sparsify.methods.shift_thresholds import Point
    from hotcold.text import Part

HELP = (
    "Raise the threshold below which a gate counts as zero (FATReLU, ProSparse's third step). For each "
    "threshold, print sparsity and perplexity on the calibrate part of a text, and save the model with the "
    "sparsest one within the perplexity budget. Its figures on the test part, which was not used to choose "
    "it, are printed below. If interrupted, run the same command again to continue."
)
EXAMPLE = "hotcold shift-thresholds --model sparse --budget 1.01 --out sparser"

_GLOBAL = "0,0.002,0.005,0.01,0.02,0.03,0.05,0.08,0.12,0.2"
_SHARES = "0,0.0003,0.001,0.002,0.004,0.007,0.012,0.02,0.035"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold shift-thresholds`."""
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="a ReLU model: HF directory or hub id")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the new checkpoint")
    add(
        "--budget", type=float, default=1.01, metavar="X",
        help="largest allowed factor on perplexity (default: %(default)s)",
    )  # fmt: skip
    add(
        "--per-layer", action="store_true",
        help="use one threshold per layer, with equal output errors, instead of one for all layers",
    )  # fmt: skip
    add(
        "--try", dest="knobs", metavar="LIST",
        help=f"thresholds to try (default: {_GLOBAL}), or with --per-layer shares of the output's variance "
        f"(default: {_SHARES})",
    )  # fmt: skip
    add(
        "--top", type=float, default=0.25, metavar="T",
        help="with --per-layer: the largest threshold; others are T/2, T/4, … T/64 (default: %(default)s)",
    )  # fmt: skip
    add(
        "--text", default="stdlib", metavar="SRC",
        help="its calibrate part chooses, its test part is reported: file, glob, data set id or stdlib "
        "(default)",
    )  # fmt: skip
    add("--tokens", type=int, default=8192, metavar="N", help="tokens of each part (default: %(default)s)")
    add("--window", type=int, default=512, metavar="N", help="tokens per window (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure the curve, print it, and save the chosen model."""
    knobs = _knobs(args.knobs or (_SHARES if args.per_layer else _GLOBAL))
    if args.budget < 1:
        raise InputError("must be a factor on perplexity", where="--budget", got=args.budget, expected=">= 1")
    check_replaceable(args.out, "checkpoint", [args.model])
    check_file(_curve(args), "curve")

    torch_threads()
    from hotcold.model import checkpoint
    from hotcold.model.limits import check_tokenizer
    from hotcold.sparsify.methods.shift_thresholds import best, curve, per_layer, tail_errors
    from hotcold.sparsify.training.attention import use_grouped_attention
    from hotcold.sparsify.training.memory import keep_big_buffers

    keep_big_buffers()
    tokenizer = checkpoint.load_tokenizer(args.model)
    windows, test = (_windows(args, tokenizer, part) for part in ("calibrate", "test"))
    model = checkpoint.load_model(args.model)
    check_tokenizer(tokenizer, model)
    use_grouped_attention(model)
    n = model.config.num_hidden_layers
    settings = [(knob, [knob] * n) for knob in knobs]
    if args.per_layer:
        errors = tail_errors(model, windows, args.top)
        settings = [(knob, per_layer(errors, args.top, knob) if knob else [0.0] * n) for knob in knobs]
    fingerprint = checkpoint.fingerprint(args.model)
    points = curve(model, windows, settings, *_journal(args, fingerprint, "calibrate"))
    chosen = best(points, args.budget)
    reported = {point.knob: point.thresholds for point in (points[0], chosen)}  # one, where nothing is gained
    tested = curve(model, test, reported.items(), *_journal(args, fingerprint, "test"))
    print(f"{_table(points, chosen, args)}\n{_test_line(tested[0], tested[-1])}")
    _save(args, model, tokenizer, points, chosen, tested)
    return 0


def _windows(args: argparse.Namespace, tokenizer: Tokenizer, part: Part) -> Tensor:
    from hotcold import text
    from hotcold.sparsify.training.data import read_windows

    documents = text.documents(args.text, part)
    return read_windows(documents, tokenizer, args.window, args.tokens, f"{args.text}, {part} part")


def _knobs(given: str) -> list[float]:
    """The list of an option, with 0 first: that is what others are compared with."""
    try:
        knobs = sorted({0.0, *map(float, given.split(","))})
    except ValueError as error:
        raise InputError("not a comma-separated list of numbers", where="--try", got=given) from error
    if knobs[0] < 0:
        raise InputError("must not be negative", where="--try", got=knobs[0])
    return knobs


def _curve(args: argparse.Namespace) -> Path:
    """The journal of all points that were measured for this `--out`."""
    return beside(args.out, ".curve.jsonl")


def _journal(
    args: argparse.Namespace, fingerprint: str, part: str
) -> tuple[Callable[[float], Point | None], Callable[[Point], None]]:
    """Points of an earlier run with the same settings on this part, and where new ones are written."""
    from hotcold import storage
    from hotcold.files.json import read_json_lines
    from hotcold.progress import log
    from hotcold.sparsify.methods.shift_thresholds import Point

    path = _curve(args)
    run = [fingerprint, args.text, part, args.tokens, args.window, args.per_layer, args.top]
    points: dict[float, Point] = {}
    for entry in read_json_lines(path, skip_damaged=True):
        if entry.get("run") == run:
            try:
                points[entry["point"]["knob"]] = Point(**entry["point"])
            except (KeyError, TypeError):
                log(f"ignored: {path}: not a point of the curve")

    def write(point: Point) -> None:
        storage.append_line(path, json.dumps({"run": run, "point": asdict(point)}))

    return points.get, write


def _table(points: list[Point], chosen: Point, args: argparse.Namespace) -> str:
    knob = "share" if args.per_layer else "threshold"
    lines = [f"{knob:>9}  perplexity   ratio  sparsity"]
    for point in points:
        ratio = point.perplexity / points[0].perplexity
        mark = "  <- chosen" if point is chosen else ""
        lines.append(
            f"{point.knob:>9g}  {point.perplexity:>10.3f}  {ratio:>6.4f}  {point.sparsity:>7.2%}{mark}"
        )
    return "\n".join(lines)


def _test_line(unshifted: Point, chosen: Point) -> str:
    """What the choice is worth on text that took no part in it."""
    ratio = chosen.perplexity / unshifted.perplexity
    return (
        f"on the test part: perplexity {unshifted.perplexity:.3f} -> {chosen.perplexity:.3f} ({ratio:.4f}x), "
        f"sparsity {unshifted.sparsity:.2%} -> {chosen.sparsity:.2%}"
    )


def _save(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    points: list[Point],
    chosen: Point,
    tested: list[Point],
) -> None:
    from hotcold.model import checkpoint
    from hotcold.model.standalone import standalone_files
    from hotcold.sparsify.activations import set_activation
    from hotcold.sparsify.methods.shift_thresholds import fold

    common = fold(model, chosen.thresholds)
    set_activation(model, f"fatrelu_{common:.9g}" if common else "relu")
    content = {
        "budget": args.budget,
        "text": args.text,
        "chosen": asdict(chosen),
        "curve": list(map(asdict, points)),
        "test": {"unshifted": asdict(tested[0]), "chosen": asdict(tested[-1])},
    }
    files = {"thresholds.json": (json.dumps(content, indent=2) + "\n").encode()}
    files |= standalone_files(model)
    checkpoint.save(model.half(), tokenizer, args.out, like=args.model, files=files)
