"""Write a bundle: the dense and the sparse GGUF file of a model, its predictors, tokenizer and a manifest.

Everything is checked before the first byte is written, and the folder appears as a whole or not at all.
Weights pass through one tensor at a time, so that memory does not grow with the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_VERSION, LlamaFileType

from hotcold import storage
from hotcold.convert.architectures import ModelSpec
from hotcold.convert.gguf_write import write_gguf
from hotcold.convert.hf_checkpoint import WeightSource
from hotcold.convert.llama_cpp import dense_metadata, dense_plans, is_exact
from hotcold.convert.plans import Planner, TensorTypes
from hotcold.convert.powerinfer import MAGIC, runs_in_powerinfer, sparse_metadata, sparse_plans
from hotcold.convert.predictors import Predictors
from hotcold.convert.quantize import type_of
from hotcold.convert.safetensors_read import read_json
from hotcold.convert.tokenizer import tokenizer_files, tokenizer_metadata
from hotcold.errors import HotcoldError, InputError, UnsupportedError
from hotcold.progress import log

__all__ = ["BUNDLE_FORMAT", "BUNDLE_VERSION", "MANIFEST", "ExportOptions", "export_bundle"]

BUNDLE_FORMAT, BUNDLE_VERSION = "hotcold-bundle", 1
METADATA_VERSION = 1
MANIFEST = "manifest.json"

_CHUNK = 1 << 20
_NAME = re.compile(r"\w[\w.+ -]*")
_FILE_TYPES = {"F32": "ALL_F32"}  # the others are MOSTLY_ + type


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to write a bundle. Quantisations are names of `quantize.QUANTS`.

    `head_quant` is for embedding and head, and that of the other matrices where None. A neuron that
    fires on `hot_frequency` of the tokens or more is hot: always computed, never predicted.
    """

    quant: str = "q4_0"
    head_quant: str | None = None
    predictor_quant: str = "q8_0"
    hot_frequency: float = 0.5

    def types(self) -> TensorTypes:
        """The ggml types; UnsupportedError for an unknown quantisation."""
        head = self.quant if self.head_quant is None else self.head_quant
        return TensorTypes(type_of(self.quant), type_of(head), type_of(self.predictor_quant))


def export_bundle(
    source: WeightSource,
    out: str | Path,
    *,
    name: str,
    fingerprint: str,
    folder: Path | None = None,
    predictors: Predictors | None = None,
    options: ExportOptions | None = None,
) -> dict[str, Any]:
    """Write the bundle `out` and return its manifest.

    `folder` is the HF directory with the tokenizer and config files; without one the files hold no
    vocabulary. Without `predictors` only the dense form is written.

    Raises UnsupportedError (unknown model, activation or quantisation), ShapeError or MismatchError
    (predictors of another model, tensors that do not fit the config), InputError (an `out` that is
    something else), StorageError (the disk does not take it). `out` is then as it was.
    """
    spec = ModelSpec.from_config(source.config)
    bundle = _Bundle(source, spec, options or ExportOptions(), name, fingerprint, folder)
    _refuse_foreign_folder(Path(out))
    if predictors is not None:
        if spec.activation == "silu":
            what = "a SiLU never gives zero, so that there is nothing to predict"
            raise UnsupportedError(
                what, got="silu", expected="relu | fatrelu | drelu", fix="sparsify it first"
            )
        predictors.check(spec, fingerprint)
    return bundle.write(Path(out), predictors)


