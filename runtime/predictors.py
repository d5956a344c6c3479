"""What a GGUF file says of its predictors, per layer: weights, threshold on raw logits, hot neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hotcold.errors import FormatError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model.metadata import per_layer
from hotcold.model.weights import FileWeights, Packed

__all__ = ["Predictor", "read_predictors"]


@dataclass(frozen=True, slots=True)
class Predictor:
    """One layer's."""

    weights: FileWeights
    layer: int
    threshold: float
    hot: np.ndarray  # bool [d_ff]: always computed

    @property
    def rank(self) -> int:
        """Between its two matrices."""
        return self.weights.tensor("fc1", self.layer).shape[0]

    def fc1(self) -> Packed:
        """[rank, d_model]. Raises FormatError or ShapeError."""
        return self.weights.packed("fc1", self.layer, (self.rank, self.weights.spec.d_model))

    def fc2(self) -> Packed:
        """[d_ff, rank]. Raises FormatError or ShapeError."""
        return self.weights.packed("fc2", self.layer, (self.weights.spec.d_ff, self.rank))


def read_predictors(weights: FileWeights) -> list[Predictor]:
    """One per layer. PowerInfer's own files have one threshold for all layers and no hot neurons.

    Raises UnsupportedError for a file without predictors.
    """
    if not weights.has("fc1"):
        raise UnsupportedError("no predictors in this file", where=weights.path, fix="use --mode exact")
    file, n, d_ff = weights.file, weights.spec.n_layers, weights.spec.d_ff
    one_for_all = file.find("powerinfer.sparse_threshold", float, 0.0)
    thresholds = per_layer(file, "hotcold.predictor.thresholds", n, one_for_all)
    counts = per_layer(file, "hotcold.hot.counts", n, 0)
    neurons = _hot_neurons(file, counts, d_ff)
    predictors = []
    for layer, indices in enumerate(np.split(neurons, np.cumsum(counts))[:n]):
        hot = np.zeros(d_ff, bool)
        hot[indices] = True
        predictors.append(Predictor(weights, layer, thresholds[layer], hot))
    return predictors


def _hot_neurons(file: GGUFFile, counts: list[Any], d_ff: int) -> np.ndarray:
    """The indices of all layers; FormatError unless they are as many as `counts` says, and below d_ff."""
    neurons = file.find("hotcold.hot.neurons", np.ndarray, np.empty(0, np.int32))
    whole = neurons.dtype.kind in "iu" and all(type(n) is int and n >= 0 for n in counts)
    neurons = neurons[: sum(counts)] if whole and neurons.ndim == 1 else neurons
    if not whole or len(neurons) != sum(counts) or (neurons < 0).any() or (neurons >= d_ff).any():
        raise FormatError("hot neurons do not fit the model", where=file.path, field="hotcold.hot.neurons")
    return neurons
