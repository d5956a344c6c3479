"""Quality of one or several engines on the same windows: perplexity, and the distance to a reference.

Perplexity is exp of the mean negative log-likelihood (nll) over all scored positions. Its standard error is
ppl · sd(nll) / sqrt(n) (first-order, as llama.cpp's `llama-perplexity` gives it). Against a reference:
the share of positions with the same most likely token, and the mean of KL(reference ‖ engine) in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hotcold.errors import InputError
from hotcold.eval.sides import Side
from hotcold.finite import check_logits, perplexity_of

__all__ = ["Quality", "compare", "perplexity"]

_ROWS = (
    64  # positions worked at a time: 64 x 49k float32 logits are 12 MB, which caches like better than 100 MB
)


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality of an engine's distributions. `same_top` (share) and `kl` (nats) need a reference."""

    ppl: float
    stderr: float
    tokens: int
    same_top: float | None = None
    kl: float | None = None


@dataclass(slots=True)
class _Tally:
    nll: list[np.ndarray] = field(default_factory=list)
    same_top: list[np.ndarray] = field(default_factory=list)
    kl: list[np.ndarray] = field(default_factory=list)

    def quality(self) -> Quality:
        nll = np.concatenate(self.nll).astype(np.float64)
        ppl = perplexity_of(float(nll.mean()))
        spread = nll.std(ddof=1) if len(nll) > 1 else 0.0
        same_top = float(np.concatenate(self.same_top).mean()) if self.same_top else None
        kl = _mean_divergence(np.concatenate(self.kl)) if self.kl else None
        return Quality(ppl, float(ppl * spread / math.sqrt(len(nll))), len(nll), same_top, kl)


def perplexity(
    side: Side, windows: Sequence[np.ndarray], on_tokens: Callable[[int], None] = lambda _: None
) -> Quality:
    """Perplexity of one engine; `on_tokens` gets the number of tokens done, for progress bars."""
    return compare({"it": side}, windows, on_tokens=on_tokens)["it"]


def compare(
    sides: Mapping[str, Side],
    windows: Sequence[np.ndarray],
    reference: str | None = None,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> dict[str, Quality]:
    """Quality of each side on the same windows; the others are compared with the side named `reference`."""
    tallies = {name: _Tally() for name in sides}
    for ids in windows:
        truth = _logits(sides[reference], ids) if reference else None
        for name, side in sides.items():
            if name == reference and truth is not None:
                _score(tallies[name], truth, ids[1:], None)
            else:
                _score(tallies[name], _logits(side, ids), ids[1:], truth)
            on_tokens(len(ids))
    return {name: tally.quality() for name, tally in tallies.items()}


def _logits(side: Side, ids: np.ndarray) -> np.ndarray:
    """float32 [len(ids) - 1, n_vocab]: what each position after the first is predicted from."""
    side.reset()
    return side.prefill(ids, all_logits=True)[:-1]


def _score(tally: _Tally, logits: np.ndarray, targets: np.ndarray, truth: np.ndarray | None) -> None:
    """Add one window: logits and truth float32 [n, n_vocab], targets int [n]."""
    for at in range(0, len(targets), _ROWS):
        rows = slice(at, at + _ROWS)
        log_p = _log_softmax(logits[rows])  # -inf for masked tokens
        tally.nll.append(-np.take_along_axis(log_p, targets[rows, None].astype(np.intp), axis=1)[:, 0])
        if truth is not None:
            log_t = _log_softmax(truth[rows])
            tally.same_top.append(log_p.argmax(axis=1) == log_t.argmax(axis=1))
            tally.kl.append(_divergence(log_t, log_p))


def _mean_divergence(kl: np.ndarray) -> float:
    mean = max(0.0, float(kl.mean()))  # rounding may go below
    if not math.isfinite(mean):
        raise InputError(
            "the KL divergence is not finite: a token that the reference allows has probability 0 here"
        )
    return mean


def _divergence(log_t: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """KL of each row, float64: what the reference never says costs nothing."""
    share = np.exp(log_t)
    difference = np.subtract(log_t, log_p, out=np.zeros_like(log_t), where=share > 0)
    return (share * difference).sum(axis=1, dtype=np.float64)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise, float32, safe for large logits; InputError for those that are not finite."""
    shifted = logits - check_logits(logits)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
