"""What every engine promises, whatever it computes on.

A model is loaded once, into an `Engine`; its weights never change. What one text has of its own, the keys and
values of its tokens, its position and its counts, is a `Sequence`, and an engine has as many as there is
memory for:

    engine = load_bundle("bundle")
    first, second = engine.sequence(), engine.sequence(n_ctx=512)

Each gives what it would give alone, in whatever order they are called. They may be called from several
threads: calls wait for each other, and two at once on one sequence are an error. A process forked after
loading can use neither engine nor sequences; `multiprocessing` with `spawn` can load its own.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence as Many
from typing import Self

import numpy as np

from hotcold.errors import InputError
from hotcold.runtime.stats import Stats

__all__ = ["Engine", "Sequence", "Stats", "check_context_size"]

_MOST_TOKENS = (1 << 31) - 1  # the native engine counts in 32 bits


class Sequence(ABC):
    """One text: tokens appended so far, logits of the next one, and what it took to compute them.

    It keeps its engine alive. Its cache is its own, and freed with it. `mode` is `dense`, `exact` or
    `predicted`, `n_ctx` the most tokens that it holds, `n_vocab` how many logits there are. Methods raise
    UnsupportedError if another thread is using the sequence, and in a forked process.
    """

    mode: str
    n_ctx: int
    n_vocab: int

    @property
    @abstractmethod
    def position(self) -> int:
        """Number of tokens in the cache."""

    @property
    @abstractmethod
    def audit(self) -> bool:
        """Predicted mode: also compute the gates that were left out, to count the misses. Costs speed."""

    @audit.setter
    @abstractmethod
    def audit(self, on: bool) -> None: ...

    @abstractmethod
    def prefill(self, ids: Many[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Append tokens; logits after the last one, float32 [n_vocab], or after each, [len(ids), n_vocab]."""

    def decode(self, token: int) -> np.ndarray:
        """Append one token; logits of the next one, float32 [n_vocab]."""
        return self.prefill([token])

    @abstractmethod
    def reset(self) -> None:
        """Forget all tokens; counts stay."""

    @abstractmethod
    def stats(self) -> Stats:
        """What was computed since `reset_stats()`."""

    @abstractmethod
    def reset_stats(self) -> None:
        """Start counting anew."""

    @abstractmethod
    def bytes_per_token(self, position: int | None = None) -> dict[str, float]:
        """Bytes that one decoded token needs, by part, at a cache position (default: the present one).

        Panels are read whole. Of matrices by input and of neuron rows counts what the tokens since
        `reset_stats()` needed, without padding to cache lines: inputs that were not left out, gate rows of
        predicted neurons, up and down rows of fired ones.
        """


class Engine(Sequence):
    """A loaded model. For those who need only one text it is a sequence itself: its first.

    `n_threads` is how many threads of the CPU compute.
    """

    n_threads: int
    _first: Sequence

    def sequence(self, n_ctx: int | None = None) -> Sequence:
        """A new text of this model, of at most `n_ctx` tokens (default: the engine's `n_ctx`).

        Raises InputError for more context than the model has positions for, UnsupportedError where a GPU has
        no memory for it.
        """
        n_ctx = self.n_ctx if n_ctx is None else n_ctx
        check_context_size(n_ctx)
        if n_ctx > self.n_ctx:
            self._check_context(n_ctx)
        return self._open(self, n_ctx)

    def _open_first(self) -> None:
        # It must not keep alive what keeps it alive: weights are freed when the engine is dropped.
        self._first = self._open(weakref.proxy(self), self.n_ctx)

    @abstractmethod
    def _open(self, engine: Self, n_ctx: int) -> Sequence:
        """A sequence of `engine`, which is this one or a weak reference to it."""

    @abstractmethod
    def _check_context(self, n_ctx: int) -> None:
        """Raise InputError for more context than the model has positions for."""

    @property
    def position(self) -> int:
        return self._first.position

    @property
    def audit(self) -> bool:
        return self._first.audit

    @audit.setter
    def audit(self, on: bool) -> None:
        self._first.audit = on

    def prefill(self, ids: Many[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        return self._first.prefill(ids, all_logits)

    def reset(self) -> None:
        self._first.reset()

    def stats(self) -> Stats:
        return self._first.stats()

    def reset_stats(self) -> None:
        self._first.reset_stats()

    def bytes_per_token(self, position: int | None = None) -> dict[str, float]:
        return self._first.bytes_per_token(position)


def check_context_size(n_ctx: int) -> None:
    """Raise InputError unless so many tokens can be counted."""
    if not 1 <= n_ctx <= _MOST_TOKENS:
        expected = f"1 to {_MOST_TOKENS} tokens"
        raise InputError("context size out of range", got=n_ctx, expected=expected, fix="change -c")
