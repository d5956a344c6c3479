"""How good a predictor is: recall, precision and sparsity, counted as ProSparse counts them.

Recall is micro-averaged over the tokens of a layer, and layers are averaged with equal weight (arXiv
2402.13516 section 3.1 and appendix C; DejaVu_predictor's compute_avg_metrics.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["LayerMetrics", "mean_metrics", "measure", "table"]

_SHARES = ("recall", "precision", "predicted_sparsity", "true_sparsity")


@dataclass(frozen=True, slots=True)
class LayerMetrics:
    """Shares in 0..1 over the test tokens of one layer, or their means over layers."""

    recall: float  # of the neurons that fired, those predicted
    precision: float  # of the neurons predicted, those that fired
    predicted_sparsity: float  # of all neurons, those not predicted
    true_sparsity: float  # of all neurons, those that did not fire

    def to_json(self) -> dict[str, float]:
        """The shares by name."""
        return asdict(self)


def measure(chunks: Iterable[tuple[np.ndarray, np.ndarray]], threshold: float) -> LayerMetrics:
    """Metrics of `logits >= threshold` against `active`, counted over chunks: float and bool [tokens, d_ff].

    Recall is 1 where nothing fired, precision 1 where nothing was predicted: there was nothing to get wrong.
    """
    hits = fired = chosen = neurons = 0
    for logits, active in chunks:
        predicted = logits >= np.float32(threshold)
        hits += np.count_nonzero(predicted & active)
        fired, chosen = fired + np.count_nonzero(active), chosen + np.count_nonzero(predicted)
        neurons += active.size
    outcomes = [hits, fired - hits, chosen - hits, neurons - fired - chosen + hits]
    recall, precision = _recall_and_precision(outcomes)
    return LayerMetrics(recall, precision, float(1 - chosen / neurons), float(1 - fired / neurons))


def _recall_and_precision(outcomes: list[int]) -> tuple[float, float]:
    """scikit-learn's, of one sample per outcome (hit, miss, false alarm, rightly left out) by its count."""
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, _, _ = precision_recall_fscore_support(
        [1, 1, 0, 0], [1, 0, 1, 0], sample_weight=outcomes, average="binary", zero_division=1.0
    )
    return float(recall), float(precision)


def mean_metrics(layers: list[LayerMetrics]) -> LayerMetrics:
    """Means over layers, each layer with the same weight."""
    return LayerMetrics(*(float(np.mean([getattr(layer, name) for layer in layers])) for name in _SHARES))


def table(ranks: list[int], thresholds: list[float], layers: list[LayerMetrics]) -> str:
    """A Markdown table, one row per layer and one of means."""
    rows = [
        _row(str(number), str(rank), f"{threshold:.3f}", metrics)
        for number, (rank, threshold, metrics) in enumerate(zip(ranks, thresholds, layers, strict=True))
    ]
    mean = _row("mean", f"{np.mean(ranks):g}", "", mean_metrics(layers))
    head = ["layer", "rank", "threshold", *(name.replace("_", " ") for name in _SHARES)]
    return "\n".join([_line(head), "|" + "---:|" * len(head), *rows, mean])


def _row(layer: str, rank: str, threshold: str, metrics: LayerMetrics) -> str:
    return _line([layer, rank, threshold, *(f"{getattr(metrics, name):.4f}" for name in _SHARES)])


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(cells) + " |"
