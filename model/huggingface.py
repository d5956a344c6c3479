"""The weights of a Hugging Face directory, one tensor at a time: single file or shards with an index."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hotcold.errors import FormatError, InputError, UnsupportedError
from hotcold.files.json import read_json
from hotcold.files.safetensors import SafetensorsFile
from hotcold.files.tensor_check import NOT_QUANTIZED, is_buffer, missing_tensor, plain_names
from hotcold.finite import check_weight
from hotcold.model.families import FAMILIES
from hotcold.progress import log

__all__ = ["HFCheckpoint", "WeightSource", "shapes_of", "weight_files"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


class WeightSource(Protocol):
    """Where weights come from: tensors under Hugging Face's names, and the model's `config.json`.

    `path` is for errors.
    """

    path: Path
    config: dict[str, Any]

    @property
    def quantized_types(self) -> list[str]:
        """The types, other than floating point, that weights come in: what is lost is lost."""
        ...

    def names(self) -> set[str]:
        """The names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""
        ...

    def load(self, name: str) -> np.ndarray:
        """One tensor as float32, all of it finite."""
        ...


def shapes_of(source: WeightSource) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a source."""
    return {name: source.shape(name) for name in source.names()}


class HFCheckpoint:
    """A `WeightSource` over an HF directory, its tensors under transformers' names.

    `config` says that the head is tied unless the files hold a head of its own, which counts then: so does
    transformers. InputError where a file is missing, FormatError if one is broken or a tensor is in no index,
    UnsupportedError for adapters and quantized weights.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self._refuse_quantized()
        stored = {name: file for file, names in _files_and_names(self.path) for name in names}
        stored = {name: file for name, file in stored.items() if not is_buffer(name, file.shape(name))}
        plain, prefixes = plain_names(stored, self.path)
        self._files = {name: (stored[original], original) for name, original in plain.items()}
        for file, original in self._files.values():
            file.check_floats(original)
        if prefixes:
            log(f"{self.path.name}: {' and '.join(prefixes)} removed from the names of its tensors")
        self._settle_head()

    def _refuse_quantized(self) -> None:
        for key in ("quantization_config", "compression_config"):
            if how := self.config.get(key):
                got = how.get("quant_method", key) if isinstance(how, dict) else key
                where = self.path / "config.json"
                raise UnsupportedError("quantized weights", where=where, got=got, fix=NOT_QUANTIZED)

    def _settle_head(self) -> None:
        """Leave out a head that is a copy of the embedding it is tied to; any other is the model's own."""
        family = FAMILIES.get(str(self.config.get("model_type")))
        if family is None or not self.config.get("tie_word_embeddings", family.tied):
            return
        names = family.naming.names
        head, embedding = (self._files.get(f"{names[slot]}.weight") for slot in ("head", "embedding"))
        if head is None or embedding is None:
            return
        if head[0].same(head[1], *embedding):
            del self._files[f"{names['head']}.weight"]
        else:
            log(f"{self.path.name}: a separate head overrides the tied embedding of its config")
            self.config["tie_word_embeddings"] = False

    @property
    def quantized_types(self) -> list[str]:
        """None: only floating-point tensors are read."""
        return []

    def names(self) -> set[str]:
        """The names of all weights."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor; FormatError where the checkpoint has none of this name."""
        file, stored = self._find(name)
        return file.shape(stored)

    def load(self, name: str) -> np.ndarray:
        """One tensor as float32; FormatError unless all its values are finite."""
        file, stored = self._find(name)
        return check_weight(file.load(stored), name, file.path)

    def _find(self, name: str) -> tuple[SafetensorsFile, str]:
        if name not in self._files:
            raise missing_tensor(name, self.path)
        return self._files[name]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of an HF directory, sorted; other *.safetensors are none of it.

    InputError where there are none, FormatError for an index that is broken.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    return [folder / name for name in sorted({*_weight_map(folder).values()})]


def _files_and_names(folder: Path) -> Iterator[tuple[SafetensorsFile, list[str]]]:
    """Each file with the names of its tensors, which must be those that the index says."""
    listed = {} if (folder / _SINGLE).is_file() else _weight_map(folder)
    for path in weight_files(folder):
        file = SafetensorsFile(path)
        if listed:
            _check_index(
                file, {name for name, shard in listed.items() if shard == path.name}, folder / _INDEX
            )
        yield file, list(file)


def _check_index(file: SafetensorsFile, listed: set[str], index: Path) -> None:
    found = {name: file.shape(name) for name in file}
    for name in sorted(listed - found.keys()):
        raise missing_tensor(name, file.path)
    for name in sorted(found.keys() - listed):
        if not is_buffer(name, found[name]):
            raise FormatError(
                "a tensor that the index does not name", where=index, field=name, got=file.path.name
            )


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / _INDEX
    if not index.is_file():
        raise _no_weights(folder)
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise FormatError("not a map of names to files", where=index, field="weight_map")
    for name in set(names.values()):
        if Path(name).name != name:
            raise FormatError("a shard outside of the folder", where=index, field="weight_map", got=name)
    return names


def _no_weights(folder: Path) -> InputError:
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    got = None
    if any(_SHARD.fullmatch(name) for name in found):
        got = f"shards without {_INDEX}"
    elif found:
        got = found[0]
    return InputError("no weights", where=folder, got=got, expected=f"{_SINGLE} or {_INDEX}")
