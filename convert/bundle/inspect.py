"""Say what is in a GGUF file, a predictor bundle or a bundle, as one dictionary for people and programs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from hotcold.convert.bundle.layout import ExportOptions
from hotcold.convert.bundle.manifest import Manifest
from hotcold.convert.bundle.predictors import hot_neurons
from hotcold.convert.powerinfer.gpu_index import GpuIndex
from hotcold.convert.powerinfer.model import hot_sets, predictor_thresholds
from hotcold.errors import InputError
from hotcold.files.gguf import GGUFFile
from hotcold.files.gguf_split import open_gguf
from hotcold.identify import identify
from hotcold.predictor.bundle import PredictorBundle
from hotcold.predictor.kinds.table import kind_of_file
from hotcold.table import columns

__all__ = ["describe", "render"]

_LONG = 64  # characters of a value that are shown to people
_NEURONS = ("hot_neurons", "gpu_neurons")


def describe(path: str | Path) -> dict[str, Any]:
    """What is in a file or folder, ready for JSON. InputError for others, FormatError for broken ones."""
    path = Path(path)
    match identify(path).kind:
        case "gpuidx":
            return _describe_gpu_index(open_gguf(path))
        case "gguf" | "powerinfer":
            return _describe_gguf(open_gguf(path))
        case "bundle":
            return _describe_bundle(path)
        case "predictors":
            return _describe_predictors(path)
    raise InputError("nothing to inspect", where=path, expected="a GGUF file, a bundle or a predictor bundle")


def _describe_gguf(file: GGUFFile) -> dict[str, Any]:
    by_type: Counter[str] = Counter()
    for tensor in file.tensors.values():
        by_type[tensor.type] += tensor.data.nbytes
    layers = _layers_of(file)
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
        **({"predictor_kind": kind_of_file(file).name} if layers else {}),
        "layers": layers,
        "hot_neurons": [hot.tolist() for hot in hot_sets(file, len(layers))] if layers else [],
    }


def _describe_gpu_index(file: GGUFFile) -> dict[str, Any]:
    index = GpuIndex.read(file)
    sizes = [len(bucket) for bucket in index.buckets]
    return {
        "kind": "gpuidx",
        "vram_capacity": index.vram_capacity,
        "d_ff": index.d_ff,
        "layers": [{"layer": n, "gpu": size, "share": size / index.d_ff} for n, size in enumerate(sizes)],
        "gpu_neurons": [bucket.tolist() for bucket in index.buckets],
    }


def _layers_of(file: GGUFFile) -> list[dict[str, Any]]:
    """The predictor table of a sparse file: rank and threshold, and how many neurons are hot."""
    ranks = [tensor.shape[0] for tensor in file.tensors.values() if tensor.name.endswith(".fc1.weight")]
    table = zip(ranks, predictor_thresholds(file, len(ranks)), hot_sets(file, len(ranks)), strict=True)
    return [
        {"layer": number, "rank": rank, "threshold": threshold, "hot": len(hot)}
        for number, (rank, threshold, hot) in enumerate(table)
    ]


def _describe_predictors(path: Path) -> dict[str, Any]:
    predictors = PredictorBundle.load(path)
    hot = [hot_neurons(layer, ExportOptions().hot_frequency).tolist() for layer in predictors.layers]
    table = [
        {"layer": number, "rank": layer.rank, "threshold": layer.threshold, "hot": len(hot[number])}
        | (layer.metrics.to_json() if layer.metrics else {})
        for number, layer in enumerate(predictors.layers)
    ]
    kind = {"kind": "predictors", "predictor_kind": predictors.kind.name}
    return predictors.config() | kind | {"layers": table, "hot_neurons": hot}


def _describe_bundle(path: Path) -> dict[str, Any]:
    manifest = Manifest.read(path)
    described = {"kind": "bundle", **manifest.to_json(), "layers": []}
    if sparse := manifest.of_role("sparse"):
        file = open_gguf(path / sparse[0])
        described["layers"] = _layers_of(file)
        if manifest.of_role("predictor"):
            learned = _describe_predictors(path / "predictors")["layers"]
            described["predictor_kind"] = kind_of_file(file).name
            described["layers"] = [a | b for a, b in zip(learned, described["layers"], strict=True)]
        described["hot_neurons"] = [hot.tolist() for hot in hot_sets(file, len(described["layers"]))]
    return described


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def render(described: dict[str, Any]) -> str:
    """The same for people: one line per entry, long ones cut short, and tables."""
    tables = [_table(described.get("tensors", [])), _table(_with_neurons(described))]
    files = [{"file": name, **entry} for name, entry in described.get("files", {}).items()]
    skipped = ("tensors", "layers", "files", "metadata", *_NEURONS)
    lines = [f"{key}: {_cut(value)}" for key, value in described.items() if key not in skipped]
    lines += [f"  {key}: {_cut(value)}" for key, value in described.get("metadata", {}).items()]
    return "\n\n".join(part for part in ("\n".join(lines), _table(files), *tables) if part)


def _with_neurons(described: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the layers, with the neurons that are hot or on the GPU."""
    for name in _NEURONS:
        if described.get(name):
            rows = zip(described["layers"], described[name], strict=True)
            return [row | {name.replace("_", " "): _cut(_ranges(neurons))} for row, neurons in rows]
    return described.get("layers", [])


def _ranges(neurons: list[int]) -> str:
    """Ascending indices as `0-3, 7, 12-15`."""
    runs: list[list[int]] = []
    for neuron in neurons:
        if runs and runs[-1][1] == neuron - 1:
            runs[-1][1] = neuron
        else:
            runs.append([neuron, neuron])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"


def _cut(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} values, {_cut(', '.join(map(str, value[:8])))}"
    text = " ".join(str(value).split())
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as aligned columns."""
    if not rows:
        return ""
    head = list(rows[0])
    return columns(head, [[_cell(value) for value in row.values()] for row in rows], range(len(head)))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)
