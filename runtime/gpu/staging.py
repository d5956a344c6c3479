"""The hand-over between device and CPU: page-locked buffers, events, and the times they tell.

On a CPU standing in for the device the buffers are ordinary memory and every copy is done at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from hotcold.runtime.gpu.telemetry import Telemetry

__all__ = ["Staging"]


class Staging:
    """Buffers for `tokens` tokens: the FFN's input and wanted neurons out, the cold neurons' share back."""

    def __init__(self, device: torch.device, tokens: int, d_model: int, n_cold: int) -> None:
        self._on_gpu = device.type == "cuda"
        pinned = {"pin_memory": self._on_gpu}
        self._normed = torch.zeros(tokens, d_model, **pinned)
        self._wanted = torch.zeros(tokens * max(n_cold, 1), dtype=torch.bool, **pinned)
        self._cold = torch.zeros(tokens, d_model, **pinned)
        self._sent = torch.cuda.Event() if self._on_gpu else None
        self._hot_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._hot_s: list[float] = []
        self._cold_s: list[float] = []

    def send(self, normed: Tensor, wanted: Tensor | None) -> None:
        """Copy to the host, without waiting; may be recorded in a graph."""
        self._normed[: len(normed)].copy_(normed, non_blocking=True)
        if wanted is not None:
            self._wanted[: wanted.numel()].view(wanted.shape).copy_(wanted, non_blocking=True)

    def mark_sent(self) -> None:
        """What was sent before this is there once `wait_sent` returns."""
        if self._sent:
            self._sent.record()

    def wait_sent(self) -> None:
        """Wait for the copies, not for what the device does after them."""
        if self._sent:
            self._sent.synchronize()

    def normed(self, tokens: int) -> np.ndarray:
        """The FFN's input, float32 [tokens, d_model]."""
        return self._normed[:tokens].numpy()

    def wanted(self, tokens: int, n_cold: int) -> np.ndarray:
        """bool [tokens, n_cold]."""
        return self._wanted[: tokens * n_cold].view(tokens, n_cold).numpy()

    def cold(self, tokens: int) -> np.ndarray:
        """Where the CPU writes its share, float32 [tokens, d_model]."""
        return self._cold[:tokens].numpy()

    def send_back(self, to: Tensor) -> None:
        """Copy the share to the device, behind what the device is at."""
        to.copy_(self._cold[: len(to)], non_blocking=True)

    def bytes_sent(self, tokens: int, n_cold: int) -> int:
        """Bytes of a hand-over to the host."""
        return tokens * (self._normed.shape[1] * 4 + n_cold)

    @contextmanager
    def timed_hot(self) -> Iterator[None]:
        """Time what the device does in the block, on the device's own clock."""
        if not self._on_gpu:
            start = time.perf_counter()
            yield
            self._hot_s.append(time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._hot_events.append((begin, end))

    def cold_took(self, seconds: float) -> None:
        """The CPU's time on the layer whose hot neurons were timed last."""
        n_timed = len(self._hot_events) + len(self._hot_s)
        self._cold_s += [0.0] * (n_timed - 1 - len(self._cold_s)) + [seconds]

    def no_cold(self) -> None:
        """That layer had nothing to do on the CPU."""
        self.cold_took(0.0)

    def finish(self, telemetry: Telemetry) -> None:
        """Wait for the token, and add its times up."""
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
            self._hot_s = [begin.elapsed_time(end) / 1e3 for begin, end in self._hot_events]
        cold = self._cold_s + [0.0] * (len(self._hot_s) - len(self._cold_s))
        telemetry.hot_s += sum(self._hot_s)
        telemetry.cold_s += sum(cold)
        if self._on_gpu:  # both begin when the copies are there; elsewhere one follows the other
            telemetry.overlap_s += sum(map(min, self._hot_s, cold))
        self._hot_events, self._hot_s, self._cold_s = [], [], []
