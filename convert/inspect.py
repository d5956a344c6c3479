"""Say what is in a GGUF file, a predictor bundle or a bundle, as one dictionary for people and programs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from hotcold.convert.gguf_read import GGUFFile
from hotcold.convert.gguf_split import open_gguf
from hotcold.convert.manifest import MANIFEST, Manifest
from hotcold.errors import InputError
from hotcold.predictor.bundle import PredictorBundle
from hotcold.safetensors_read import read_json

__all__ = ["describe", "render"]

_LONG = 64  # characters of a value that are shown to people


def describe(path: str | Path) -> dict[str, Any]:
    """What is in a file or folder, ready for JSON. InputError for others, FormatError for broken ones."""
    path = Path(path)
    if path.is_file():
        return _describe_gguf(open_gguf(path))
    if (path / MANIFEST).is_file():
        return _describe_bundle(path)
    if (path / "config.json").is_file() and "thresholds" in read_json(path / "config.json"):
        return _describe_predictors(path)
    raise InputError("nothing to inspect", where=path, expected="a GGUF file, a bundle or a predictor bundle")


def _describe_gguf(file: GGUFFile) -> dict[str, Any]:
    by_type: Counter[str] = Counter()
    for tensor in file.tensors.values():
        by_type[tensor.type] += tensor.data.nbytes
    return {
        "kind": "gguf",
        "magic": file.magic,
        "version": file.version,
        "metadata": {key: _plain(value) for key, value in file.metadata.items()},
        "bytes_by_type": dict(by_type),
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "type": t.type, "bytes": t.data.nbytes}
            for t in file.tensors.values()
        ],
        "layers": _layers_of(file),
    }


def _layers_of(file: GGUFFile) -> list[dict[str, Any]]:
    """The predictor table of a sparse file: rank and threshold, and how many neurons are hot."""
    ranks = [t.shape[0] for t in file.tensors.values() if t.name.endswith(".fc1.weight")]
    one_for_all = file.metadata.get("powerinfer.sparse_threshold", 0.0)
    thresholds = file.metadata.get("hotcold.predictor.thresholds", [one_for_all] * len(ranks))
    counts = file.metadata.get("hotcold.hot.counts", [0] * len(ranks))
    return [
        {"layer": i, "rank": rank, "threshold": float(threshold), "hot": int(hot)}
        for i, (rank, threshold, hot) in enumerate(zip(ranks, thresholds, counts, strict=False))
    ]


def _describe_predictors(path: Path) -> dict[str, Any]:
    predictors = PredictorBundle.load(path)
    table = [
        {"layer": number, "rank": layer.rank, "threshold": layer.threshold}
        | (layer.metrics.to_json() if layer.metrics else {})
        for number, layer in enumerate(predictors.layers)
    ]
    return {"kind": "predictors"} | predictors.config() | {"layers": table}


def _describe_bundle(path: Path) -> dict[str, Any]:
    manifest = Manifest.read(path)
    described = {"kind": "bundle", **manifest.to_json(), "layers": []}
    if sparse := manifest.of_role("sparse"):
        file = GGUFFile(path / sparse[0])
        learned = _describe_predictors(path / "predictors")["layers"]
        described["layers"] = [a | b for a, b in zip(_layers_of(file), learned, strict=False)]
        described["hot_neurons"] = _hot_neurons(file)
    return described


def _hot_neurons(file: GGUFFile) -> list[list[int]]:
    """The indices of the always-computed neurons of each layer."""
    counts = np.asarray(file.metadata.get("hotcold.hot.counts", []), np.int64)
    neurons = np.asarray(file.metadata.get("hotcold.hot.neurons", []), np.int64)
    return [part.tolist() for part in np.split(neurons, np.cumsum(counts))[: len(counts)]]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def render(described: dict[str, Any]) -> str:
    """The same for people: one line per entry, long ones cut short, and tables."""
    tables = [_table(described.get(name, [])) for name in ("tensors", "layers")]
    files = [{"file": name, **entry} for name, entry in described.get("files", {}).items()]
    skipped = ("tensors", "layers", "files", "metadata", "hot_neurons")
    lines = [f"{key}: {_cut(value)}" for key, value in described.items() if key not in skipped]
    lines += [f"  {key}: {_cut(value)}" for key, value in described.get("metadata", {}).items()]
    return "\n\n".join(part for part in ("\n".join(lines), _table(files), *tables) if part)


def _cut(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} values, {_cut(', '.join(map(str, value[:8])))}"
    text = " ".join(str(value).split())
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as aligned columns."""
    if not rows:
        return ""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip() for line in cells
    )
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)
