"""Every number of the `relu` method in one place, with the defaults that were tuned on SmolLM2-135M.

No torch in here: the command line shows these defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hotcold.errors import InputError
from hotcold.sparsify.schedule import ProgressiveL1, Stage

__all__ = ["REDUCTIONS", "Recipe", "Reduction"]

Reduction = Literal["mean", "token_sum", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "token_sum", "sum")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long to train, on what, how fast. Lengths are tokens: a result does not depend on the machine.

    `layerwise_share` and `generated_share` are shares of all tokens; `l1_start`, `l1_full` and
    `quantise_from` are points of the end-to-end phase, from 0 to 1.
    """

    tokens: int = 220_000
    layerwise_share: float = 0.14
    generated_share: float = 0.65
    generated_passes: int = 2
    heldout_tokens: int = 8_192
    sequence: int = 256
    batch: int = 2
    layerwise_lr: float = 1e-3
    distill_lr: float = 1.4e-3
    warmup_steps: int = 20
    l1_peak: float = 0.03
    l1_start: float = 0.1
    l1_full: float = 0.6
    l1_reduction: Reduction = "mean"
    quantise_from: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError, naming the field, for a value out of its range."""
        least = 2 * self.step_tokens
        if self.tokens < least:
            raise InputError(
                "too few tokens to train on", where="tokens", got=self.tokens, expected=f">= {least}"
            )
        for name in ("layerwise_share", "generated_share", "l1_start", "l1_full", "quantise_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError("out of range", where=name, got=getattr(self, name), expected="0 to 1")
        if self.l1_peak < 0:
            raise InputError("the L1 factor must not be negative", where="l1_peak", got=self.l1_peak)
        if self.l1_reduction not in REDUCTIONS:
            known = " | ".join(REDUCTIONS)
            raise InputError("unknown reduction", where="l1_reduction", got=self.l1_reduction, expected=known)

    @property
    def step_tokens(self) -> int:
        """Tokens per optimiser step."""
        return self.batch * self.sequence

    @property
    def layerwise_steps(self) -> int:
        return max(1, round(self.tokens * self.layerwise_share) // self.step_tokens)

    @property
    def distill_steps(self) -> int:
        return max(1, self.tokens // self.step_tokens - self.layerwise_steps)

    def l1_schedule(self) -> ProgressiveL1:
        """Stage 0 until `l1_start`, a short warm-up at a tenth of the peak, then one ramp until `l1_full`."""
        start = round(self.l1_start * self.distill_steps)
        warm = max(start + 1, round((self.l1_start + 0.05) * self.distill_steps))
        full = max(warm + 1, round(self.l1_full * self.distill_steps))
        return ProgressiveL1([Stage(0.0, start), Stage(self.l1_peak / 10, warm), Stage(self.l1_peak, full)])
