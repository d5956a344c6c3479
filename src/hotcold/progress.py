"""Progress of long steps: a tqdm bar on a terminal, a log line every 30 s elsewhere, never on stdout."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Progress", "log"]

_LOG_EVERY_S = 30.0


def log(message: str) -> None:
    """Print one line to stderr, where progress goes; stdout is for results."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Counts towards `total` units with rate and ETA.

    >>> with Progress("collect", total=1000, unit="tok") as progress:
    ...     progress.advance(100, sparsity=0.66)
    """

    def __init__(self, label: str, total: int, unit: str, *, start: int = 0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, start
        self._start, self._begun = start, time.monotonic()
        self._next_log = self._begun + _LOG_EVERY_S
        self._bar = self._make_bar() if sys.stderr.isatty() else None

    def _make_bar(self) -> tqdm:
        from tqdm import tqdm

        return tqdm(total=self.total, initial=self.done, desc=self.label, unit=self.unit, file=sys.stderr)

    def advance(self, units: int, **figures: float | str) -> None:
        """Move on by `units`; `figures` are shown at the end of the line."""
        self.done += units
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(units)
        elif time.monotonic() >= self._next_log:
            self._next_log = time.monotonic() + _LOG_EVERY_S
            self._log(figures)

    def _log(self, figures: dict[str, float | str]) -> None:
        elapsed = time.monotonic() - self._begun
        rate = (self.done - self._start) / elapsed if elapsed > 0 else 0.0
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        extra = "".join(
            f", {key} {value:.4g}" if isinstance(value, float) else f", {key} {value}"
            for key, value in figures.items()
        )
        done = f"{self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s"
        log(f"{self.label}: {done}, ETA {left:.0f} s{extra}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and time.monotonic() - self._begun > 2.0:
            self._log({})
