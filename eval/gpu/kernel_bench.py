"""The sparse operators alone: time against torch's dense product and against the bandwidth limit.

An operator is timed in turns over enough copies of its weights that even their active rows fit in no cache,
so it measures memory. On a GPU the turns are one CUDA graph, which excludes launching; the dense product gets
the same treatment. The byte limit is the bytes of the active rows over the measured bandwidth.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType

import torch
from torch import Tensor

from hotcold.errors import InputError, MismatchError
from hotcold.progress import Progress
from hotcold.runtime.gpu.device import free_bytes, operators
from hotcold.runtime.triton import reference, tuning
from hotcold.runtime.triton.rows import Rows

__all__ = ["KernelPlan", "KernelRow", "check_kernels", "measure_kernels"]

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
OPERATORS = ("s2", "s3", "ffn")
_ROTATED = 1 << 28  # bytes of active rows in turn: five times the L2 cache of an H100
_TOLERANCE = 2e-3  # relative error of a sum of thousands of float32 products


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """What is measured: the shape of one FFN, its type, and the share of neurons that do not fire."""

    d_model: int
    d_ff: int
    dtype: str = "bf16"
    sparsity: float = 0.89
    rounds: int = 30
    rotated: int = _ROTATED
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError("unknown type", got=self.dtype, expected=" | ".join(DTYPES))
        if not 0 <= self.sparsity <= 1:
            raise InputError("--sparsity out of range", got=self.sparsity, expected="0 to 1")
        for name in ("d_model", "d_ff", "rounds"):
            if getattr(self, name) < 1:
                raise InputError("must be at least 1", where=name, got=getattr(self, name))


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One operator. Times are medians in microseconds; `limit_us` is what its bytes take at `bandwidth`."""

    operator: str
    us: float
    us_low: float
    us_high: float
    dense_us: float
    bytes: float
    bandwidth: float  # bytes per second

    @property
    def speedup(self) -> float:
        """Against torch's dense product of the same matrices."""
        return self.dense_us / self.us

    @property
    def limit_us(self) -> float:
        """The minimum time for its bytes."""
        return 1e6 * self.bytes / self.bandwidth

    @property
    def over_limit(self) -> float:
        """Time over the byte limit; 1 is perfect."""
        return self.us / self.limit_us

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        names = ("speedup", "limit_us", "over_limit")
        return asdict(self) | {name: getattr(self, name) for name in names}


