"""What the runtime really computed: neurons fired, predicted and missed, and the ratios shown to users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Stats", "show_inputs"]


def show_inputs(shares: Mapping[str, float]) -> str:
    """The shares of inputs that were left out, by site: `qkv 40.1%, o 39.8%`."""
    return ", ".join(f"{site} {share:.1%}" for site, share in shares.items())


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts per layer, summed over `tokens` tokens; every array is int64 [n_layers].

    `fired` counts neurons that were computed and gave act(gate)·up != 0 (the native engine looks at the gate
    alone, which with dReLU is not the same), `predicted` those that were not skipped outright (in `dense` and
    `exact` mode all of them), `missed` those that would have fired but were skipped. Finding the missed ones
    takes a dense FFN beside the sparse one: counted only if `audit` is on. `inputs` has, for each site of
    `hotcold.model.inputs` where inputs may be left out, how many there were and how many counted.
    """

    tokens: int
    d_ff: int
    fired: np.ndarray
    predicted: np.ndarray
    missed: np.ndarray
    audit: bool = False
    inputs: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def input_sparsity(self) -> dict[str, float]:
        """By site, the share of inputs that were left out, over layers and tokens, first ones included."""
        return {site: 1 - kept / seen for site, (seen, kept) in self.inputs.items()}

    @property
    def sparsity(self) -> float:
        """Share of neurons that did not fire, mean over layers and tokens (ProSparse, section 3.1)."""
        return self._share_left_out(self.fired)

    @property
    def predicted_sparsity(self) -> float:
        """Share of neurons that were predicted inactive, mean over layers and tokens."""
        return self._share_left_out(self.predicted)

    @property
    def recall(self) -> float:
        """Share of firing neurons that were computed, mean over layers; NaN without `audit`."""
        if not self.audit or not self.tokens:
            return float("nan")
        would_fire = self.fired + self.missed
        # A layer in which nothing would fire has missed nothing.
        per_layer = np.where(would_fire > 0, self.fired / np.maximum(would_fire, 1), 1.0)
        return float(per_layer.mean())

    def _share_left_out(self, counts: np.ndarray) -> float:
        """NaN before the first token."""
        return float(1.0 - counts.mean() / (self.tokens * self.d_ff)) if self.tokens else float("nan")
