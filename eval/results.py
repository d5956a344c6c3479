"""What a benchmark found, as plain values: rows of speed with the quality that was paid for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from hotcold.eval.perplexity import Quality
from hotcold.eval.roofline import Roofline

__all__ = ["Activity", "Report", "Row", "Spread"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of the repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(float(median(samples)), float(min(samples)), float(max(samples)))


@dataclass(frozen=True, slots=True)
class Activity:
    """What one of our modes computed on the benchmark's tokens; `parts` are bytes per token.

    What a mode does not tell is NaN: a dense one has no sparsity, and only predicted mode predicts.
    """

    sparsity: float
    predicted_sparsity: float
    recall: float
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One side. Speeds in tokens/s; ratios are to the fastest llama.cpp of each kind, from paired rounds.

    `share` is that of the read bandwidth beside each run which generation reached.
    """

    side: str
    prompt: Spread
    generation: Spread
    ratio_prompt: Spread
    ratio: Spread
    roofline: Roofline
    share: Spread
    activity: Activity | None = None
    quality: Quality | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of one benchmark, with what they were measured on.

    `baseline` and `baseline_prompt` name the rows that the ratios of generation and of prompts are taken to;
    `bandwidth` is the machine's read bandwidth in GB/s with plain loads, `bandwidth_asking` that of loads
    which are asked for ahead. `settings` and `machine` are shown as they are.
    """

    rows: Sequence[Row]
    baseline: str
    baseline_prompt: str
    bandwidth: Spread
    bandwidth_asking: Spread
    settings: Mapping[str, object] = field(default_factory=dict)
    machine: Mapping[str, object] = field(default_factory=dict)
