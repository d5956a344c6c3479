"""Which neurons live on the GPU: chosen before loading, from how often each fires and what moving costs.

The device first takes what every token reads: the head, then layer by layer the norms,
attention, predictor and KV cache (a layer's frame). What is left of the budget goes to hot neurons. A layer
whose frame does not fit is computed on the CPU as a whole. Of several devices each has some of the layers
(placement_devices.py), and a budget of its own for their neurons.

The time of a layer's FFN is that of the slower side, as both work at once:

    device(n) = bytes of the n hottest neurons that fire / device bandwidth + split cost, if there are others
    cpu(n)    = bytes of the other ones that fire / CPU bandwidth + hand-over, if there are any

PowerInfer's solver (SOSP'24, section 6; its `solver.py`) maximizes the firing counts on the GPU instead,
which knows nothing of what a hand-over costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hotcold.runtime.placement.devices import Fixed, fill, spans, spread

__all__ = [
    "Costs",
    "LayerLoad",
    "PlacedLayer",
    "Placement",
    "Problem",
    "place",
    "place_layers",
]


@dataclass(frozen=True, slots=True)
class Costs:
    """What this machine takes: read bandwidths in bytes per second, latencies in seconds.

    `handover_s` is a layer's round trip to the CPU and back, `split_s` what computing hot neurons apart adds.
    """

    device_bandwidth: float
    cpu_bandwidth: float
    handover_s: float
    split_s: float


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """One layer: how often its neurons are active, and how many bytes it is made of."""

    frequency: np.ndarray  # float [d_ff], share of tokens that a neuron is active on
    neuron_bytes: int  # gate, up and down row of one neuron
    frame_bytes: int  # norms, attention, predictor, KV cache
    frame_read: int = 0  # of those, what one token reads
    always_read: float = 0.0  # share of a neuron's bytes that is read whether it is active or not

    @property
    def d_ff(self) -> int:
        """Number of neurons."""
        return len(self.frequency)

    def read(self, frequency: np.ndarray) -> np.ndarray:
        """Bytes that one token reads of neurons of this frequency."""
        return self.neuron_bytes * (self.always_read + (1 - self.always_read) * frequency)

    @property
    def ffn_bytes(self) -> int:
        """All neurons."""
        return self.d_ff * self.neuron_bytes


@dataclass(frozen=True, slots=True)
class Problem:
    """A model to be placed within these bytes per device; `fixed` is always needed."""

    layers: Sequence[LayerLoad]
    fixed: Fixed
    fixed_read: int
    budgets: tuple[int, ...]
    costs: Costs


class FfnTime:
    """Expected seconds of one layer's FFN with its n most frequent neurons on the device."""

    def __init__(self, layer: LayerLoad, costs: Costs) -> None:
        self.layer, self.costs = layer, costs
        self.order = np.argsort(-layer.frequency, kind="stable")
        ordered = layer.frequency[self.order].astype(np.float64)
        self._active, self._read = (np.r_[0.0, np.cumsum(part)] for part in (ordered, layer.read(ordered)))

    def device(self, n: int) -> float:
        """Seconds on the device."""
        split = self.costs.split_s if 0 < n < self.layer.d_ff else 0.0
        return self._read[n] / self.costs.device_bandwidth + split

    def cpu(self, n: int) -> float:
        """Seconds on the CPU, the hand-over included."""
        if n == self.layer.d_ff:
            return 0.0
        return (self._read[-1] - self._read[n]) / self.costs.cpu_bandwidth + self.costs.handover_s

    def reads(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of reading alone, on either side, for each of these numbers of neurons."""
        read = self._read[counts]
        return read / self.costs.device_bandwidth, (self._read[-1] - read) / self.costs.cpu_bandwidth

    def total(self, n: int) -> float:
        """Seconds until both are done."""
        return max(self.device(n), self.cpu(n))

    def hit_rate(self, n: int) -> float:
        """Share of active neurons that are on the device."""
        return float(self._active[n] / self._active[-1]) if self._active[-1] else 1.0

    @property
    def least(self) -> int:
        """The fewest neurons that pay for the split: what they save the CPU is `split_s` or more."""
        paid = self._read / self.costs.cpu_bandwidth >= self.costs.split_s
        return max(1, int(paid.argmax())) if paid.any() else self.layer.d_ff


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    """Where one layer lives. `hot` are the neurons on the device, int32, ascending."""

    on_device: bool
    hot: np.ndarray
    d_ff: int
    hit_rate: float = 0.0  # expected
    device_bytes: int = 0
    cpu_bytes: int = 0
    seconds: float = 0.0  # expected, of one token
    device: int = 0  # which one, if on a device

    @property
    def cold(self) -> np.ndarray:
        """The other neurons, int32, ascending."""
        return np.setdiff1d(np.arange(self.d_ff, dtype=np.int32), self.hot, assume_unique=True)


@dataclass(frozen=True, slots=True)
class Placement:
    """A plan: one `PlacedLayer` per layer. `method` says how it was found.

    `budgets` and `fixed` are bytes per device: what it may take, and what it has beside layers.
    """

    layers: tuple[PlacedLayer, ...]
    budgets: tuple[int, ...]
    fixed: tuple[int, ...] = (0,)
    seconds: float = 0.0  # expected, of one token
    method: str = ""
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def spans(self) -> list[tuple[int, range]]:
        """Devices in use, in order, and the layers of each. Even without any layer one device is."""
        homes = [layer.device for layer in self.layers if layer.on_device]
        return spans(homes) or [(self.fixed.index(max(self.fixed)), range(0))]

    @property
    def device_bytes(self) -> int:
        """What the plan puts on all devices together."""
        return sum(map(self.bytes_on, range(len(self.budgets))))

    def bytes_on(self, device: int) -> int:
        """What the plan puts on one device."""
        layers = (layer for layer in self.layers if layer.device == device)
        return self.fixed[device] + sum(layer.device_bytes for layer in layers)

    @property
    def tokens_per_second(self) -> float:
        """Expected speed of decoding."""
        return 1 / self.seconds if self.seconds else 0.0


def place(problem: Problem, time_limit: float = 10.0) -> Placement:
    """The best plan found: by HiGHS within `time_limit` seconds, or by a greedy rule if that is not worse.

    Raises UnsupportedError if not even what is fixed fits the budgets.
    """
    layers = problem.layers
    frames, neurons = [layer.frame_bytes for layer in layers], [layer.ffn_bytes for layer in layers]
    homes, fixed = spread(frames, neurons, problem.fixed, problem.budgets)
    times = [FfnTime(layer, problem.costs) for layer in layers[: len(homes)]]
    counts: list[int] = []
    methods: set[str] = set()
    for device in sorted(set(homes)):  # no neuron has a choice of devices, so each is a problem of its own
        there = [time for time, home in zip(times, homes, strict=True) if home == device]
        left = problem.budgets[device] - fixed[device] - sum(time.layer.frame_bytes for time in there)
        found, method = _best_counts(there, left, time_limit / len(set(homes)))
        counts += found
        methods.add(method)
    return _placement(problem, times, counts, homes, fixed, max(methods, default="greedy"))


def _best_counts(times: Sequence[FfnTime], budget: int, time_limit: float) -> tuple[list[int], str]:
    """Neurons per layer of one device, and how they were found."""
    from hotcold.runtime.placement.solver import greedy_counts, solver_counts

    found = {"greedy": greedy_counts(times, budget)}
    solved = solver_counts(times, budget, time_limit)
    if solved is not None:
        found["highs"] = greedy_counts(times, budget, solved)
    method = min(found, key=lambda name: _seconds(times, found[name]))
    return found[method], method


def place_layers(problem: Problem) -> Placement:
    """The plan of `dense` mode: whole layers, from the first on, as long as they fit; all neurons or none.

    Raises what `place` does.
    """
    sizes = [layer.frame_bytes + layer.ffn_bytes for layer in problem.layers]
    homes, fixed = fill(sizes, problem.fixed, problem.budgets)
    whole = problem.layers[: len(homes)]
    times = [FfnTime(layer, problem.costs) for layer in whole]
    return _placement(problem, times, [layer.d_ff for layer in whole], homes, fixed, "layers")


def _seconds(times: Sequence[FfnTime], counts: Sequence[int]) -> float:
    return sum(time.total(n) for time, n in zip(times, counts, strict=True))


def _placement(
    problem: Problem,
    times: Sequence[FfnTime],
    counts: Sequence[int],
    homes: Sequence[int],
    fixed: Sequence[int],
    method: str,
) -> Placement:
    costs = problem.costs
    on_device = [_split(*each) for each in zip(times, counts, homes, strict=True)]
    on_cpu = [_on_cpu(layer, costs) for layer in problem.layers[len(times) :]]
    layers = (*on_device, *on_cpu)
    seconds = problem.fixed_read / costs.device_bandwidth + sum(layer.seconds for layer in layers)
    return Placement(layers, problem.budgets, tuple(fixed), seconds, method)


def _split(time: FfnTime, n: int, device: int) -> PlacedLayer:
    layer = time.layer
    return PlacedLayer(
        on_device=True,
        hot=np.sort(time.order[:n]).astype(np.int32),
        d_ff=layer.d_ff,
        hit_rate=time.hit_rate(n),
        device_bytes=layer.frame_bytes + n * layer.neuron_bytes,
        cpu_bytes=(layer.d_ff - n) * layer.neuron_bytes,
        seconds=time.total(n) + layer.frame_read / time.costs.device_bandwidth,
        device=device,
    )


def _on_cpu(layer: LayerLoad, costs: Costs) -> PlacedLayer:
    read = layer.frame_read + float(layer.read(layer.frequency).sum())
    return PlacedLayer(
        on_device=False,
        hot=np.empty(0, np.int32),
        d_ff=layer.d_ff,
        cpu_bytes=layer.frame_bytes + layer.d_ff * layer.neuron_bytes,
        seconds=read / costs.cpu_bandwidth,
    )