class _Inputs:
    """Random weights in several copies, and one token whose neurons fire at random."""

    def __init__(self, plan: KernelPlan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        random = torch.Generator(device).manual_seed(plan.seed)
        dtype = DTYPES[plan.dtype]

        def matrix() -> Rows:
            values = torch.randn(plan.d_ff, plan.d_model, generator=random, device=device)
            return Rows.of((values / plan.d_model**0.5).to(dtype))

        # Exactly the requested number of neurons fire: those with the highest scores.
        self.n_active = round(plan.d_ff * (1 - plan.sparsity))
        self.row_bytes = plan.d_model * dtype.itemsize
        self.ffns = [(matrix(), matrix(), matrix()) for _ in range(self._copies())]
        self.x = torch.randn(1, plan.d_model, generator=random, device=device)
        scores = torch.randn(1, plan.d_ff, generator=random, device=device)
        self.scores = scores - self._cut(scores)

    def _copies(self) -> int:
        """So many that the active rows of one matrix exceed the caches, within half of the memory."""
        wanted = self.plan.rotated // max(self.n_active * self.row_bytes, 1)
        room = free_bytes(self.device) // (2 * 3 * self.plan.d_ff * self.row_bytes)
        return max(2, min(wanted + 1, room))

    def _cut(self, scores: Tensor) -> Tensor:
        ordered = scores[0].sort(descending=True).values
        if self.n_active == 0:
            return ordered[0] + 1
        last = ordered[self.n_active - 1]
        after = ordered[self.n_active] if self.n_active < len(ordered) else last - 1
        return (last + after) / 2

    @property
    def a(self) -> Tensor:
        """act(gate) · up stands in as the fired scores: zeros where nothing fires."""
        return self.scores.relu()


def measure_kernels(
    plan: KernelPlan, device: torch.device, bandwidth: float, names: Sequence[str] = OPERATORS
) -> list[KernelRow]:
    """Time the operators of `names`; `bandwidth` is the device's, in bytes per second."""
    inputs, ops = _Inputs(plan, device), operators(device)
    rows = []
    with Progress("kernels", total=len(names), unit="op") as progress:
        for name in names:
            call, dense, n_matrices = _calls(name, inputs, ops)
            _tune(name, inputs, ops)
            sparse_us = _microseconds(call, inputs, plan.rounds)
            dense_us = _microseconds(dense, inputs, plan.rounds)
            # The whole FFN reads all gates, and up and down rows of what fires.
            gates = plan.d_ff if name == "ffn" else 0
            n_bytes = (gates + (n_matrices - (name == "ffn")) * inputs.n_active) * inputs.row_bytes
            median, low, high = statistics.median(sparse_us), min(sparse_us), max(sparse_us)
            row = KernelRow(name, median, low, high, statistics.median(dense_us), n_bytes, bandwidth)
            rows.append(row)
            progress.advance(1, op=name, us=median)
    return rows


_Call = Callable[[int], object]


def _calls(name: str, inputs: _Inputs, ops: ModuleType) -> tuple[_Call, _Call, int]:
    """The operator and the dense product on copy i of the weights, and how many matrices that is."""
    ffns, x, scores, a = inputs.ffns, inputs.x, inputs.scores, inputs.a
    half, dense_a = x.to(ffns[0][0].data.dtype), a.to(ffns[0][0].data.dtype)
    match name:
        case "s2":
            return lambda i: ops.s2(scores, x, ffns[i][1]), lambda i: half @ ffns[i][1].data.T, 1
        case "s3":
            return lambda i: ops.s3(a, ffns[i][2]), lambda i: dense_a @ ffns[i][2].data, 1
        case "ffn":

            def dense(i: int) -> object:
                gate, up, down = (w.data for w in ffns[i])
                return ((half @ gate.T).relu() * (half @ up.T)) @ down

            return lambda i: ops.ffn_exact(x, *ffns[i]), dense, 3
    raise InputError("unknown operator", got=name, expected=" | ".join(OPERATORS))


def _tune(name: str, inputs: _Inputs, ops: ModuleType) -> None:
    """Tile sizes for these shapes, on the rotated weights; nothing off a GPU."""
    if inputs.device.type != "cuda":
        return
    from itertools import cycle

    from hotcold.runtime.gpu.tune import tune_ffns

    if name == "ffn":
        tune_ffns(inputs.ffns, ops, inputs.device)
        return
    turn, at = cycle(range(len(inputs.ffns))), {"s2": 1, "s3": 2}[name]
    given = {"s2": inputs.x, "s3": inputs.a}[name]
    w = inputs.ffns[0][at]
    call, _, _ = _calls(name, inputs, ops)
    tuning.tune(name, inputs.device, ops.shape_key(name, given, w.data, w.kind), lambda: call(next(turn)))


def _microseconds(call: _Call, inputs: _Inputs, rounds: int) -> list[float]:
    """Time of one call in each round, a round being one call on every copy of the weights."""
    copies = range(len(inputs.ffns))

    def one_round() -> None:
        for i in copies:
            call(i)

    timed = _graph_times if inputs.device.type == "cuda" else _wall_times
    return [1e6 * seconds / len(copies) for seconds in timed(one_round, rounds)]


def _wall_times(turn: Callable[[], None], rounds: int) -> list[float]:
    turn()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        turn()
        times.append(time.perf_counter() - start)
    return times


def _graph_times(turn: Callable[[], None], rounds: int) -> list[float]:
    """Replays of one CUDA graph, by the device's clock."""
    turn()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn()
    graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times


def check_kernels(plan: KernelPlan, device: torch.device) -> dict[str, float]:
    """Relative errors of all operators against the reference in float32; MismatchError if one is too large.

    Use small shapes with compute-sanitizer, which slows a kernel a hundredfold.
    """
    inputs, ops = _Inputs(plan, device), operators(device)
    gate, up, down = inputs.ffns[0]
    x, scores, a = inputs.x, inputs.scores, inputs.a
    found = {
        "dot_rows": _error(ops.dot_rows(x, gate), reference.dot_rows(x, gate)),
        "s2": _error(ops.s2(scores, x, up), reference.s2(scores, x, up)),
        "s3": _error(ops.s3(a, down), reference.s3(a, down)),
        "ffn": _error(ops.ffn_exact(x, gate, up, down)[0], reference.ffn_exact(x, gate, up, down)[0]),
    }
    index, count = ops.select(scores, 0.0)
    expected, n = reference.select(scores, 0.0)
    same = int(count) == int(n) and torch.equal(index[: int(n)], expected[: int(n)])
    found["select"] = 0.0 if same else float("inf")
    for name, error in found.items():
        if not error <= _TOLERANCE:
            raise MismatchError(
                f"operator {name} disagrees with its reference", got=error, expected=_TOLERANCE
            )
    return found


def _error(got: Tensor, expected: Tensor) -> float:
    scale = float(expected.norm())
    return float((got - expected).norm()) / scale if scale else float(got.abs().max())
