"""What tests ask of any engine: to continue a text, and to say the same of it at once and token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from stored_rows import relative_error


def greedy(engine: Any, n: int, ids: Sequence[int] | np.ndarray) -> list[int]:
    """The n tokens that follow the first five of `ids`."""
    logits, tokens = engine.prefill(ids[:5]), []
    for _ in range(n):
        tokens.append(int(logits.argmax()))
        logits = engine.decode(tokens[-1])
    return tokens


def check_logits(engine: Any, ids: np.ndarray, expected: np.ndarray, most: float) -> None:
    """Logits after each of `ids`, float32 [n, n_vocab], together and one by one, by their relative error."""
    assert relative_error(engine.prefill(ids, all_logits=True), expected) < most
    engine.reset()
    assert relative_error(np.stack([engine.decode(token) for token in ids]), expected) < most
