"""A third kind of predictor, as somebody might add one: least squares on random features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hotcold.predictor.kinds.table import Kind, Weights
from hotcold.predictor.training.data import LayerData
from hotcold.predictor.training.train import TrainOptions

TOY = Kind("toy", __name__, relu=True, bias=True, normed=False)


def train(
    data: LayerData, frequency: np.ndarray, options: TrainOptions, on_epoch: Callable[[float], None]
) -> Weights:
    rows = data.rows("train")
    fc1 = np.random.default_rng(options.seed).standard_normal((options.rank, data.x.shape[1]))
    hidden = np.maximum(data.inputs(rows, normed=False) @ fc1.T, 0)
    with_one = np.concatenate([hidden, np.ones((len(rows), 1))], axis=1)
    solution, _, _, _ = np.linalg.lstsq(with_one, data.labels(rows) - 0.5, rcond=None)
    on_epoch(0.0)
    return Weights(*(np.ascontiguousarray(part, np.float32) for part in (fc1, solution[:-1].T, solution[-1])))


def settings(options: TrainOptions) -> dict[str, Any]:
    return {"seed": options.seed}
