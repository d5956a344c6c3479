"""Whether the engines on a device agree with the CPU engine.

The CPU engine continues a prompt greedily, and every other engine is given the same tokens one by one. So one
near tie that goes the other way does not make everything after it incomparable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hotcold import table
from hotcold.eval.gpu.bench import GpuSide
from hotcold.finite import check_logits
from hotcold.progress import Progress
from hotcold.runtime.backends import BackendOptions, open_engine

__all__ = ["Agreement", "agreement", "as_table"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """One side against the CPU engine in the same mode, over `tokens` greedy tokens.

    `first_difference` is the first step at which another token would have been taken, `lead` by how much the
    CPU engine's logit of its token led there, in units of the root mean square difference of all logits at
    that step. `worst_error` is the greatest such difference of any step, relative to the logits' own.
    """

    name: str
    tokens: int
    alike: int
    first_difference: int | None
    lead: float | None
    worst_error: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def agreement(
    bundle: str | Path,
    sides: Sequence[GpuSide],
    prompt: np.ndarray,
    n_tokens: int,
    *,
    device: str,
    n_threads: int,
) -> list[Agreement]:
    """Compare all of `sides`; the CPU engine runs once per mode."""
    n_ctx, expected, found = len(prompt) + n_tokens, {}, []

    def open_side(backend: str, side: GpuSide) -> Any:
        options = BackendOptions(backend, device, f"{side.budget}B" if side.budget else "auto")
        return open_engine(bundle, side.mode, n_threads, n_ctx, options)

    with Progress("compare", total=len(sides), unit="side") as progress:
        for side in sides:
            if side.mode not in expected:
                expected[side.mode] = _logits(open_side("cpu", side), prompt, n_tokens, _greedy)
            tokens, logits = expected[side.mode]
            _, got = _logits(open_side(side.backend, side), prompt, n_tokens, lambda i, _, t=tokens: t[i])
            found.append(_compared(side.name, tokens, logits, got))
            progress.advance(1, side=side.name, alike=found[-1].alike)
    return found


def _greedy(_: int, logits: np.ndarray) -> int:
    return int(logits.argmax())


def _logits(
    engine: Any, prompt: np.ndarray, n_tokens: int, choose: Callable[[int, np.ndarray], int]
) -> tuple[list[int], np.ndarray]:
    """The tokens that were chosen, and the logits [n_tokens, n_vocab] before each."""
    logits, tokens = [engine.prefill(prompt)], []
    for i in range(n_tokens):
        check_logits(logits[-1])
        tokens.append(choose(i, logits[-1]))
        if i + 1 < n_tokens:
            logits.append(engine.decode(tokens[-1]))
    return tokens, np.stack(logits)


def _compared(name: str, tokens: Sequence[int], expected: np.ndarray, got: np.ndarray) -> Agreement:
    alike = got.argmax(1) == np.array(tokens)
    error = np.sqrt(np.mean(np.square(got - expected), 1))
    first = None if alike.all() else int(alike.argmin())
    lead = None
    if first is not None:
        ahead = expected[first, tokens[first]] - expected[first, got[first].argmax()]
        lead = float(ahead / error[first])
    worst = float(np.max(error / np.sqrt(np.mean(np.square(expected), 1))))
    return Agreement(name, len(tokens), int(alike.sum()), first, lead, worst)


def as_table(rows: Sequence[Agreement]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        first = "–" if row.first_difference is None else str(row.first_difference)
        lead = "–" if row.lead is None else f"{row.lead:.2f}"
        lines.append((row.name, f"{row.alike}/{row.tokens}", first, lead, f"{row.worst_error:.1e}"))
    return table.markdown(
        ("side", "tokens alike", "first other", "its lead, in errors", "worst error"), lines
    )
