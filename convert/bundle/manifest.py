"""`manifest.json` of a bundle: what it is, how it was made, and the sha256 of every file in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from hotcold.digest import seal, sha256_file
from hotcold.errors import FormatError
from hotcold.files.json import read_json

__all__ = ["MANIFEST", "BundleFile", "Manifest"]

MANIFEST = "manifest.json"
FORMAT, VERSION = "hotcold-bundle", 1
ROLES = ("dense", "sparse", "attention", "inputs", "predictor", "tokenizer", "config")

_LISTS = ("source_quantized", "llama_cpp_differences")  # of strings, empty if they are missing

_FORMER = {"source_quantised": "source_quantized"}  # keys of version 1 as it was spelled first

_HEX = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(r"(predictors/|additional_chat_templates/)?\w[\w.+ -]*")


@dataclass(frozen=True, slots=True)
class BundleFile:
    """One file of a bundle."""

    role: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, role: str) -> Self:
        """Describe a file that has just been written."""
        return cls(role, path.stat().st_size, sha256_file(path))


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `manifest.json`; `files` are by their path inside the bundle.

    `head_quant`, `predictor_quant` and `hot_frequency` are those of `layout.ExportOptions`;
    `llama_cpp_exact` tells whether stock llama.cpp computes this model's own function from the dense
    file, and `llama_cpp_differences` in what it does not; `source_quantized` names the quantized types that
    the weights came in, if any.
    """

    name: str
    quant: str
    head_quant: str
    predictor_quant: str
    hot_frequency: float
    activation: str
    model_fingerprint: str
    llama_cpp_exact: bool
    files: Mapping[str, BundleFile]
    source_quantized: list[str] = field(default_factory=list)
    llama_cpp_differences: list[str] = field(default_factory=list)

    def of_role(self, role: str) -> list[str]:
        """The paths of the files of one role."""
        return [path for path, file in self.files.items() if file.role == role]

    def to_json(self) -> dict[str, Any]:
        """The content of the file; its own `sha256` is over all the rest of it."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return values | {"sha256": seal(values)}

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read and check the manifest of a bundle. InputError if there is none, FormatError if broken."""
        path = Path(folder) / MANIFEST
        values = read_json(path)
        sha256 = values.pop("sha256", None)
        digest = seal(values)
        values = {_FORMER.get(key, key): value for key, value in values.items()}
        for key, expected in (("format", FORMAT), ("version", VERSION)):
            _check(values.pop(key, None), expected.__class__, path, key, expected)
        kinds = {"hot_frequency": float, "llama_cpp_exact": bool, "files": dict} | dict.fromkeys(_LISTS, list)
        for name in _LISTS:
            values.setdefault(name, [])
        names = [field.name for field in fields(cls)]
        for name in names:
            _check(values.get(name), kinds.get(name, str), path, name)
        for name in _LISTS:
            for entry in values[name]:
                _check(entry, str, path, name)
        if unknown := set(values) - set(names):
            raise FormatError("unknown key", where=path, field=min(unknown))
        if sha256 != digest:
            fix = "export the bundle again"
            raise FormatError("altered", where=path, field="sha256", got=sha256, expected=digest, fix=fix)
        values["files"] = {name: _file(name, entry, path) for name, entry in values["files"].items()}
        return cls(**values)


def _check(value: object, kind: type, path: Path, field: str, expected: object = None) -> None:
    if type(value) is not kind:
        raise FormatError("wrong type", where=path, field=field, got=value, expected=kind.__name__)
    if expected is not None and value != expected:
        raise FormatError("not a bundle's manifest", where=path, field=field, got=value, expected=expected)


def _file(name: str, entry: object, path: Path) -> BundleFile:
    if not _PATH.fullmatch(name):
        raise FormatError("not a path inside of the bundle", where=path, field="files", got=name)
    keys = {"role": str, "bytes": int, "sha256": str}
    if not isinstance(entry, dict) or set(entry) != set(keys):
        raise FormatError(
            "a file has these keys", where=path, field=name, got=entry, expected=", ".join(keys)
        )
    for key, kind in keys.items():
        _check(entry[key], kind, path, f"{name}.{key}")
    if entry["role"] not in ROLES:
        expected = " | ".join(ROLES)
        raise FormatError(
            "unknown role", where=path, field=f"{name}.role", got=entry["role"], expected=expected
        )
    if not _HEX.fullmatch(entry["sha256"]) or entry["bytes"] < 0:
        raise FormatError("not a size and a sha256", where=path, field=name, got=entry)
    return BundleFile(**entry)
