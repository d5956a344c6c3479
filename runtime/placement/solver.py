"""How many neurons of each layer go to the device: an integer programme, and the greedy rule beside it.

Neurons are taken in groups, the most frequent first. With x the share of each group that is on the device, y
whether a layer has any and z whether it has all, minimize the sum over layers of t where

    t >= device time:  Σ x·active / device bandwidth + split · (y - z)
    t >= CPU time:     Σ (1 - x)·active / CPU bandwidth + hand-over · (1 - z)
    Σ x >= least · y   (none, or enough to pay for the split)       x <= y       groups · z <= Σ x
    Σ x·bytes <= budget

As later groups hold nothing better than earlier ones, x may be continuous: y and z alone are integers. What
counts of x is how many neurons it stands for, as the last group of a layer can be smaller than the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hotcold.runtime.placement.plan import FfnTime

__all__ = ["greedy_counts", "solver_counts"]

_GROUPS = 64  # per layer
_SCALE = 1e6  # HiGHS' tolerances are absolute: it is given microseconds


def group_size(d_ff: int) -> int:
    """Neurons that are moved together."""
    return -(-d_ff // _GROUPS)


def solver_counts(times: Sequence[FfnTime], budget: int, time_limit: float) -> list[int] | None:
    """Neurons per layer by scipy's HiGHS; None if it finds nothing in time."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not times:
        return []
    programme = _Programme(times, budget)
    answer = milp(
        programme.objective,
        integrality=programme.integrality,
        bounds=Bounds(0, programme.upper),
        constraints=LinearConstraint(programme.matrix(), np.r_[programme.lower], np.inf),
        options={"time_limit": time_limit, "mip_rel_gap": 1e-3},
    )
    return None if answer.x is None else programme.counts(answer.x)


class _Programme:
    """Rows `matrix · v >= lower` over v = [x of all layers' groups | y | z | t]."""

    def __init__(self, times: Sequence[FfnTime], budget: int) -> None:
        self.times, self.budget = times, budget
        self.edges = [_edges(time.layer.d_ff) for time in times]
        sizes = [len(edges) - 1 for edges in self.edges]
        self.at = np.concatenate([[0], np.cumsum(sizes)])  # where a layer's groups begin
        n, layers = int(self.at[-1]), len(times)
        self.y, self.z, self.t = n, n + layers, n + 2 * layers
        self.n_variables = n + 3 * layers
        self.objective = np.r_[np.zeros(self.t), np.ones(layers)]
        self.integrality = np.r_[np.zeros(n), np.ones(2 * layers), np.zeros(layers)]
        self.upper = np.r_[np.ones(self.t), np.full(layers, np.inf)]
        self._rows: list[tuple[list[int], list[float]]] = []
        self.lower: list[float] = []
        for layer in range(layers):
            self._layer(layer)
        weights = [
            -np.diff(edges) * time.layer.neuron_bytes / max(budget, 1)
            for edges, time in zip(self.edges, times, strict=True)
        ]
        self._row(list(range(n)), list(np.concatenate(weights)), -1.0 if budget else 0.0)

    def _row(self, columns: list[int], values: list[float], at_least: float) -> None:
        self._rows.append((columns, values))
        self.lower.append(at_least)

    def _layer(self, layer: int) -> None:
        time, edges = self.times[layer], self.edges[layer]
        groups = list(range(self.at[layer], self.at[layer + 1]))
        y, z, t = self.y + layer, self.z + layer, self.t + layer
        split, handover = _SCALE * time.costs.split_s, _SCALE * time.costs.handover_s
        device, cpu = (_SCALE * np.diff(seconds) for seconds in time.reads(edges))
        whole = _SCALE * time.cpu(0)
        self._row([*groups, y, z, t], [*-device, -split, split, 1.0], 0.0)
        self._row([*groups, z, t], [*-cpu, handover, 1.0], whole)
        least = float(np.searchsorted(edges, time.least))  # groups that hold the fewest neurons allowed
        self._row([*groups, y], [*[1.0] * len(groups), -least], 0.0)
        self._row([*groups, z], [*[1.0] * len(groups), -float(len(groups))], 0.0)
        for group in groups:
            self._row([y, group], [1.0, -1.0], 0.0)

    def matrix(self) -> object:
        """The rows, scipy.sparse."""
        from scipy.sparse import csr_array

        columns = np.concatenate([np.array(columns, int) for columns, _ in self._rows])
        values = np.concatenate([np.array(values, float) for _, values in self._rows])
        ends = np.cumsum([0, *(len(columns) for columns, _ in self._rows)])
        return csr_array((values, columns, ends), shape=(len(self._rows), self.n_variables))

    def counts(self, v: np.ndarray) -> list[int]:
        """Whole groups of each layer, and none if they are too few for the split; within the budget."""
        found = []
        for layer, edges in enumerate(self.edges):
            neurons = v[self.at[layer] : self.at[layer + 1]] @ np.diff(edges)
            found.append(self._fitting(layer, int(edges[edges <= neurons + 1e-3].max())))
        while any(found) and sum(map(self._bytes, range(len(found)), found)) > self.budget:
            # The solver's tolerance let a group too many in.
            layer = min((i for i, n in enumerate(found) if n), key=lambda i: found[i])
            edges = self.edges[layer]
            found[layer] = self._fitting(layer, int(edges[edges < found[layer]].max()))
        return found

    def _fitting(self, layer: int, n: int) -> int:
        return n if n >= self.times[layer].least else 0

    def _bytes(self, layer: int, n: int) -> int:
        return n * self.times[layer].layer.neuron_bytes


def _edges(d_ff: int) -> np.ndarray:
    """Numbers of neurons after 0, 1, 2 … groups."""
    return np.unique(np.r_[np.arange(0, d_ff, group_size(d_ff)), d_ff])


def greedy_counts(times: Sequence[FfnTime], budget: int, start: Sequence[int] | None = None) -> list[int]:
    """Give groups to whichever layer gains the most time per byte, as long as any gains and fits.

    A layer's step is its next group (the first time: the least that pays for the split), or all that is left
    of it, which saves the hand-over. `start` are neurons per layer that are given already.
    """
    counts = list(start) if start is not None else [0] * len(times)
    left = budget - sum(n * time.layer.neuron_bytes for n, time in zip(counts, times, strict=True))
    steps = [_best_step(time, n, left) for time, n in zip(times, counts, strict=True)]
    while steps:
        layer = max(range(len(steps)), key=lambda i: steps[i][0])
        gain, n = steps[layer]
        if gain <= 0:
            break
        left -= (n - counts[layer]) * times[layer].layer.neuron_bytes
        counts[layer] = n
        for i, time in enumerate(times):
            if i == layer or steps[i][1] > counts[i] + left // time.layer.neuron_bytes:
                steps[i] = _best_step(time, counts[i], left)
    return counts


def _best_step(time: FfnTime, n: int, left: int) -> tuple[float, int]:
    """Seconds gained per byte by the better step from n neurons on, and where it leads; 0 if none fits."""
    d_ff, bytes_each = time.layer.d_ff, time.layer.neuron_bytes
    following = time.least if n == 0 else min(d_ff, n + group_size(d_ff))
    best = (0.0, n)
    for target in {following, d_ff}:
        cost = (target - n) * bytes_each
        if target > n and cost <= left:
            best = max(best, ((time.total(n) - time.total(target)) / max(cost, 1), target))
    return best
