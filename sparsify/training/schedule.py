"""Schedules over steps: ProSparse's stages of the L1 factor, or a controller of it, and the learning rate.

The L1 factor follows Algorithm 1 of ProSparse (arXiv 2402.13516, appendix B): nothing during stage 0, a
constant first peak during the warm-up, then one sine ramp per stage from peak to peak. Ramps are flat at both
ends, so that the model is never pushed abruptly into a sparser regime.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hotcold.errors import InputError

__all__ = ["ProgressiveL1", "Stage", "TargetSparsity", "cosine", "wsd"]


@dataclass(frozen=True, slots=True)
class Stage:
    """The factor's `peak`, reached at step `end`, counted from the start of training."""

    peak: float
    end: int


class ProgressiveL1:
    """The factor λ(step) of the L1 term for stages 0, 1, …, S.

    Stage 0 (peak 0) and stage 1 (the warm-up) are constant; stage i >= 2 rises from the peak before it as
    λ = λ[i-1] + sin²(πu/2) (λ[i] - λ[i-1]), u = (step - T[i-1]) / (T[i] - T[i-1]). Then λ stays.

    >>> l1 = ProgressiveL1([Stage(0.0, 10), Stage(0.1, 20), Stage(0.5, 40)])
    >>> l1(10), l1(15), l1(30), l1(40)
    (0.0, 0.1, 0.3, 0.5)
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        """Raises InputError unless the peaks start at 0 and never fall, and the ends rise from 0 or more."""
        peaks, ends = [stage.peak for stage in stages], [stage.end for stage in stages]
        if not stages or peaks[0] != 0:
            raise InputError("stage 0 of the L1 schedule must have peak 0", got=peaks[:1])
        if peaks != sorted(peaks):
            raise InputError("the peaks of the L1 schedule must not fall", got=peaks)
        if ends[0] < 0 or any(later <= earlier for earlier, later in pairwise(ends)):
            raise InputError("the ends of the L1 stages must rise", got=ends)
        self.stages = tuple(stages)

    def __call__(self, step: int) -> float:
        """λ at `step` = 1, 2, …"""
        for index, stage in enumerate(self.stages):
            if step <= stage.end:
                return stage.peak if index < 2 else self._ramp(index, step)
        return self.stages[-1].peak

    def _ramp(self, index: int, step: int) -> float:
        before, stage = self.stages[index - 1], self.stages[index]
        u = (step - before.end) / (stage.end - before.end)
        return before.peak + math.sin(math.pi * u / 2) ** 2 * (stage.peak - before.peak)


class TargetSparsity:
    """The L1 factor as a controller sets it from the measured density, as ReMoE does (arXiv 2412.14711).

    While the model is denser than wanted the factor grows by `multiplier` each step, else it shrinks.
    """

    def __init__(self, target: float, start: float, multiplier: float, first_step: int) -> None:
        self.target, self.start, self.multiplier, self.first_step = target, start, multiplier, first_step
        self.factor = start

    def __call__(self, step: int) -> float:
        """λ at `step`: 0 until `first_step`, the end of stage 0."""
        return self.factor if step > self.first_step else 0.0

    def observe(self, step: int, sparsity: float) -> None:
        """Take into account the sparsity that `step` had."""
        if step > self.first_step:
            grown = self.factor * self.multiplier if sparsity < self.target else self.factor / self.multiplier
            self.factor = max(grown, self.start)


def cosine(step: int, steps: int, warmup: int, floor: float = 0.05) -> float:
    """Factor on the peak learning rate at `step` = 1 … `steps`: linear warm-up, then a cosine to `floor`."""
    rise = min(1.0, step / warmup) if warmup else 1.0
    return rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def wsd(step: int, steps: int, warmup: int, floor: float = 0.05, decay_share: float = 0.1) -> float:
    """Factor on the peak learning rate: warm-up, stable, then an exponential decay to `floor`.

    As MiniCPM (arXiv 2404.06395) trained; the last `decay_share` of the steps decays.
    """
    rise = min(1.0, step / warmup) if warmup else 1.0
    begin = steps * (1 - decay_share)
    u = max(0.0, step - begin) / (steps - begin) if decay_share else 0.0
    return rise * floor**u
