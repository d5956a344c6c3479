"""The kind `svd`: the model's own gates, cut to a low rank where the traces say that it hurts least (SVDP).

With C the damped second moment of the FFN's inputs h on the train tokens, and C = S Sᵀ, the gate matrix W
is cut as `W S ≈ U_r Σ_r V_rᵀ`, which of all cuts to rank r leaves the gates the least mean squared error on
such inputs. The scores are `U_r Σ_r · V_rᵀ S⁻¹ h`, two matrices with nothing between them: closed form,
seconds per layer. The inverse is never formed, since `V_rᵀ S⁻¹ = Σ_r⁻¹ U_rᵀ W`. (arXiv 2603.14110.)

**The bias.** A gate is its score and an error, which is larger in some neurons than in others. Where neuron
j fires from τ_j on, and its error is about normal with deviation σ_j, the odds that it fires are above a
given number iff `score_j + k·σ_j >= τ_j`, with one k for all neurons. To compute exactly these is the
sparsest way to a recall of the whole layer. (A bias that gives each neuron the same recall is worse than
none: it asks for most of the tokens of a neuron that is hard to predict.) σ_j is what the cut leaves of row
j of W S. τ_j is what the traces say: the gate that as many tokens reach as the neuron fired on; this holds
for thresholds of any rule. k is chosen for the target recall. The bias is `k·σ_j - τ_j`, so that a layer's
threshold is near 0, in units of the gate.

With SiLU or GELU a rule may look at |act(gate)|. The score stays the gate: |silu| is at most 0.28 where the
gate is negative (near a gate of -1.28), so above such a threshold nothing is lost; below it, those neurons
are missed unless the layer's threshold lets them in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hotcold.model.gates import LayerGates
from hotcold.predictor.kinds.table import Weights
from hotcold.predictor.training.data import LayerData, chunks
from hotcold.predictor.training.thresholds import threshold_for_recall
from hotcold.predictor.training.train import TrainOptions

__all__ = ["settings", "train"]

_DAMPING = 0.01  # of the mean square of an input, added to each: directions that the traces hardly saw
_SAMPLE = 8192  # train tokens, evenly spaced, on which the bias is chosen
_NEURONS = 1024  # whose gates are held at a time
_LEAST = 1e-6  # singular values below this part of the greatest are rounding


def train(
    data: LayerData, frequency: np.ndarray, options: TrainOptions, on_epoch: Callable[[float], None]
) -> Weights:
    """Cut the gates and choose the bias; `on_epoch` is told once which share of the gates' square is lost."""
    gates = data.gates
    if gates is None:
        raise ValueError("the gates come with the data of kinds that need the model")
    whitened = gates.weight.astype(np.float64) @ np.linalg.cholesky(_second_moment(data))
    left, values = _principal(whitened, min(options.rank, *gates.weight.shape))
    inverse = np.divide(1, values, where=values > 0, out=np.zeros_like(values))
    fc1, fc2 = inverse[:, None] * (left.T @ gates.weight), left * values
    energy = np.square(whitened).sum(axis=1)
    lost = np.maximum(energy - np.square(fc2).sum(axis=1), 0)
    weights = Weights(fc1.astype(np.float32), fc2.astype(np.float32))
    bias = _bias(weights, gates, data, _deviation(lost, energy), options.target_recall)
    on_epoch(float(lost.sum() / energy.sum()))
    return Weights(weights.fc1, weights.fc2, bias)


def settings(options: TrainOptions) -> dict[str, Any]:
    """See `Trainer`: there is nothing to choose."""
    return {"damping": _DAMPING}


def _second_moment(data: LayerData) -> np.ndarray:
    """Mean of h hᵀ over the train tokens, damped, float64 [d_model, d_model]."""
    rows, width = data.rows("train"), data.x.shape[1]
    moment = np.zeros((width, width))
    for chunk in chunks(rows):
        h = data.inputs(chunk, normed=True).astype(np.float64)
        moment += h.T @ h
    moment /= len(rows)
    moment[np.diag_indices(width)] += _DAMPING * np.trace(moment) / width
    return moment


def _principal(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `rank` left singular vectors, as columns, and singular values; rounding counts as 0.

    By way of the small Gram matrix, since the other side is several times as long.
    """
    squares, right = np.linalg.eigh(matrix.T @ matrix)
    values = np.sqrt(np.maximum(squares[::-1][:rank], 0))
    values[values <= _LEAST * values[0]] = 0
    left = matrix @ right[:, ::-1][:, :rank]
    return np.divide(left, values, where=values > 0, out=np.zeros_like(left)), values


def _deviation(lost: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """σ of each neuron, float32 [d_ff]; a thousandth of a gate's size at least, as it divides."""
    return np.sqrt(np.maximum(lost, 1e-6 * energy.mean() + np.finfo(np.float32).tiny)).astype(np.float32)


def _bias(
    weights: Weights, gates: LayerGates, data: LayerData, deviation: np.ndarray, target_recall: float
) -> np.ndarray:
    """k·σ - τ, float32 [d_ff]."""
    train = data.rows("train")
    rows = train[np.linspace(0, len(train) - 1, min(_SAMPLE, len(train))).astype(np.int64)]
    points = _firing_points(gates, data, rows)

    def standardized() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for chunk in chunks(rows):
            scores = data.inputs(chunk, normed=True) @ weights.fc1.T @ weights.fc2.T
            yield (scores - points) / deviation, data.labels(chunk).astype(bool)

    return (-threshold_for_recall(standardized, target_recall) * deviation - points).astype(np.float32)


def _firing_points(gates: LayerGates, data: LayerData, rows: np.ndarray) -> np.ndarray:
    """τ of each neuron: as many gates of these tokens reach it as tokens fired; float32 [d_ff]."""
    h, labels = data.inputs(rows, normed=True), data.labels(rows)
    fired, points = labels.sum(axis=0, dtype=np.int64), np.empty(len(gates.weight), np.float32)
    for first in range(0, len(points), _NEURONS):
        block = slice(first, first + _NEURONS)
        values = np.sort(h @ gates.weight[block].T, axis=0)
        at = np.clip(len(rows) - fired[block], 0, len(rows) - 1)
        points[block] = np.take_along_axis(values, at[None], axis=0)[0]
    return points
