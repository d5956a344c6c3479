"""Training the predictor of one layer on its traces.

Of the three parts of the tokens, a kind's trainer fits its weights to `train` (and may choose between
epochs by `calibrate`), `calibrate` chooses the threshold, and the metrics are those of `test`. The
threshold is chosen on the scores that it will be compared with, which exist for some thousand tokens at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from hotcold.errors import InputError
from hotcold.predictor.bundle import LayerPredictor
from hotcold.predictor.kinds.table import KINDS, LOWRANK_MLP, Kind, Weights
from hotcold.predictor.training.data import LayerData, chunks
from hotcold.predictor.training.metrics import measure
from hotcold.predictor.training.thresholds import choose_threshold
from hotcold.text import Part

__all__ = ["LayerData", "TrainOptions", "default_rank", "train_layer"]

_RANK_BLOCK = 32  # values in a quantized block: rows of fc2 must be whole blocks


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How every layer is trained; a kind's `settings` are those that it takes. InputError for bad values."""

    rank: int
    target_recall: float = 0.97
    epochs: int = 10
    batch: int = 512
    learning_rate: float = 1e-2
    weight_decay: float = 0.01
    patience: int = 3  # epochs without a better loss on calibrate
    seed: int = 0
    kind: str = LOWRANK_MLP

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            known = " | ".join(KINDS)
            raise InputError("unknown kind of predictor", where="--kind", got=self.kind, expected=known)
        if self.rank < 1 or self.rank % _RANK_BLOCK:
            raise InputError(
                "this rank cannot be quantized",
                where="--rank", got=self.rank, expected=f"a multiple of {_RANK_BLOCK}",
            )  # fmt: skip
        if not 0 < self.target_recall <= 1:
            raise InputError(
                "out of range", where="--target-recall", got=self.target_recall, expected="above 0, at most 1"
            )
        for name in ("epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise InputError("must be positive", where=f"--{name}", got=getattr(self, name))


def default_rank(d_model: int) -> int:
    """4·sqrt(d_model), rounded up to a multiple of 64: 128 for 576, 256 for 4096.

    Every token reads rank·(d_model + d_ff) weights of the predictor. A rank in proportion to d_model would
    cost the same share of the FFN at any size; a big model, which is sparser, would save less than it
    could.
    """
    return 64 * max(1, round(4 * d_model**0.5 / 64 + 0.49))


def train_layer(data: LayerData, options: TrainOptions, on_epoch: Callable[[float], None]) -> LayerPredictor:
    """Train the weights, choose the threshold on calibrate, and measure on test.

    `on_epoch` is told a loss as the training goes on. The result depends on data, options, and torch's number
    of threads alone.
    """
    kind, frequency = KINDS[options.kind], data.firing_frequency()
    weights = kind.trainer.train(data, frequency, options, on_epoch)
    return _calibrated(kind, weights, frequency, data, options.target_recall)


def _calibrated(
    kind: Kind, weights: Weights, frequency: np.ndarray, data: LayerData, target_recall: float
) -> LayerPredictor:
    """Choose the threshold on the scores of calibrate, and measure on those of test."""

    def scored(part: Part) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows in chunks(data.rows(part)):
            scores = kind.scores(weights, data.inputs(rows, normed=kind.normed))
            yield scores, data.labels(rows).astype(bool)

    rows = data.rows("calibrate")
    starts = np.zeros(len(rows), bool) if data.starts is None else data.starts[rows]
    threshold = choose_threshold(lambda: scored("calibrate"), starts, target_recall)
    metrics = measure(scored("test"), threshold)
    return LayerPredictor(weights.fc1, weights.fc2, threshold, frequency, metrics, weights.bias, kind)
