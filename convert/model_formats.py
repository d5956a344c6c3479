"""The formats that hold a whole model: bundles, PowerInfer's and llama.cpp's GGUF files, HF checkpoints.

Whichever it is, the model passes on as a `WeightSource`, so that all of them are written by the exporter.
Matrices that were quantized keep their type: decoding them and quantizing again gives the same bytes,
except for the down projection where it has to be transposed. Files of a bundle that are asked for as they
are, are copied.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from hotcold.convert.bundle.export import ExportOptions, copy_file, export_bundle, export_file
from hotcold.convert.bundle.input_rows import ATTENTION
from hotcold.convert.bundle.manifest import Manifest
from hotcold.convert.gguf.parts import Model, Options, Parts
from hotcold.convert.powerinfer.model import check_in_powerinfer, hot_sets, sparse_predictors
from hotcold.errors import FormatError, InputError
from hotcold.files.gguf import GGUFFile
from hotcold.files.gguf_split import gguf_sha256, open_gguf
from hotcold.files.quantize import QUANTS
from hotcold.model.families import names_in
from hotcold.model.gguf_checkpoint import GGUFCheckpoint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.predictor.bundle import PredictorBundle
from hotcold.progress import log

__all__ = [
    "bytes_per_neuron",
    "read_bundle",
    "read_checkpoint",
    "read_gguf",
    "write_bundle",
    "write_dense",
    "write_sparse",
]


def read_bundle(path: Path, parts: Parts, options: Options, stack: ExitStack) -> None:
    """Add a bundle's model and its predictors."""
    manifest = Manifest.read(path)
    roles = {"powerinfer": "sparse", "gguf": "dense"}
    ready = {format: path / name for format, role in roles.items() for name in manifest.of_role(role)}
    if not ready:
        raise FormatError("the bundle has no GGUF files", where=path)
    file = next(iter(ready.values()))
    own = PredictorBundle.load(path / "predictors") if manifest.of_role("predictor") else None
    weights, fingerprint = partial(GGUFCheckpoint, file), manifest.model_fingerprint
    rows = bool(manifest.of_role(ATTENTION))
    parts.model = Model(weights, manifest.name, fingerprint, path, open_gguf(file), ready, own, rows)
    parts.bundle = own or parts.bundle


def read_gguf(path: Path, parts: Parts, options: Options, stack: ExitStack) -> None:
    """Add the model of a GGUF file, dense or sparse, and its predictors if it has some."""
    file = open_gguf(path)
    fingerprint = file.find("hotcold.model_fingerprint", str) or gguf_sha256(file)
    own = sparse_predictors(file, fingerprint)
    name = path.name.removesuffix(".gguf").removesuffix(".powerinfer")
    folder = _unpacked_tokenizer(path, file, stack)
    parts.model = Model(partial(GGUFCheckpoint, path), name, fingerprint, folder, file, {}, own)
    parts.bundle = own or parts.bundle


def _unpacked_tokenizer(path: Path, file: GGUFFile, stack: ExitStack) -> Path | None:
    """A folder with the tokenizer's files, which lasts as long as the stack; None for a file without one."""
    from hotcold.model.checkpoint import load_tokenizer, save_tokenizer

    if file.find("tokenizer.ggml.model", str, "none") == "none":
        return None
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotcold-tokenizer-")))
    save_tokenizer(load_tokenizer(str(path)), folder, like=str(path))
    return folder


def read_checkpoint(path: Path, parts: Parts, options: Options, stack: ExitStack) -> None:
    """Add the model of a Hugging Face directory."""
    from hotcold.model.checkpoint import fingerprint

    parts.model = Model(partial(HFCheckpoint, path), path.resolve().name, fingerprint(str(path)), path)


def write_bundle(parts: Parts, out: Path, options: Options) -> None:
    """Write a bundle, with predictors where a source has some."""
    model = parts.need_model()
    predictors = parts.need_predictors(options) if parts.bundle else None
    _say_if_hot_is_lost(model, predictors)
    export_bundle(model.weights(), out, predictors=predictors, **_common(model, options))


