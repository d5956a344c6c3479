"""The results of a benchmark, as plain values: rows with speed and quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from hotcold.eval.perplexity import Quality
from hotcold.eval.roofline import Roofline

__all__ = ["CONFIDENCE", "Activity", "Ratio", "Report", "Row", "Spread", "StockSpeed"]

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of the repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float] | np.ndarray) -> Spread:
        return cls(float(median(samples)), float(min(samples)), float(max(samples)))


@dataclass(frozen=True, slots=True)
class Ratio(Spread):
    """A speed over another one, from paired rounds, with a confidence interval.

    The interval is Student's t over the logarithms of the rounds' own ratios, turned back: that of their
    geometric mean (the paired comparison of Georges, Buytaert and Eeckhout, "Statistically rigorous Java
    performance evaluation", OOPSLA 2007, on logarithms, in which a ratio and its inverse weigh the same). It
    assumes independent rounds, which is why each has its own order and piece of text. For one round there is
    no interval: NaN.
    """

    ci_low: float
    ci_high: float

    @classmethod
    def of(cls, samples: Sequence[float] | np.ndarray) -> Ratio:
        spread, logs = Spread.of(samples), np.log(np.asarray(samples, dtype=np.float64))
        if len(logs) < 2:
            return cls(spread.median, spread.low, spread.high, float("nan"), float("nan"))
        from scipy.stats import t

        error = logs.std(ddof=1) / len(logs) ** 0.5
        half = t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * error
        low, high = np.exp([logs.mean() - half, logs.mean() + half]).tolist()
        return cls(spread.median, spread.low, spread.high, low, high)


@dataclass(frozen=True, slots=True)
class StockSpeed:
    """What a stock llama-bench says of the file of the row `side`: mean and standard deviation, tokens/s."""

    side: str
    build: str
    depth: int  # tokens in the cache before either test
    prompt: tuple[float, float]
    generation: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Activity:
    """What one of our modes computed on the benchmark's tokens; `parts` are bytes per token.

    What does not apply to a mode is NaN: dense has no sparsity, and only predicted mode predicts.
    """

    sparsity: float
    predicted_sparsity: float
    recall: float
    parts: Mapping[str, float]
    inputs: Mapping[str, float] = field(default_factory=dict)  # by site: the share of inputs left out


@dataclass(frozen=True, slots=True)
class Row:
    """One side. Speeds in tokens/s; ratios are to the fastest llama.cpp of each kind, from paired rounds.

    `to_originals` has the ratios of generation to the sides of the model that was made sparse, by their
    names. `share` is the part of the read bandwidth, measured beside each run, that generation reached.
    """

    side: str
    prompt: Spread
    generation: Spread
    ratio_prompt: Ratio
    ratio: Ratio
    roofline: Roofline
    share: Spread
    activity: Activity | None = None
    quality: Quality | None = None
    to_originals: Mapping[str, Ratio] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of one benchmark, with what they were measured on.

    `baseline` and `baseline_prompt` name the rows that the ratios of generation and of prompts are taken to,
    `truth` the llama.cpp that computes the same function as ours. `bandwidth` is the best read bandwidth that
    was measured beside each run, in GB/s, of which `bandwidth_plain` has the readings with plain loads and
    `bandwidth_prefetching` those with prefetching. `settings` and `machine` are shown as they are.
    """

    rows: Sequence[Row]
    baseline: str
    baseline_prompt: str
    truth: str
    bandwidth: Spread
    bandwidth_plain: Spread
    bandwidth_prefetching: Spread
    stock: Sequence[StockSpeed] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    machine: Mapping[str, object] = field(default_factory=dict)
