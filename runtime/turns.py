"""Who may compute: the sequences of an engine in turns, one call at a time on each, and no forked process.

The native engine sees to this itself and raises the errors of this file; engines on devices take a `Turns`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hotcold.errors import UnsupportedError

__all__ = ["Turns", "busy", "forked"]


class Turns:
    """The turns of one engine's sequences, in the process that loaded it."""

    def __init__(self) -> None:
        self._turn, self._process = threading.Lock(), os.getpid()

    @contextmanager
    def take(self, held: threading.Lock) -> Iterator[None]:
        """A turn of the sequence that has the lock `held`. UnsupportedError if it is used already, or after a
        fork."""
        if os.getpid() != self._process:
            raise forked()
        if not held.acquire(blocking=False):
            raise busy()
        try:
            with self._turn:
                yield
        finally:
            held.release()


def busy() -> UnsupportedError:
    """Two threads have called one sequence."""
    fix = "give each thread a sequence of its own, engine.sequence()"
    return UnsupportedError("another thread is using this sequence", fix=fix)


def forked() -> UnsupportedError:
    """The engine's threads, and a GPU's context, exist in the parent process alone."""
    fix = "load it in this process, or start processes with multiprocessing's `spawn`"
    return UnsupportedError("this process was forked from the one that loaded the model", fix=fix)