def write_sparse(parts: Parts, out: Path, options: Options) -> None:
    """Write PowerInfer's file, for `exact` mode alone where no source has predictors."""
    model, own = parts.need_model(), parts.bundle is not None and parts.firing is None
    if parts.bundle is not None:
        check_in_powerinfer(parts.bundle)
    own = own and parts.bundle is model.predictors and options.hot_frequency is None
    if own and _copied(model, "powerinfer", out, options):
        return
    predictors = parts.need_predictors(options) if parts.bundle else None
    _say_if_hot_is_lost(model, predictors)
    export_file(model.weights(), out, "sparse", predictors=predictors, **_common(model, options))


def write_dense(parts: Parts, out: Path, options: Options) -> None:
    """Write the file for stock llama.cpp."""
    model = parts.need_model()
    if not _copied(model, "gguf", out, options):
        export_file(model.weights(), out, "dense", **_common(model, options))


def _say_if_hot_is_lost(model: Model, predictors: PredictorBundle | None) -> None:
    """Log if the source has hot neurons but no firing frequencies, from which the output is computed."""
    if predictors is None or model.file is None or predictors.layers[0].firing_frequency is not None:
        return
    if any(len(hot) for hot in hot_sets(model.file, len(predictors.layers))):
        what = "lists hot neurons, but no firing frequencies"
        log(f"{model.file.path.name}: {what}; the output has no hot neurons unless a source has them")


def _common(model: Model, options: Options) -> dict[str, Any]:
    """What all exports take."""
    name, exported = options.name or model.name, _export_options(model, options)
    return {"name": name, "fingerprint": model.fingerprint, "folder": model.folder, "options": exported}


def _copied(model: Model, format: str, out: Path, options: Options) -> bool:
    """Copy the file, if a bundle has it and nothing about it is to be changed."""
    changes = (options.quant, options.head_quant, options.predictor_quant, options.name)
    if format not in model.ready or any(changes):
        return False
    copy_file(model.ready[format], out)
    return True


def _export_options(model: Model, options: Options) -> ExportOptions:
    """Options that are not set keep the source's values."""
    default = ExportOptions()
    body = options.quant or _type_of(model.file, "up") or "f16"
    head = options.head_quant or options.quant or _type_of(model.file, "embedding") or body
    predictor = options.predictor_quant or _type_of(model.file, "fc2") or default.predictor_quant
    frequency = default.hot_frequency if options.hot_frequency is None else options.hot_frequency
    return ExportOptions(body, head, predictor, frequency, options.attention_rows or model.attention_rows)


def _type_of(file: GGUFFile | None, slot: str) -> str | None:
    """The quantization of a matrix: the nearest better one if hotcold does not write its own."""
    kinds = {kind: quant for quant, kind in QUANTS.items()}
    for suffix in (".weight", "_exps.weight"):
        name = "" if file is None else names_in(file)[slot].format(0) + suffix
        if file is not None and name in file.tensors:
            return kinds.get(file.tensors[name].type, "q8_0")
    return None


def bytes_per_neuron(model: Model) -> int:
    """Bytes of one neuron's rows of gate, up and down; InputError if the model is in no GGUF file."""
    if model.file is None:
        fix = "add the GGUF file as a source"
        raise InputError("the size of a neuron is unknown", fix=fix)
    slots, names = ("gate", "up", "down"), names_in(model.file)
    ends = ("", "_exps", "_t")
    names = {f"{names[slot].format(0)}{end}.weight" for slot in slots if slot in names for end in ends}
    total = sum(tensor.data.nbytes for name, tensor in model.file.tensors.items() if name in names)
    architecture = model.file.require("general.architecture", str)
    return total // model.file.require(f"{architecture}.feed_forward_length", int)
