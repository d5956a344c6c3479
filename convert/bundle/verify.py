"""Check a bundle: every byte against its manifest, then everything in it against everything else.

The second part works out anew, from the bundle's config, tokenizer and predictors, what the GGUF files must
hold, with the code that wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hotcold import storage
from hotcold.convert.bundle.input_rows import ATTENTION
from hotcold.convert.bundle.layout import ExportOptions, GGUFLayout, ModelFiles
from hotcold.convert.bundle.manifest import MANIFEST, BundleFile, Manifest
from hotcold.convert.bundle.predictors import check_predictors
from hotcold.convert.gguf.llama_cpp import differences, is_exact
from hotcold.errors import FormatError, HotcoldError, MismatchError, ShapeError
from hotcold.files.gguf import GGUFFile
from hotcold.files.gguf_split import open_gguf
from hotcold.files.json import read_json
from hotcold.model.inputs import least_inputs
from hotcold.model.spec import ModelSpec
from hotcold.model.tokenizer.files import tokenizer_files
from hotcold.predictor.bundle import FILES, PredictorBundle
from hotcold.progress import Progress

__all__ = ["verify_bundle"]


def verify_bundle(folder: str | Path) -> list[HotcoldError]:
    """All that is wrong with a bundle: nothing, or damaged files, or the first contradiction between them.

    Raises InputError if there is no manifest, FormatError if it is broken.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if damaged := list(_damaged(folder, manifest)):
        return damaged
    try:
        _check_content(folder, manifest)
    except HotcoldError as error:
        return [error]
    return []


def _damaged(folder: Path, manifest: Manifest) -> Iterator[HotcoldError]:
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    for name in sorted(present - {*manifest.files, MANIFEST}):
        yield FormatError("not listed in the manifest", where=folder / name)
    total = sum(file.bytes for file in manifest.files.values())
    with Progress("verify", total >> 20, "MB") as progress:
        seen = 0
        for name, file in manifest.files.items():
            seen += file.bytes
            yield from _damaged_file(folder / name, file)
            progress.advance((seen >> 20) - progress.done)


def _damaged_file(path: Path, file: BundleFile) -> Iterator[HotcoldError]:
    if path.is_symlink() or not path.is_file():
        yield FormatError("missing", where=path)
        return
    size = path.stat().st_size
    if size != file.bytes:
        yield FormatError("wrong size", where=path, field="bytes", got=size, expected=file.bytes)
        return
    digest = storage.sha256_file(path)
    if digest != file.sha256:
        yield FormatError("damaged", where=path, field="sha256", got=digest[:12], expected=file.sha256[:12])


def _check_content(folder: Path, manifest: Manifest) -> None:
    config = read_json(folder / "config.json")
    spec = ModelSpec.from_config(config, folder / "config.json")
    total = sum(file.bytes for file in manifest.files.values())
    if spec.n_vocab > total:  # whose tokens would fill the memory
        where = folder / "config.json"
        raise FormatError(
            "the vocabulary is larger than the file", where=where, field="vocab_size", got=spec.n_vocab
        )
    predicted = bool(manifest.of_role("predictor"))
    predictors = PredictorBundle.load(folder / "predictors") if predicted else None
    if predictors is not None:
        check_predictors(predictors, spec, manifest.model_fingerprint)
    tokenizer = tokenizer_files(folder)
    options = ExportOptions(
        manifest.quant,
        manifest.head_quant,
        manifest.predictor_quant,
        manifest.hot_frequency,
        attention_rows=bool(manifest.of_role(ATTENTION)),
    )
    model = ModelFiles(
        spec,
        config,
        options,
        manifest.name,
        manifest.model_fingerprint,
        folder if tokenizer else None,
        _no_weights,
    )
    # Bundles without predictors had no sparse file at first.
    sparse = spec.is_sparse and (predicted or bool(manifest.of_role("sparse")))
    layouts, _ = model.layouts(predictors, sparse=sparse)
    roles = {layout.file: layout.role for layout in layouts}
    roles |= {f"predictors/{name}": "predictor" for name in (FILES if predictors else [])}
    roles |= {path.relative_to(folder).as_posix(): "tokenizer" for path in tokenizer}
    roles |= {"config.json": "config"}
    where = folder / MANIFEST
    _same({path: file.role for path, file in manifest.files.items()}, roles, where, "files")
    _same(manifest.activation, spec.activation, where, "activation")
    _same(manifest.llama_cpp_exact, is_exact(spec), where, "llama_cpp_exact")
    _same(manifest.llama_cpp_differences, differences(spec), where, "llama_cpp_differences")
    for layout in layouts:
        file = open_gguf(folder / layout.file)
        _check_file(file, layout)
        least_inputs(file, spec)  # has the weights that the scores take


def _no_weights(name: str) -> NoReturn:
    raise RuntimeError(f"{name}: verifying reads no weights")


def _check_file(file: GGUFFile, layout: GGUFLayout) -> None:
    """Compare a file with what it should hold. Further metadata is allowed, further tensors are not."""
    _same(file.magic, layout.magic, file.path, "magic")
    for key, expected in layout.metadata.items():
        if key not in file.metadata:
            raise FormatError("missing metadata key", where=file.path, field=key)
        _same(file.metadata[key], expected, file.path, key)
    _same(sorted(file.tensors), sorted(plan.name for plan in layout.plans), file.path, "tensors")
    for plan in layout.plans:
        tensor = file.tensors[plan.name]
        if (tensor.type, tensor.shape) != (plan.type, plan.shape):
            got, expected = f"{tensor.type} {tensor.shape}", f"{plan.type} {plan.shape}"
            raise ShapeError(f"tensor {plan.name}", where=file.path, got=got, expected=expected)


def _same(got: Any, expected: Any, path: Path, field: str) -> None:
    if isinstance(expected, str | list | dict):
        same = type(got) is type(expected) and got == expected
    else:
        same = np.array_equal(np.asarray(got), np.asarray(expected))
    if same:
        return
    raise MismatchError(
        f"{field} does not agree with the other files", where=path, got=_short(got), expected=_short(expected)
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
