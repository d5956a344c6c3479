"""The sparse FFN as one operator: listed neurons' rows against a readable reference, with gates and without.

Every ISA x type x shape x activity x threads. Rows of neurons that are not listed are NaN, and so are the up
and down rows of listed neurons whose gate does not fire: reading any of them would show.
"""

import firing
import numpy as np
import pytest
from stored_rows import ACTIVITY, TYPES, poison, stored

from hotcold.model.firing import FiringRule
from hotcold.runtime.cpu import _cpu

# (d_model, neurons): whole groups of blocks, groups and a tail of pairs, less than a group
SHAPES = [(1024, 160), (576, 300), (96, 1000)]


def int8_blocks(x):
    """x as the kernels see it beside quantized weights: int8 per 32 values."""
    blocks = x.reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    return (np.rint(blocks / np.where(scale > 0, scale, 1)) * scale).reshape(x.shape).astype(np.float64)


def listed_neurons(n, activity, rng):
    """bool [n]: which neurons are listed."""
    listed = np.zeros(n, bool)
    count = 1 if activity < 0 else round(activity * n)
    listed[rng.choice(n, count, replace=False)] = True
    return listed


def make_model(isa, threads, d_model, n, rule, gated):
    value, score = firing.kernel_ids(rule)
    return _cpu.Model(
        n_layers=1, d_model=d_model, d_ff=n, n_heads=2, n_kv_heads=1, head_dim=16, n_vocab=32,
        norm_eps=1e-5, value=value, score=score, mode=2, threads=threads, weight_bytes=64 << 20, isa=isa,
        gated=gated,
    )  # fmt: skip


def reference(g, u, down, wanted, rule, threshold):
    """What the wanted neurons add, and who fires; g, u and wanted are [tokens, n]."""
    values, fires = firing.fired(rule, g, threshold)
    ups = np.maximum(u, 0) if rule == "drelu" else u
    return np.where(fires & wanted, values * ups, 0) @ down, fires & wanted


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("activity", ACTIVITY)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("isa", _cpu.available_isas())
def test_listed_neurons(isa, kind, shape, activity, threads):
    check(isa, kind, shape, ACTIVITY[activity], threads, tokens=1)


@pytest.mark.parametrize("tokens", [2, 7, 64])
@pytest.mark.parametrize("activity", ACTIVITY)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("isa", _cpu.available_isas())
def test_a_block_of_tokens(isa, kind, activity, tokens):
    check(isa, kind, (96, 300), ACTIVITY[activity], 2, tokens)


@pytest.mark.parametrize(("tokens", "each"), [(1, False), (1, True), (7, True)])
@pytest.mark.parametrize("rule", firing.SPARSE_RULES)
@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
@pytest.mark.parametrize("isa", _cpu.available_isas())
def test_firing_rules(isa, kind, rule, tokens, each):
    threshold = 0.4 if rule not in ("relu", "relu2", "drelu") else 0.0
    spread = np.random.default_rng(5).uniform(0.05, 0.6, 300).astype(np.float32)
    check(isa, kind, (576, 300), 0.5, 2, tokens, rule, spread if each and threshold else threshold)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("activity", ACTIVITY)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("isa", _cpu.available_isas())
def test_without_gates(isa, kind, activity, tokens):
    check(isa, kind, (576, 300), ACTIVITY[activity], 2, tokens, gated=False)


def check(isa, kind, shape, activity, threads, tokens, rule="relu", threshold=0.0, gated=True):
    d_model, n = shape
    rng = np.random.default_rng([d_model, n, tokens, threads])
    rows = [rng.standard_normal((n, d_model)) / np.sqrt(d_model) for _ in range(3)]
    (gate, gates), (up, ups), (down, downs) = (stored(kind, matrix) for matrix in rows)
    x = rng.standard_normal((tokens, d_model)).astype(np.float32)
    wanted = np.stack([listed_neurons(n, activity, rng) for _ in range(tokens)])
    seen = int8_blocks(x) if kind.startswith("Q") else x.astype(np.float64)
    bias = None if gated else rng.standard_normal(n).astype(np.float32)
    g = seen @ gates.T + (0 if gated else bias)
    # rounding alone decides no neuron
    values = firing.fired(rule, g, threshold)[0]
    wanted &= (np.abs(g - threshold) > 1e-4) & (np.abs(np.abs(values) - threshold) > 1e-4)
    u = seen @ ups.T if gated else np.ones_like(g)
    expected, fires = reference(g, u, downs, wanted, rule, threshold)

    idle, silent = np.flatnonzero(~wanted.any(0)), np.flatnonzero(~fires.any(0))
    poison(kind, gate, idle)
    poison(kind, up, silent)
    poison(kind, down, silent)
    model = make_model(isa, threads, d_model, n, rule, gated)
    kind_id = TYPES[kind]
    up = up.ravel() if gated else None
    _cpu.parts.set_neurons(model, 0, n, gate.ravel(), kind_id, up, kind_id, down.ravel(), kind_id, bias)
    each = tuple(map(float, threshold)) if isinstance(threshold, np.ndarray) else threshold
    model.set_firing(0, FiringRule(rule, (each,)).kernel_thresholds(0))
    index = np.flatnonzero(wanted.any(0)).astype(np.int32)
    weights = np.uint64(1) << np.arange(tokens, dtype=np.uint64)
    masks = (wanted[:, index].T * weights).sum(1, dtype=np.uint64)
    y = np.empty_like(x)
    fired = _cpu.parts.run_neurons(
        _cpu.Sequence(model, 1), 0, x, index, masks if tokens > 1 else np.empty(0, np.uint64), y
    )

    assert fired == fires.sum()
    size = np.sqrt(np.mean(expected**2))
    error = np.sqrt(np.mean((y - expected) ** 2))
    # Quantized downs share one int8 scale among the products of 16 neurons.
    assert error <= (1.5e-2 if kind.startswith("Q") else 1e-4) * size + 1e-7
