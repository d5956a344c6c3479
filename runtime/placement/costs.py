"""What moving and reading costs on this machine, measured in about a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from hotcold.runtime.cpu import _cpu
from hotcold.runtime.gpu.device import on
from hotcold.runtime.gpu.graphs import Graphs
from hotcold.runtime.gpu.staging import Staging
from hotcold.runtime.placement.plan import Costs

__all__ = ["device_bandwidth", "measure_costs"]

_PROBE = 1 << 28  # bytes; several times any L2 cache
_FIRST, _REPETITIONS = 3, 20
_IN_A_ROW = 8  # so that launching and waiting, a fifth of one sum's time on a fast GPU, do not count


def measure_costs(device: torch.device, n_threads: int, d_model: int, d_ff: int) -> Costs:
    """Read bandwidths of both memories, a hand-over as the engine does it, and a few small kernels apart."""
    with on(device):
        return Costs(
            device_bandwidth=device_bandwidth(device, n_threads),
            cpu_bandwidth=1e9 * _cpu.read_bandwidth(n_threads, _PROBE, 3),
            handover_s=_seconds(device, _handover(device, d_model, d_ff)),
            split_s=_seconds(device, _few_kernels(device, d_model)),
        )


def device_bandwidth(device: torch.device, n_threads: int) -> float:
    """Bytes per second of a large sum, which reads and hardly writes."""
    if device.type == "cpu":
        return 1e9 * _cpu.read_bandwidth(n_threads, _PROBE, 3)
    probe = torch.ones(_PROBE // 4, device=device)
    with on(device):
        return probe.nbytes * _IN_A_ROW / statistics.median(_event_seconds(probe.sum)[_FIRST:])


def _event_seconds(step: Callable[[], object]) -> list[float]:
    """Times of `_IN_A_ROW` steps, by the device's clock."""
    times = []
    for _ in range(_FIRST + _REPETITIONS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_IN_A_ROW):
            step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times


def _handover(device: torch.device, d_model: int, d_ff: int) -> Callable[[], object]:
    """What a layer with cold neurons takes beside reading them: records, copies, marks, the host."""
    staging, graphs = Staging(device, 1, d_model, d_ff), Graphs(device)
    x, share = torch.zeros(2, 1, d_model, device=device)
    wanted = torch.zeros(1, d_ff, dtype=torch.bool, device=device)

    def back() -> None:
        staging.send_back(share)
        x.add_(share)

    def step() -> None:
        graphs.run("send", lambda: staging.send(x, wanted))
        staging.mark_sent(0)
        staging.mark_hot_done(0)
        staging.wait_sent(0)
        staging.wanted(d_ff)
        graphs.run("back", back)

    return step


def _few_kernels(device: torch.device, d_model: int) -> Callable[[], object]:
    """A record of as many small kernels as the hot neurons of a layer take."""
    x, graphs = torch.zeros(d_model, device=device), Graphs(device)

    def kernels() -> None:
        for _ in range(4):
            x.add_(1)

    return lambda: graphs.run("hot", kernels)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _seconds(device: torch.device, step: Callable[[], object]) -> float:
    """Median time of a step until the device has done it."""
    times = []
    for _ in range(_FIRST + _REPETITIONS):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[_FIRST:])
