"""The generation loop: process the prompt, then sample and decode until something ends it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Many
from typing import Literal

import numpy as np

from hotcold.errors import InputError
from hotcold.runtime.engine import Sequence
from hotcold.runtime.generation.sampling import Sampler

__all__ = ["Generation"]


class Generation:
    """Iterate over it once to get the generated ids; counts and times are valid at any time, also after
    Ctrl-C.

    `n_decoded` tokens were run through the model one by one in `decode_seconds`, not counting sampling (this
    is llama.cpp's "eval time"). The first generated token comes from the prompt's logits and does not count.
    """

    def __init__(
        self,
        sequence: Sequence,
        prompt: Many[int],
        sampler: Sampler,
        *,
        n_predict: int = -1,
        stop_ids: Collection[int] = (),
    ) -> None:
        """`n_predict` -1: until a stop id or the end of the context. Raises InputError on a bad prompt."""
        room = sequence.n_ctx - sequence.position
        if not prompt:
            raise InputError("the prompt is empty")
        if len(prompt) >= room:
            fix = "raise -c or shorten it"
            raise InputError(
                "the prompt does not fit in the context",
                got=len(prompt),
                expected=f"less than {room}",
                fix=fix,
            )
        self._sequence, self._sampler, self._stop_ids = sequence, sampler, stop_ids
        self._history, self._n_predict = list(prompt), n_predict
        self.n_prompt, self.n_generated, self.n_decoded = len(prompt), 0, 0
        self.prompt_seconds = self.decode_seconds = 0.0
        self.stopped_by: Literal["", "n_predict", "stop_id", "context"] = ""

    def __iter__(self) -> Iterator[int]:
        started = time.perf_counter()
        logits = self._sequence.prefill(self._history)
        self.prompt_seconds = time.perf_counter() - started
        while self.n_generated != self._n_predict:
            token = self._sampler.sample(logits, self._history)
            if token in self._stop_ids:
                self.stopped_by = "stop_id"
                return
            self._history.append(token)
            self.n_generated += 1
            yield token
            if self._sequence.position == self._sequence.n_ctx:
                self.stopped_by = "context"
                return
            if self.n_generated != self._n_predict:
                logits = self._decode(token)
        self.stopped_by = "n_predict"

    def _decode(self, token: int) -> np.ndarray:
        started = time.perf_counter()
        logits = self._sequence.decode(token)
        self.decode_seconds += time.perf_counter() - started
        self.n_decoded += 1
        return logits
