"""Recorded steps, replayed as a GPU would: what a record leaves behind is overwritten by any other's replay.

torch on the CPU records nothing, so that a step's operators are noted here and called again. Before each
replay the tensors that records made are filled with NaN: they share one pool of memory on a GPU, and a step
must find what it needs in tensors that were there before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import tiny_families
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hotcold.runtime.gpu import stage as gpu_stage
from hotcold.runtime.gpu.engine import GpuEngine
from hotcold.runtime.gpu.graphs import Graphs
from hotcold.runtime.gpu.hybrid import HybridEngine
from hotcold.runtime.placement.plan import PlacedLayer, Placement
from hotcold.runtime.triton import ops, reference

IDS = np.random.default_rng(5).integers(3, 300, 5)
D_FF = 96


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Record(TorchDispatchMode):
    """The operators of a step, and the tensors that are its own."""

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.own: list[list[Tensor]] = []
        with self:
            step()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        self.calls.append((func, args, kwargs or {}))
        self.own.append([t for t in tensors(made) if t.untyped_storage()._cdata not in given])
        return made

    def poison(self) -> None:
        for tensor in tensors(self.own):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    def replay(self) -> None:
        for (func, args, kwargs), own in zip(self.calls, self.own, strict=True):
            made = tensors(func(*args, **kwargs))
            for old, new in zip(own, made, strict=False):  # one that has none writes to what it was given
                old.copy_(new)


class Replayed(Graphs):
    """Records from the second call of a step on, as on a GPU."""

    records: ClassVar[list[Record]] = []
    replays = 0

    def run(self, key: object, step: Callable[[], None]) -> None:
        if key not in self._seen:
            self._seen.add(key)
            step()
        elif key not in self._graphs:
            self._graphs[key] = Record(step)
            self.records.append(self._graphs[key])
        else:
            for record in self.records:
                record.poison()
            self._graphs[key].replay()
            Replayed.replays += 1


def split(*hot: int) -> PlacedLayer:
    return PlacedLayer(True, np.array(sorted(hot), np.int32), D_FF)


ALL, NONE, SOME = split(*range(D_FF)), split(), split(*range(0, D_FF, 2))
ON_CPU = PlacedLayer(False, np.empty(0, np.int32), D_FF)


def decoded(engine: GpuEngine) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a few tokens, twice from the start, and the counts."""
    logits = []
    for _ in range(2):
        engine.reset()
        logits.append(engine.prefill(IDS[:2]))
        logits += [engine.decode(token) for token in IDS[2:]]
    stats = engine.stats()
    return np.stack(logits), np.stack([stats.fired, stats.predicted])


def decoded_in_turns(engine: GpuEngine) -> tuple[np.ndarray, np.ndarray]:
    """The same of two sequences, one token of each at a time."""
    logits, sequences = [], (engine.sequence(), engine.sequence(8))
    for _ in range(2):
        for sequence in sequences:
            sequence.reset()
        logits += [sequence.prefill(IDS[:2] + i) for i, sequence in enumerate(sequences)]
        logits += [sequence.decode(token + i) for token in IDS[2:] for i, sequence in enumerate(sequences)]
    stats = [sequence.stats() for sequence in sequences]
    return np.stack(logits), np.stack([(s.fired, s.predicted) for s in stats])


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "layers"), [
    ("dense", None),
    ("exact", None),
    ("predicted", None),
    ("exact", (SOME, ALL, SOME)),
    ("predicted", (SOME, NONE, ON_CPU)),
])  # fmt: skip
def test_a_replay_does_what_the_step_does(make_bundle, monkeypatch, mode, layers):
    check_replays(make_bundle(n_layers=3).path, monkeypatch, mode, layers)


def test_sequences_replay_steps_of_their_own(bundle, monkeypatch):
    """In dense mode plain torch can be recorded too, which is not slow."""
    check_replays(bundle.path, monkeypatch, "dense", None, decoded_in_turns, reference)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(SOME, NONE), (NONE, NONE)])
@pytest.mark.parametrize("name", ["opt", "falcon-7b-relu"])
def test_replays_without_gates(make_bundle_of, monkeypatch, name, layers):
    wide = tuple(PlacedLayer(True, layer.hot, tiny_families.D_FF) for layer in layers)
    check_replays(make_bundle_of(name), monkeypatch, "predicted", wide)


def check_replays(path, monkeypatch, mode, layers, decode=decoded, operators=ops):
    monkeypatch.setattr(gpu_stage, "operators", lambda device: operators)

    def run() -> tuple[np.ndarray, np.ndarray]:
        if layers is None:
            return decode(GpuEngine.load(path, mode, "cpu", n_ctx=16))
        return decode(HybridEngine.load(path, Placement(layers, (1 << 30,)), mode, "cpu", 1, n_ctx=16))

    expected = run()
    monkeypatch.setattr(gpu_stage, "Graphs", Replayed)
    monkeypatch.setattr(Replayed, "records", [])
    monkeypatch.setattr(Replayed, "replays", 0)
    found = run()
    assert Replayed.replays > 3
    assert all(np.array_equal(got, wanted) for got, wanted in zip(found, expected, strict=True))
