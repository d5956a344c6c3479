"""Write a bundle: the dense and the sparse GGUF file of a model, its predictors, tokenizer and a manifest.

Everything is checked before the first byte is written, and the folder appears as a whole or not at all.
Weights pass through one tensor at a time, so that memory does not grow with the model.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from hotcold import storage
from hotcold.convert.bundle.input_rows import score_weights
from hotcold.convert.bundle.layout import ExportOptions, GGUFLayout, ModelFiles
from hotcold.convert.bundle.manifest import MANIFEST, BundleFile, Manifest
from hotcold.convert.bundle.predictors import check_predictors
from hotcold.convert.gguf.llama_cpp import differences, is_exact
from hotcold.convert.gguf.write import write_gguf
from hotcold.convert.powerinfer.model import runs_in_powerinfer
from hotcold.errors import InputError, UnsupportedError
from hotcold.model.huggingface import WeightSource
from hotcold.model.spec import ModelSpec
from hotcold.model.tokenizer.files import tokenizer_files
from hotcold.model.weights import check_weights
from hotcold.ownership import check_replaceable
from hotcold.predictor.bundle import FILES, PredictorBundle
from hotcold.progress import log

__all__ = ["ExportOptions", "copy_file", "export_bundle", "export_file"]

_CHUNK = 1 << 20
_NAME = re.compile(r"\w[\w.+ -]*")


def export_bundle(
    source: WeightSource,
    out: str | Path,
    *,
    name: str,
    fingerprint: str,
    folder: Path | None = None,
    predictors: PredictorBundle | None = None,
    options: ExportOptions | None = None,
) -> dict[str, Any]:
    """Write the bundle `out` and return its manifest.

    `folder` is the HF directory with the tokenizer and config files; without one the files hold no
    vocabulary. The form by neurons is written for a model that gives exact zeros; without `predictors` it
    serves `exact` mode alone.

    Raises UnsupportedError (unknown model, activation or quantization), ShapeError or MismatchError
    (predictors of another model, tensors that do not fit the config), StorageError (the disk does not take
    it, or `out` is something else than a bundle as hotcold wrote it). `out` is then as it was.
    """
    if not _NAME.fullmatch(name):
        raise InputError("not a plain file name", where="name", got=repr(name))
    check_replaceable(out, "bundle", [folder] if folder else [])
    model, layouts = _planned(source, name, fingerprint, folder, predictors, options or ExportOptions())
    for line in _limits(model, layouts, predictors):
        log(line)
    with storage.atomic_directory(out, "bundle") as target:
        manifest = _write(model, layouts, predictors, target, source.quantized_types)
        storage.write_json(target / MANIFEST, manifest.to_json())
    return manifest.to_json()


def export_file(
    source: WeightSource,
    out: str | Path,
    role: str,
    *,
    name: str,
    fingerprint: str,
    folder: Path | None = None,
    predictors: PredictorBundle | None = None,
    options: ExportOptions | None = None,
) -> None:
    """Write one GGUF file of a bundle, that of `role` `dense` or `sparse`, as `out`; raises as above."""
    model, layouts = _planned(source, name, fingerprint, folder, predictors, options or ExportOptions())
    if role == "sparse" and not model.spec.is_sparse:
        raise _never_zero("no sparse file can be written", model.spec)
    for layout in layouts:
        if layout.role == role:
            for line in _limits(model, [layout], predictors):
                log(line)
            write_gguf(out, layout.metadata, layout.plans, magic=layout.magic)


def _planned(
    source: WeightSource,
    name: str,
    fingerprint: str,
    folder: Path | None,
    predictors: PredictorBundle | None,
    options: ExportOptions,
) -> tuple[ModelFiles, list[GGUFLayout]]:
    """Check that the parts match, and log what cannot be written as requested."""
    spec = ModelSpec.from_config(source.config)
    check_weights(source, spec)
    if predictors is not None:
        _check_predictors(predictors, spec, fingerprint)
    model = ModelFiles(spec, source.config, options, name, fingerprint, folder, source.load)
    layouts, fallbacks = model.layouts(predictors, sparse=spec.is_sparse)
    weights = score_weights(spec, source.load)
    layouts = [replace(layout, metadata=layout.metadata | weights) for layout in layouts]
    if types := source.quantized_types:
        log(f"the source is quantized ({', '.join(types)}); its rounding errors carry over to the output")
    for line in fallbacks:
        log(line)
    return model, layouts


def _check_predictors(predictors: PredictorBundle, spec: ModelSpec, fingerprint: str) -> None:
    if not spec.is_sparse:
        raise _never_zero("there is nothing to predict", spec)
    check_predictors(predictors, spec, fingerprint)


def _never_zero(so: str, spec: ModelSpec) -> UnsupportedError:
    what, expected = f"this activation is never zero, so {so}", "an activation that gives zeros"
    return UnsupportedError(what, got=spec.activation, expected=expected, fix="sparsify it first")


def _limits(model: ModelFiles, layouts: list[GGUFLayout], predictors: PredictorBundle | None) -> list[str]:
    """What other programs cannot do with these files."""
    spec, lines = model.spec, []
    files = {layout.role: layout.file for layout in layouts}
    if "dense" in files and (found := differences(spec)):
        what = f"llama.cpp will compute a different function: {' and '.join(found)}"
        measure = "`hotcold perplexity --mode llama.cpp --reference dense` measures the difference"
        lines.append(f"{files['dense']}: {what}; {measure}")
    if "sparse" in files and predictors is None:
        what = "no predictors: hotcold can run it in exact mode, PowerInfer cannot run it"
        lines.append(f"{files['sparse']}: {what}")
    elif "sparse" in files and not predictors.kind.in_powerinfer:
        lines.append(f"{files['sparse']}: PowerInfer itself knows no {predictors.kind.name} predictors")
    elif "sparse" in files and not runs_in_powerinfer(spec, model.options.types().body):
        lines.append(f"{files['sparse']}: PowerInfer can only run its own ReLU models, in f16 or q4_0")
    return lines


def _write(
    model: ModelFiles,
    layouts: list[GGUFLayout],
    predictors: PredictorBundle | None,
    target: Path,
    source_types: list[str],
) -> Manifest:
    roles = {}
    for layout in layouts:
        write_gguf(target / layout.file, layout.metadata, layout.plans, magic=layout.magic)
        roles[layout.file] = layout.role
    if predictors is not None:
        predictors.write_files(target / "predictors")
        roles |= {f"predictors/{name}": "predictor" for name in FILES}
    if model.folder is not None:
        roles |= _copy(tokenizer_files(model.folder), model.folder, target, "tokenizer")
    storage.write_json(target / "config.json", model.config)
    roles["config.json"] = "config"
    return Manifest(
        name=model.name,
        quant=model.options.quant,
        head_quant=model.options.head,
        predictor_quant=model.options.predictor_quant,
        hot_frequency=float(model.options.hot_frequency),
        activation=model.spec.activation,
        model_fingerprint=model.fingerprint,
        llama_cpp_exact=is_exact(model.spec),
        llama_cpp_differences=differences(model.spec),
        source_quantized=source_types,
        files={path: BundleFile.of(target / path, role) for path, role in roles.items()},
    )


def _copy(files: list[Path], source: Path, folder: Path, role: str) -> dict[str, str]:
    """Copy files of a folder durably into a bundle; returns their paths in it with their role."""
    names = [file.relative_to(source).as_posix() for file in files]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        copy_file(source / name, folder / name)
    return dict.fromkeys(names, role)


def copy_file(source: Path, target: str | Path) -> None:
    """Copy a file durably. StorageError if the write fails."""
    with storage.atomic_file(target) as file, source.open("rb") as content:
        while chunk := content.read(_CHUNK):
            storage.fs.write(file, chunk)
