"""Who may compute: the sequences of an engine in turns, one call at a time on each, and no forked process.

The native engine sees to this itself and raises the errors of this file; engines on devices take a `Turns`.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from hotcold.errors import UnsupportedError

__all__ = ["Turns", "busy", "forked"]


class Turns:
    """The turns of one engine's sequences, in the process that loaded it, and in the order of callers: a lock
    would go to whoever runs, and a loop that decodes would keep it from the others."""

    def __init__(self) -> None:
        self._process, self._moved = os.getpid(), threading.Condition()
        self._line: deque[threading.Lock] = deque()

    @contextmanager
    def take(self, held: threading.Lock) -> Iterator[None]:
        """A turn of the sequence that has the lock `held`. UnsupportedError if it is used already, or after a
        fork."""
        if os.getpid() != self._process:
            raise forked()
        if not held.acquire(blocking=False):
            raise busy()
        self._line.append(held)
        try:
            with self._moved:
                self._moved.wait_for(lambda: self._line[0] is held)
            yield
        finally:  # also for who was interrupted while waiting
            with self._moved:
                self._line.remove(held)
                self._moved.notify_all()
            held.release()


def busy() -> UnsupportedError:
    """Two threads have called one sequence."""
    fix = "give each thread a sequence of its own, engine.sequence()"
    return UnsupportedError("another thread is using this sequence", fix=fix)


def forked() -> UnsupportedError:
    """The engine's threads, and a GPU's context, exist in the parent process alone."""
    fix = "load it in this process, or start processes with multiprocessing's `spawn`"
    return UnsupportedError("this process was forked from the one that loaded the model", fix=fix)
