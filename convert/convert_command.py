"""`hotcold convert`: between hotcold's formats, PowerInfer's and llama.cpp's."""

from __future__ import annotations

import argparse
from pathlib import Path

from hotcold.errors import InputError

HELP = """\
Convert models, predictors and firing statistics between the formats of hotcold, PowerInfer and llama.cpp.

  format       what it is                                needs               and gives
  bundle       hotcold's folder                          model               model, predictors
  powerinfer   PowerInfer's sparse GGUF file             model, predictors   model, predictors
  gguf         dense GGUF file for stock llama.cpp       model               model
  predictors   hotcold's predictor bundle, a folder      predictors          predictors, firing
  model-pt     PowerInfer's folder of model_N.pt         predictors          predictors
  activation   PowerInfer's folder of activation_N.pt    firing              firing
  gpuidx       PowerInfer's .generated.gpuidx            model, firing       firing (1: on GPU)
  traces       what collect-traces wrote                 (source only)       firing
  checkpoint   a Hugging Face folder                     (source only)       model

The format of each source is detected. Several sources complete each other: predictors, model-pt, and
activation take precedence over what a model brings along."""
EXAMPLE = "hotcold convert 7b/ 7b-Predictor/ --allow-pickle --to powerinfer --out 7b.powerinfer.gguf"

_QUANTS = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32"]
_TARGETS = ["bundle", "powerinfer", "gguf", "predictors", "model-pt", "activation", "gpuidx"]
_GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="SOURCE", help="file or folder in any of these formats")
    add("--to", required=True, choices=_TARGETS, help="the format to write")
    add("--out", required=True, type=Path, metavar="PATH", help="the file or folder to write")
    add("--allow-pickle", action="store_true", help="read .pt files, in a sandboxed process")
    add("--quant", choices=_QUANTS, help="type of the weight matrices (default: same as the source)")
    add("--head-quant", choices=_QUANTS, help="type of the embedding and head (default: same as the source)")
    add("--predictor-quant", choices=_QUANTS, help="type of the predictors (default: same as the source)")
    add(
        "--hot-frequency",
        type=float,
        metavar="SHARE",
        help="share of tokens from which on a neuron is hot (default: 0.5)",
    )
    add(
        "--counted-tokens",
        type=int,
        metavar="N",
        help="activation: number of tokens that the firing counts cover",
    )
    add("--vram-budget", type=float, metavar="GIB", help="gpuidx: GPU memory for neurons, in GiB")
    add("--attention-rows", action="store_true", help="bundle: also write the attention matrices by input")
    add("--name", help="the model's name in the files (default: same as the source)")


def run(args: argparse.Namespace) -> int:
    """Write the target and say where it is."""
    from hotcold.convert.conversions import convert
    from hotcold.convert.gguf.parts import Options

    for option, value in (
        ("--hot-frequency", args.hot_frequency),
        ("--counted-tokens", args.counted_tokens),
        ("--vram-budget", args.vram_budget),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise InputError("must be above 0", where=option, got=value)
    options = Options(
        pickles_allowed=args.allow_pickle, counted_tokens=args.counted_tokens,
        vram_budget=None if args.vram_budget is None else args.vram_budget * _GIB,
        quant=args.quant, head_quant=args.head_quant, predictor_quant=args.predictor_quant,
        hot_frequency=args.hot_frequency, name=args.name, attention_rows=args.attention_rows,
    )  # fmt: skip
    convert(args.sources, args.to, args.out, options)
    print(args.out)
    return 0
