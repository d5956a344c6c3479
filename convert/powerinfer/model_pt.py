"""PowerInfer's predictor directories: `model_0.pt`, `model_1.pt`, … and perhaps a `config.json`.

Each file is a dictionary with `fc1.weight` [rank, d_model] and `fc2.weight` [d_ff, rank], as PowerInfer's
converters read it (convert.py's `load_predictor_model`); of `config.json` they read `sparse_threshold`, one
for all layers. hotcold keeps its own configuration there too, under `hotcold`, so that nothing is lost
on the way out and back.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hotcold import storage
from hotcold.convert.powerinfer.model import check_in_powerinfer
from hotcold.convert.powerinfer.pickles import read_pickles
from hotcold.errors import FormatError, InputError, MismatchError, ShapeError
from hotcold.files.json import read_json
from hotcold.files.safetensors import SafetensorsFile
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle, parse_config
from hotcold.predictor.kinds.table import FC1, FC2
from hotcold.progress import Progress

__all__ = ["layer_pairs", "numbered_files", "read_model_pt", "tensor_file", "write_model_pt"]

_KEYS = (FC1, FC2)


def read_model_pt(
    folder: str | Path, fingerprint: str | None = None, *, pickles_allowed: bool
) -> PredictorBundle:
    """Predictors for the model with this fingerprint; None where `config.json` tells which that is.

    Raises InputError (no such files, pickles not allowed, model unknown), FormatError (not tensors under
    these two names), ShapeError (layers that do not fit each other), MismatchError (predictors of another
    model).
    """
    folder = Path(folder)
    paths = numbered_files(folder, "model")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    threshold = _threshold(config, folder)
    files = read_pickles(paths, allowed=pickles_allowed)
    pairs = layer_pairs(files, folder)
    layers = [LayerPredictor(fc1, fc2, threshold) for fc1, fc2 in pairs]
    bundle = PredictorBundle(fingerprint or "", layers, training={"converted_from": folder.name}, path=folder)
    if "hotcold" in config:
        _restore(bundle, config["hotcold"], folder / "config.json")
    if not bundle.model_fingerprint:
        fix = "add the model as a source"
        raise InputError("these predictors do not name their model", where=folder, fix=fix)
    return bundle


def numbered_files(folder: Path, stem: str) -> list[Path]:
    """`STEM_0.pt`, `STEM_1.pt`, … by number; InputError for none, FormatError for a gap."""
    numbers = [re.fullmatch(rf"{stem}_(0|[1-9]\d*)\.pt", path.name) for path in folder.glob(f"{stem}_*.pt")]
    found = sorted(int(match[1]) for match in numbers if match)
    if not found:
        raise InputError(
            "no such files in this folder", where=folder, expected=f"{stem}_0.pt, {stem}_1.pt, …"
        )
    for expected, number in enumerate(found):
        if number != expected:
            raise FormatError("missing", where=folder / f"{stem}_{expected}.pt", got=f"{stem}_{number}.pt")
    return [folder / f"{stem}_{number}.pt" for number in found]


def layer_pairs(files: Sequence[SafetensorsFile], folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """fc1 [rank, d_model] and fc2 [d_ff, rank] of each layer, out of the tensors of `model_N.pt`."""
    pairs = [_pair(tensors, folder / f"model_{number}.pt") for number, tensors in enumerate(files)]
    _check_same_widths(pairs, folder)
    return pairs


def _pair(tensors: SafetensorsFile, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """fc1 [rank, d_model] and fc2 [d_ff, rank] of one layer, mapped."""
    if sorted(tensors) != sorted(_KEYS):
        got, expected = ", ".join(sorted(tensors)), ", ".join(_KEYS)
        raise FormatError(
            "wrong tensors for a predictor", where=path, field="keys", got=got, expected=expected
        )
    fc1, fc2 = (tensors.floats(key, tensors.shape(key)) for key in _KEYS)
    if fc1.ndim != 2 or fc2.ndim != 2 or fc1.shape[0] != fc2.shape[1] or 0 in (*fc1.shape, *fc2.shape):
        got, expected = f"{fc1.shape}, {fc2.shape}", "[rank, d_model], [d_ff, rank]"
        raise ShapeError("fc1.weight, fc2.weight", where=path, got=got, expected=expected)
    if not (np.isfinite(fc1).all() and np.isfinite(fc2).all()):
        raise FormatError("not all finite", where=path, field="weights")
    return fc1, fc2


def _check_same_widths(pairs: list[tuple[np.ndarray, np.ndarray]], folder: Path) -> None:
    widths = [(fc1.shape[1], fc2.shape[0]) for fc1, fc2 in pairs]
    for number, width in enumerate(widths):
        if width != widths[0]:
            where = folder / f"model_{number}.pt"
            raise ShapeError(
                "(d_model, d_ff) differs from layer 0", where=where, got=width, expected=widths[0]
            )


def _threshold(config: dict[str, Any], folder: Path) -> float:
    value = config.get("sparse_threshold", 0.0)
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        where = folder / "config.json"
        raise FormatError("not a number", where=where, field="sparse_threshold", got=repr(value))
    return float(value)


def _restore(bundle: PredictorBundle, values: Any, path: Path) -> None:
    """Take from hotcold's own part of `config.json` what the files beside it cannot say."""
    if not isinstance(values, dict):
        raise FormatError("not an object", where=path, field="hotcold")
    config = parse_config(dict(values), path)
    shape = (bundle.kind.name, bundle.n_layers, bundle.d_model, bundle.d_ff, bundle.ranks)
    if (config.kind, config.n_layers, config.d_model, config.d_ff, config.ranks) != shape:
        raise MismatchError("hotcold's metadata belongs to other files", where=path)
    if bundle.model_fingerprint not in ("", config.model_fingerprint):
        raise MismatchError(
            "predictors of another model", where=path, got=config.model_fingerprint[:12],
            expected=bundle.model_fingerprint[:12],
        )  # fmt: skip
    metrics = config.layer_metrics(path)
    bundle.model_fingerprint, bundle.training = config.model_fingerprint, config.training
    bundle.target_recall = config.target_recall
    bundle.layers = [
        LayerPredictor(layer.fc1, layer.fc2, threshold, None, measured)
        for layer, threshold, measured in zip(bundle.layers, config.thresholds, metrics, strict=True)
    ]


def write_model_pt(bundle: PredictorBundle, out: str | Path) -> None:
    """Write the directory, which appears as a whole. StorageError where the disk does not take it,
    UnsupportedError for predictors that PowerInfer does not know."""
    check_in_powerinfer(bundle)
    with (
        storage.atomic_directory(out, "model-pt") as folder,
        Progress("model_N.pt", bundle.n_layers, "layer") as progress,
    ):
        for number, layer in enumerate(bundle.layers):
            storage.write_bytes(folder / f"model_{number}.pt", tensor_file(layer.weights()))
            progress.advance(1)
        config = {"sparse_threshold": min(bundle.thresholds), "hotcold": bundle.config()}
        storage.write_json(folder / "config.json", config)


def tensor_file(value: np.ndarray | dict[str, np.ndarray]) -> bytes:
    """A float32 array, or several by name, as `torch.save` writes them: what PowerInfer's scripts read."""
    import torch

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, np.float32))  # a copy: torch wants to be able to write to it

    file = io.BytesIO()
    named = {key: tensor(array) for key, array in value.items()} if isinstance(value, dict) else tensor(value)
    torch.save(named, file)
    return file.getvalue()
