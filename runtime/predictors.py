"""What a GGUF file says of its predictors beside their weights. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hotcold.errors import FormatError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.predictor.kinds.table import FC1, Kind, kind_of_file
from hotcold.runtime.shape import ModelShape, per_layer

__all__ = ["Predictor", "read_predictors"]


@dataclass(frozen=True, slots=True)
class Predictor:
    """One layer's predictor but for its weights: the threshold on raw scores, and the hot neurons."""

    kind: Kind
    rank: int
    threshold: float
    hot: np.ndarray  # bool [d_ff]: always computed


def read_predictors(file: GGUFFile, shape: ModelShape) -> list[Predictor]:
    """One per layer. PowerInfer's own files have one threshold for all layers and no hot neurons.

    UnsupportedError where there are none, or of an unknown kind; FormatError where they do not fit.
    """
    if f"blk.0.{FC1}" not in file.tensors:
        raise UnsupportedError("no predictors in this file", where=file.path, fix="use --mode exact")
    kind, n = kind_of_file(file), shape.n_layers
    one_for_all = file.find("powerinfer.sparse_threshold", float, 0.0)
    thresholds = per_layer(file, "hotcold.predictor.thresholds", n, one_for_all)
    counts = per_layer(file, "hotcold.hot.counts", n, 0)
    neurons = _hot_neurons(file, counts, shape.d_ff)
    predictors = []
    for layer, indices in enumerate(np.split(neurons, np.cumsum(counts))[:n]):
        hot = np.zeros(shape.d_ff, bool)
        hot[indices] = True
        predictors.append(Predictor(kind, _rank(file, layer), thresholds[layer], hot))
    return predictors


def _rank(file: GGUFFile, layer: int) -> int:
    """The rows of fc1: 0 where it is missing or no matrix, which whoever reads it says."""
    fc1 = file.tensors.get(f"blk.{layer}.{FC1}")
    return fc1.shape[0] if fc1 and fc1.shape else 0


def _hot_neurons(file: GGUFFile, counts: list[Any], d_ff: int) -> np.ndarray:
    """The indices of all layers; FormatError unless they are as many as `counts` says, and below d_ff."""
    neurons = file.find("hotcold.hot.neurons", np.ndarray, np.empty(0, np.int32))
    whole = neurons.dtype.kind in "iu" and all(type(n) is int and n >= 0 for n in counts)
    neurons = neurons[: sum(counts)] if whole and neurons.ndim == 1 else neurons
    if not whole or len(neurons) != sum(counts) or (neurons < 0).any() or (neurons >= d_ff).any():
        raise FormatError("hot neurons do not fit the model", where=file.path, field="hotcold.hot.neurons")
    return neurons
