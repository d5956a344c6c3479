"""`hotcold export`: a model and its predictors become a bundle of GGUF files."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hotcold.errors import InputError
from hotcold.ownership import check_replaceable

if TYPE_CHECKING:
    from hotcold.model.huggingface import WeightSource

HELP = (
    "Write a model as a bundle: a dense GGUF file for llama.cpp and a sparse one for hotcold and PowerInfer."
)
EXAMPLE = "hotcold export --model sparse/ --predictors predictors/ --quant q4_0 --out bundle/"

_QUANTS = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face directory, .gguf file, hub id, or smollm2")
    add(
        "--predictors",
        type=Path,
        metavar="DIR",
        help="predictor bundle; without one, the bundle has no predicted mode",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="the bundle to write")
    add("--quant", default="q4_0", choices=_QUANTS, help="type of the weight matrices (default: %(default)s)")
    add("--head-quant", choices=_QUANTS, help="type of the embedding and head (default: same as --quant)")
    add(
        "--predictor-quant",
        default="q8_0",
        choices=_QUANTS,
        help="type of the predictors (default: %(default)s)",
    )
    add("--name", help="base name of the files (default: the model's name)")
    add(
        "--hot-frequency", type=float, default=0.5, metavar="SHARE",
        help="always compute neurons that fire on at least this share of tokens (default: %(default)s)",
    )  # fmt: skip
    add(
        "--attention-rows",
        action="store_true",
        help="also write the attention matrices by input, which --input-sparsity of other commands needs",
    )


def run(args: argparse.Namespace) -> int:
    """Write the bundle and list its files on stdout."""
    from hotcold.convert.bundle.export import ExportOptions, export_bundle
    from hotcold.model.checkpoint import fingerprint, resolve
    from hotcold.predictor.bundle import PredictorBundle

    if not 0 < args.hot_frequency < math.inf:
        raise InputError("must be above 0", where="--hot-frequency", got=args.hot_frequency)
    path = Path(resolve(args.model))
    check_replaceable(args.out, "bundle", [path, *([args.predictors] if args.predictors else [])])
    options = ExportOptions(
        args.quant, args.head_quant, args.predictor_quant, args.hot_frequency, args.attention_rows
    )
    predictors = PredictorBundle.load(args.predictors) if args.predictors else None
    with _source(args.model, path) as (source, folder):
        manifest = export_bundle(
            source,
            args.out,
            name=args.name or (path.stem if path.is_file() else path.resolve().name),
            fingerprint=fingerprint(args.model),
            folder=folder,
            predictors=predictors,
            options=options,
        )
    for name, file in manifest["files"].items():
        print(f"{file['bytes']:15,} bytes  {file['role']:<10}{args.out / name}")
    return 0


@contextmanager
def _source(model: str, path: Path) -> Iterator[tuple[WeightSource, Path]]:
    """The model's weights, and a folder with its tokenizer files: for a GGUF file, one for the time being."""
    if path.is_dir():
        from hotcold.model.huggingface import HFCheckpoint

        yield HFCheckpoint(path), path
        return
    import tempfile

    from hotcold.model.checkpoint import load_tokenizer, save_tokenizer
    from hotcold.model.gguf_checkpoint import GGUFCheckpoint

    with tempfile.TemporaryDirectory() as temporary:
        save_tokenizer(load_tokenizer(model), Path(temporary), like=model)
        yield GGUFCheckpoint(path), Path(temporary)
