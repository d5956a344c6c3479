"""The weights of a Hugging Face directory, one tensor at a time: single file or shards with an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hotcold.errors import FormatError, InputError
from hotcold.json_file import read_json
from hotcold.safetensors_read import SafetensorsFile

__all__ = ["HFCheckpoint", "WeightSource"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class WeightSource(Protocol):
    """Where weights come from: tensors under Hugging Face's names, and the model's `config.json`."""

    config: dict[str, Any]

    @property
    def quantised_types(self) -> list[str]:
        """The types, other than floating point, that weights come in: what is lost is lost."""
        ...

    def names(self) -> set[str]:
        """The names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""
        ...

    def load(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        ...


class HFCheckpoint:
    """A `WeightSource` over an HF directory. InputError where a file is missing, FormatError if broken."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        # Meta's OPT checkpoints lack the name of the base model; transformers adds it while loading.
        self._files = {_with_base(name): (file, name) for name, file in self._index().items()}

    def _index(self) -> dict[str, SafetensorsFile]:
        if (self.path / _SINGLE).is_file():
            file = SafetensorsFile(self.path / _SINGLE)
            return dict.fromkeys(file, file)
        if not (self.path / _INDEX).is_file():
            raise InputError("no weights", where=self.path, expected=f"{_SINGLE} or {_INDEX}")
        return self._sharded(read_json(self.path / _INDEX))

    def _sharded(self, index: dict[str, Any]) -> dict[str, SafetensorsFile]:
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise FormatError("not a map of names to files", where=self.path / _INDEX, field="weight_map")
        for name in set(names.values()):
            if Path(name).name != name:
                where = self.path / _INDEX
                raise FormatError("a shard outside of the folder", where=where, field="weight_map", got=name)
        files = {name: SafetensorsFile(self.path / name) for name in sorted(set(names.values()))}
        return {tensor: files[name] for tensor, name in names.items()}

    @property
    def quantised_types(self) -> list[str]:
        """None: only floating-point tensors are read."""
        return []

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor; FormatError where the checkpoint has none of this name."""
        file, stored = self._find(name)
        return file.shape(stored)

    def load(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        file, stored = self._find(name)
        return file.load(stored)

    def _find(self, name: str) -> tuple[SafetensorsFile, str]:
        if name not in self._files:
            raise FormatError("missing tensor", where=self.path, field=name)
        return self._files[name]


def _with_base(name: str) -> str:
    return f"model.{name}" if name.startswith("decoder.") else name
