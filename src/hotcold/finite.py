"""Numbers that are none: refused where weights come in and where logits come out.

One NaN in a norm makes every logit NaN, or, once quantized, a model of noise with a plausible perplexity.
Minimum and maximum pass NaN on, so two fast passes without temporaries decide it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

from hotcold.errors import FormatError, InputError

__all__ = ["all_finite", "check_logits", "check_weight", "not_finite", "perplexity_of"]

_MOST_NLL = math.log(sys.float_info.max)


def all_finite(values: np.ndarray) -> bool:
    """Whether no float is NaN or infinite."""
    with np.errstate(invalid="ignore"):
        return not values.size or bool(np.isfinite(values.min()) and np.isfinite(values.max()))


def check_weight(values: np.ndarray, name: str, where: str | Path | None) -> np.ndarray:
    """The same values; FormatError if one of them is NaN or infinite."""
    if not all_finite(values):
        raise not_finite(name, where)
    return values


def not_finite(name: str, where: str | Path | None, type_name: str = "") -> FormatError:
    """The error for a tensor with a NaN or an infinity, or a value beyond the range of `type_name`."""
    inside = f" in {type_name}" if type_name else ""
    where, field = (name, None) if where is None else (where, name)
    return FormatError(f"a value is not finite{inside}", where=where, field=field)


def perplexity_of(nll: float) -> float:
    """exp(nll); raises InputError if it is NaN or infinite (tokens with probability 0)."""
    if not nll < _MOST_NLL:
        fix = "check the model's weights, and that the text is for its tokenizer"
        raise InputError("the perplexity is not finite", got=f"{nll:.6g} nats per token", fix=fix)
    return math.exp(nll)


def check_logits(logits: np.ndarray) -> np.ndarray:
    """The greatest logit of each row [..., n_vocab], as [..., 1].

    InputError if it is not a number: a NaN or an infinity among them, or nothing but masked tokens (-inf).
    """
    peak = logits.max(axis=-1, keepdims=True)
    if not np.isfinite(peak).all():
        got = next(float(value) for value in peak.flat if not np.isfinite(value))
        fix = "check the model's weights: some are not finite, or too large for their type"
        raise InputError("the model gives logits that are not finite", got=got, fix=fix)
    return peak
