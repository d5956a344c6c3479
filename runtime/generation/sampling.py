"""Choose the next token: llama.cpp's samplers under llama.cpp's names, defaults and order, in numpy.

Order (llama.cpp, `common/common.h`, `samplers`): repeat penalty, top-k, top-p, min-p, temperature, draw. So
top-p and min-p see the model's own probabilities, before the temperature changes them. Mirostat, DRY, XTC,
typical and top-n-sigma, all off by default there, are not supported.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hotcold.errors import InputError
from hotcold.finite import check_logits

__all__ = ["Sampler", "SamplingParams", "candidates"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample; raises InputError for a value out of its range."""

    temp: float = 0.8  # 0: greedy
    top_k: int = 40  # 0: off
    top_p: float = 0.95  # 1: off
    min_p: float = 0.05  # 0: off
    repeat_penalty: float = 1.0  # 1: off
    repeat_last_n: int = 64  # number of recent tokens to penalize; -1: all
    seed: int = -1  # -1: a new one each time

    def __post_init__(self) -> None:
        ranges = {
            "temp": (self.temp >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "0 (off) to 1"),
            "repeat_penalty": (self.repeat_penalty > 0, "above 0; 1 is off"),
            "repeat_last_n": (self.repeat_last_n >= -1, "-1 (all) or more"),
            "seed": (self.seed >= -1, "-1 (a new one) or more"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                option = name.replace("_", "-")
                raise InputError(f"--{option} out of range", got=getattr(self, name), expected=expected)


class Sampler:
    """Draws tokens; the same params (with a seed), logits and history give the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = params.seed if params.seed >= 0 else secrets.randbits(32)
        self._rng = np.random.default_rng(self.seed)

    def sample(self, logits: np.ndarray, history: Sequence[int] = ()) -> int:
        """The next token id, given its logits, float32 [n_vocab], and all ids before it."""
        ids, probabilities = candidates(logits, history, self.params)
        cumulative = np.cumsum(probabilities)
        # Scaled by the last sum, which may differ slightly from 1 by rounding.
        drawn = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))
        return int(ids[min(drawn, len(ids) - 1)])


def candidates(
    logits: np.ndarray, history: Sequence[int], params: SamplingParams
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and probabilities (float64, summing to 1) of the tokens that may come next, most likely first.

    InputError if the logits are not finite; those of masked tokens may be -inf.
    """
    check_logits(logits)
    logits = penalize(logits, history, params.repeat_penalty, params.repeat_last_n)
    ids, logits = top_k(logits, 1 if params.temp == 0 else params.top_k)
    # Both filters keep a prefix of the sorted candidates.
    kept = min(top_p(logits, params.top_p), min_p(logits, params.min_p))
    return ids[:kept], softmax(logits[:kept] / (params.temp or 1.0))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64, in the order of `logits`."""
    weights = np.exp((logits - logits.max()).astype(np.float64))
    return weights / weights.sum()


def penalize(logits: np.ndarray, history: Sequence[int], penalty: float, last_n: int) -> np.ndarray:
    """Make each of the last `last_n` tokens less likely, once: divide positive logits, multiply others."""
    recent = history if last_n < 0 else history[max(0, len(history) - last_n) :]
    if penalty == 1 or not len(recent):
        return logits
    seen = np.unique(np.asarray(recent, np.int64))
    penalized = logits.copy()
    penalized[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return penalized


def top_k(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits of the `k` most likely tokens (0: all), most likely first, for ties the lower id
    first."""
    ids = np.arange(len(logits))
    if 0 < k < len(logits):
        # Everything that ties with the k-th stays in until the stable sort has put lower ids first.
        least = logits[np.argpartition(logits, -k)[-k:]].min()
        ids = np.flatnonzero(logits >= least)
    order = np.argsort(-logits[ids], kind="stable")[: k or None]
    return ids[order], logits[ids[order]]


def top_p(logits: np.ndarray, p: float) -> int:
    """How many of the sorted candidates hold a probability of `p` together (Holtzman et al., 2019)."""
    if p >= 1:
        return len(logits)
    return min(len(logits), int(np.searchsorted(np.cumsum(softmax(logits)), p)) + 1)


def min_p(logits: np.ndarray, p: float) -> int:
    """How many sorted candidates are at least `p` times as likely as the first one (Nguyen et al., 2024)."""
    if p <= 0:
        return len(logits)
    return int(np.count_nonzero(logits >= logits[0] + np.log(p)))
