"""A token's hand-overs between device and CPU: page-locked buffers, events, and the times they tell.

Per hand-over the device is marked twice: when what it sends is with the host, which is when hot neurons
begin, and when these end. On a CPU standing in for the device the buffers are ordinary memory, every copy is
done at once, and marks are read off the clock.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from hotcold.runtime.gpu.telemetry import Telemetry

__all__ = ["Staging"]


class Staging:
    """Buffers of one token: the FFN's input and wanted neurons out, the cold neurons' share back."""

    def __init__(self, device: torch.device, n_handovers: int, d_model: int, most_cold: int) -> None:
        """`most_cold` is the greatest number of cold neurons of a layer."""
        self._on_gpu = device.type == "cuda"
        self._normed, self._share = (torch.zeros(1, d_model, pin_memory=self._on_gpu) for _ in range(2))
        self._wanted = torch.zeros(1, most_cold, dtype=torch.bool, pin_memory=self._on_gpu)
        self.normed = self._normed.numpy()  # the FFN's input, float32 [1, d_model]
        self.share = self._share.numpy()  # where the CPU writes what cold neurons add, the same
        self._wanted_here = self._wanted.numpy()[0]
        self._sent, self._hot_done = ([self._mark() for _ in range(n_handovers)] for _ in range(2))
        self._cold_s = [0.0] * n_handovers

    def _mark(self) -> torch.cuda.Event | _Moment:
        return torch.cuda.Event(enable_timing=True) if self._on_gpu else _Moment()

    def send(self, normed: Tensor, wanted: Tensor | None) -> None:
        """Copy to the host, without waiting; may be recorded in a graph."""
        self._normed.copy_(normed, non_blocking=True)
        if wanted is not None:
            self._wanted[:, : wanted.shape[1]].copy_(wanted, non_blocking=True)

    def mark_sent(self, handover: int) -> None:
        """What was sent before this is there once `wait_sent` returns; hot neurons come next."""
        self._sent[handover].record()

    def mark_hot_done(self, handover: int) -> None:
        """Hot neurons end here."""
        self._hot_done[handover].record()

    def wait_sent(self, handover: int) -> None:
        """Wait for the copies, not for what the device does after them."""
        self._sent[handover].synchronize()

    def wanted(self, n_cold: int) -> np.ndarray:
        """Which of the layer's cold neurons were sent as wanted, int32, ascending."""
        return np.flatnonzero(self._wanted_here[:n_cold]).astype(np.int32)

    def cold_took(self, handover: int, seconds: float) -> None:
        """The CPU's time on cold neurons, 0 if none were wanted."""
        self._cold_s[handover] = seconds

    def send_back(self, to: Tensor) -> None:
        """Copy the share to the device; may be recorded in a graph."""
        to.copy_(self._share, non_blocking=True)

    def finish(self, telemetry: Telemetry) -> None:
        """Wait for the token, and add its times up."""
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        hot = [begin.elapsed_time(end) / 1e3 for begin, end in zip(self._sent, self._hot_done, strict=True)]
        telemetry.hot_s += sum(hot)
        telemetry.cold_s += sum(self._cold_s)
        if self._on_gpu:  # both begin when the copies are there; elsewhere one follows the other
            telemetry.overlap_s += sum(map(min, hot, self._cold_s))


class _Moment:
    """An event of a device that has done all it was told."""

    def record(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Moment) -> float:
        """Milliseconds, as with CUDA's events."""
        return 1e3 * (end._at - self._at)