def _refuse_foreign_folder(out: Path) -> None:
    """An earlier bundle may be replaced, other things not."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = read_json(out / MANIFEST).get("format") == BUNDLE_FORMAT
    except HotcoldError:
        ours = False
    if not ours:
        raise InputError("exists and is not a bundle", where=out, fix="give a folder that does not exist yet")


class _Bundle:
    """The parts of one export, in the order in which they are written."""

    def __init__(
        self, source: WeightSource, spec: ModelSpec, options: ExportOptions, name: str, fingerprint: str,
        folder: Path | None,
    ) -> None:  # fmt: skip
        if not _NAME.fullmatch(name):
            raise InputError("a bundle's name is a plain file name", where="name", got=repr(name))
        self.spec, self.options, self.name, self.fingerprint, self.folder = (
            spec,
            options,
            name,
            fingerprint,
            folder,
        )
        self.types = options.types()
        self.planner = Planner(source, spec, self.types)
        self.metadata = self._common_metadata(source.config)

    def _common_metadata(self, config: dict[str, Any]) -> dict[str, Any]:
        file_type = LlamaFileType[_FILE_TYPES.get(self.types.body, f"MOSTLY_{self.types.body}")]
        metadata = {
            "general.name": self.name,
            "general.file_type": np.uint32(file_type),
            "general.quantization_version": np.uint32(GGML_QUANT_VERSION),
            "hotcold.version": np.uint32(METADATA_VERSION),
            "hotcold.model_fingerprint": self.fingerprint,
            "hotcold.activation": self.spec.activation,
            "hotcold.activation_thresholds": np.asarray(self.spec.activation_thresholds, np.float32),
        }
        if self.folder is None:
            return metadata | {"tokenizer.ggml.model": "none"}
        return metadata | tokenizer_metadata(self.folder, self.spec.n_vocab, config)

    def write(self, out: Path, predictors: Predictors | None) -> dict[str, Any]:
        dense = dense_metadata(self.spec) | self.metadata, dense_plans(self.planner)
        sparse = None if predictors is None else self._sparse(predictors)
        self._say_limits(sparse is not None)
        with storage.atomic_directory(out) as folder:
            roles = {f"{self.name}.gguf": "dense"}
            write_gguf(folder / f"{self.name}.gguf", *dense)
            if predictors is not None and sparse is not None:
                roles[f"{self.name}.powerinfer.gguf"] = "sparse"
                write_gguf(folder / f"{self.name}.powerinfer.gguf", *sparse, magic=MAGIC)
                roles |= _copy(_predictor_files(predictors.path), folder / "predictors", "predictor")
            if self.folder is not None:
                roles |= _copy(tokenizer_files(self.folder), folder, "tokenizer")
                roles |= _copy([self.folder / "config.json"], folder, "config")
            manifest = self._manifest(folder, roles)
            storage.write_json(folder / MANIFEST, manifest)
        return manifest

    def _sparse(self, predictors: Predictors) -> tuple[dict[str, Any], list]:
        hot = [predictors.hot(layer, self.options.hot_frequency) for layer in range(self.spec.n_layers)]
        metadata = sparse_metadata(self.spec, predictors, hot) | self.metadata
        return metadata, sparse_plans(self.planner, predictors)

    def _say_limits(self, sparse: bool) -> None:
        if not is_exact(self.spec):
            log(f"{self.name}.gguf: llama.cpp has no such {self.spec.activation}, it will compute relu")
        if sparse and not runs_in_powerinfer(self.spec, self.types.body):
            log(f"{self.name}.powerinfer.gguf: PowerInfer itself runs only ReLU models in f16 or q4_0")
        if not sparse and self.spec.activation != "silu":
            log("no predictors given: the dense file only")

    def _manifest(self, folder: Path, roles: dict[str, str]) -> dict[str, Any]:
        files = {
            path: {
                "role": role,
                "bytes": (folder / path).stat().st_size,
                "sha256": storage.sha256_file(folder / path),
            }
            for path, role in roles.items()
        }
        return {
            "format": BUNDLE_FORMAT,
            "version": BUNDLE_VERSION,
            "name": self.name,
            "quant": self.options.quant,
            "activation": self.spec.activation,
            "model_fingerprint": self.fingerprint,
            "llama_cpp_exact": is_exact(self.spec),
            "files": files,
        }


def _predictor_files(folder: Path) -> list[Path]:
    names = ("config.json", "model.safetensors", "README.md")
    return [folder / name for name in names if (folder / name).is_file()]


def _copy(files: list[Path], folder: Path, role: str) -> dict[str, str]:
    """Copy files durably into `folder` of a bundle; returns their paths in the bundle with their role."""
    for file in files:
        with storage.atomic_file(folder / file.name) as target, file.open("rb") as content:
            while chunk := content.read(_CHUNK):
                storage.fs.write(target, chunk)
    inside = "" if role != "predictor" else f"{folder.name}/"
    return {f"{inside}{file.name}": role for file in files}
