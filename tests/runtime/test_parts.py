"""Parts of the native engine: some neurons of a layer against plain numpy, and what it refuses."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from hotcold.runtime.cpu import _cpu

D, D_FF, N = 64, 96, 40
RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.standard_normal((N, D)).astype(np.float32) for name in ("gate", "up", "down")}
LIMITS = {"F32": 1e-5, "F16": 1e-3, "Q8_0": 0.03, "Q4_0": 0.25}
TYPES = {"F32": 0, "F16": 1, "Q8_0": 3, "Q4_0": 4}


def model(threads: int = 2, kind: str = "F32") -> _cpu.Model:
    made = _cpu.Model(
        n_layers=2, d_model=D, d_ff=D_FF, n_heads=4, n_kv_heads=4, head_dim=16, n_vocab=32,
        norm_eps=1e-5, value=0, score=1, mode=2, threads=threads, weight_bytes=1 << 22,
    )  # fmt: skip
    parts: list[object] = []
    for weight in WEIGHTS.values():
        packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
        parts += [packed.view(np.uint8).reshape(-1), TYPES[kind]]
    _cpu.parts.set_neurons(made, 1, N, *parts)
    return made


def sequence(threads: int = 2, kind: str = "F32") -> _cpu.Sequence:
    return _cpu.Sequence(model(threads, kind), 8)


def expected(x: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    a = np.maximum(x @ WEIGHTS["gate"].T, 0) * (x @ WEIGHTS["up"].T)
    return np.where(wanted, a, 0) @ WEIGHTS["down"]


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_listed_neurons(kind, threads, tokens, share):
    x = RNG.standard_normal((tokens, D)).astype(np.float32)
    wanted = RNG.random((tokens, N)) < share
    index = np.flatnonzero(wanted.any(0)).astype(np.int32)
    masks = (wanted[:, index] * (np.uint64(1) << np.arange(tokens, dtype=np.uint64))[:, None]).sum(
        0, np.uint64
    )
    y = np.full((tokens, D), np.nan, np.float32)
    fired = _cpu.parts.run_neurons(sequence(threads, kind), 1, x, index, masks, y)
    truth = expected(x, wanted)
    assert np.linalg.norm(y - truth) <= LIMITS[kind] * max(np.linalg.norm(truth), 1e-9)
    if kind == "F32":
        assert fired == ((x @ WEIGHTS["gate"].T > 0) & wanted).sum()


NO_MASKS, X, Y = np.empty(0, np.uint64), np.zeros((1, D), np.float32), np.zeros((1, D), np.float32)


@pytest.mark.parametrize(
    ("layer", "x", "index", "masks", "message"),
    [
        (0, X, [1], NO_MASKS, "no neurons of this layer"),
        (7, X, [1], NO_MASKS, "no neurons of this layer"),
        (1, X, [N], NO_MASKS, "neurons must be ascending"),
        (1, X, [2, 1], NO_MASKS, "neurons must be ascending"),
        (1, X, [-1], NO_MASKS, "neurons must be ascending"),
        (1, np.zeros((1, D - 1), np.float32), [1], NO_MASKS, "normed must be"),
        (1, np.zeros((65, D), np.float32), [1], NO_MASKS, "normed must be"),
        (1, np.zeros((2, D), np.float32), [1], NO_MASKS, "shape of normed"),
    ],
)
def test_refused(layer, x, index, masks, message):
    with pytest.raises(ValueError, match=message):
        _cpu.parts.run_neurons(sequence(), layer, x, np.array(index, np.int32), masks, Y.copy())


def test_layers_that_were_not_loaded():
    with pytest.raises(ValueError, match="a layer that was not loaded"):
        _cpu.parts.run_layers(sequence(), X.copy(), 0, 1, 0)
    with pytest.raises(ValueError, match="no such layers"):
        _cpu.parts.run_layers(sequence(), X.copy(), 1, 3, 0)
    with pytest.raises(ValueError, match="the context is full"):
        _cpu.parts.run_layers(sequence(), X.copy(), 1, 2, 8)


def test_rows_of_another_size():
    rows, fewer = np.zeros(N * D * 4, np.uint8), np.zeros(N * D * 4 - 1, np.uint8)
    for gate, up, down in ((fewer, rows, rows), (rows, fewer, rows), (rows, rows, fewer)):
        with pytest.raises(ValueError, match="rows of another size"):
            _cpu.parts.set_neurons(model(), 0, N, gate, 0, up, 0, down, 0)


def test_ups_are_of_models_with_gates_and_biases_of_others():
    rows, bias = np.zeros(N * D * 4, np.uint8), np.zeros(N, np.float32)
    with pytest.raises(ValueError, match="up rows are of a model with gates"):
        _cpu.parts.set_neurons(model(), 0, N, rows, 0, None, 0, rows, 0)
    with pytest.raises(ValueError, match="one bias per neuron, and only without gates"):
        _cpu.parts.set_neurons(model(), 0, N, rows, 0, rows, 0, rows, 0, bias)
