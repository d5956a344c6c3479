"""A layer's firing rule as the operators take it: ids of `hotcold.model.firing`, thresholds on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hotcold.model.firing import FiringRule, Score, Value

__all__ = ["PLAIN_RELU", "LayerRule"]


@dataclass(frozen=True, slots=True)
class LayerRule:
    """Which gates fire and what they become. `each` is float32 [n] where neurons differ, else None."""

    value: int = Value.GATE
    score: int = Score.GATE
    threshold: float = torch.finfo(torch.float32).tiny
    each: Tensor | None = None

    @classmethod
    def of(
        cls, rule: FiringRule, layer: int, device: torch.device, order: np.ndarray | None = None
    ) -> LayerRule:
        """That of a layer, its neurons being in this `order`."""
        thresholds = rule.kernel_thresholds(layer)
        if len(thresholds) == 1:
            return cls(rule.rule.value, rule.rule.score, float(thresholds[0]))
        kept = thresholds if order is None else thresholds[order]
        return cls(rule.rule.value, rule.rule.score, 0.0, torch.from_numpy(kept.copy()).to(device))

    @property
    def clips_up(self) -> bool:
        """Whether up is rectified."""
        return self.score == Score.GATE_AND_UP

    def limit(self, index: Tensor | None = None) -> Tensor | float:
        """The thresholds of all neurons, or of those in `index`."""
        if self.each is None:
            return self.threshold
        return self.each if index is None else self.each[index]

    def take(self, index: Tensor) -> LayerRule:
        """The rule for some of the neurons."""
        each = None if self.each is None else self.each[index].contiguous()
        return LayerRule(self.value, self.score, self.threshold, each)


PLAIN_RELU = LayerRule()
