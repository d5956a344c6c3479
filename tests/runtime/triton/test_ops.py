"""Every operator against its reference: in Triton's interpreter, or compiled where there is a GPU."""

from __future__ import annotations

import os

import gguf
import numpy as np
import pytest
import torch
from firing import fired
from hypothesis import given, settings
from hypothesis import strategies as st

from hotcold.errors import ShapeError
from hotcold.model.firing import RULES, FiringRule
from hotcold.runtime.triton import ops, reference
from hotcold.runtime.triton.firing import LayerRule
from hotcold.runtime.triton.rows import Rows

DEVICE = "cuda" if "HOTCOLD_TEST_GPU" in os.environ else "cpu"
FLOATS = ["F32", "F16", "BF16"]
TYPES = [*FLOATS, "Q8_0", "Q4_0"]
FIRING = ["all", "none", "one", "some"]
CASES = [*((firing, 1) for firing in FIRING), ("some", 3)]


def rows(rng: np.random.Generator, n: int, width: int, kind: str) -> Rows:
    values = rng.standard_normal((n, width)).astype(np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    return Rows.from_gguf(kind, packed, width, DEVICE)


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(DEVICE)


def gate_scores(rng: np.random.Generator, tokens: int, n: int, firing: str) -> torch.Tensor:
    """Scores of which all, none, one or a few are positive."""
    scores = -np.abs(rng.standard_normal((tokens, n))) - 0.01
    chosen = {"all": np.arange(n), "none": [], "one": [n // 2], "some": rng.permutation(n)[: n // 3 + 1]}
    scores[:, chosen[firing]] *= -1
    return tensor(scores)


def poisoned(w: Rows, live: torch.Tensor) -> Rows:
    """The same rows, those not `live` full of NaN: whoever reads one shows it."""
    data, scales = w.data.clone(), w.scales.clone()
    (data if w.kind == 0 else scales)[~live] = float("nan")
    return Rows(data, scales, w.kind, w.width)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of float32 sums."""
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_dot_rows(rng, kind, tokens):
    w, x = rows(rng, 37, 96, kind), tensor(rng.standard_normal((tokens, 96)))
    close(ops.dot_rows(x, w), reference.dot_rows(x, w))
    close(ops.dot_rows(x, w, relu=True), reference.dot_rows(x, w).clamp(min=0))


@pytest.mark.parametrize(("firing", "tokens"), CASES)
@pytest.mark.parametrize("kind", TYPES)
def test_s2_reads_only_rows_that_fire(rng, kind, firing, tokens):
    up, x = rows(rng, 45, 64, kind), tensor(rng.standard_normal((tokens, 64)))
    scores = gate_scores(rng, tokens, 45, firing)
    up = poisoned(up, (scores > 0).any(0))
    expected = torch.where(scores > 0, scores * (x @ up.dequantize().T).nan_to_num(), 0)
    close(ops.s2(scores, x, up), expected)
    close(reference.s2(scores, x, up), expected)


@pytest.mark.parametrize(("firing", "tokens"), CASES)
@pytest.mark.parametrize("kind", TYPES)
def test_s3_reads_only_rows_that_fired(rng, kind, firing, tokens):
    down, a = rows(rng, 45, 96, kind), gate_scores(rng, tokens, 45, firing).relu()
    down = poisoned(down, (a != 0).any(0))
    expected = a @ down.dequantize().nan_to_num()
    close(ops.s3(a, down), expected)
    close(reference.s3(a, down), expected)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("firing", FIRING)
def test_the_fused_whole_reads_only_rows_that_fire(rng, kind, firing):
    """One feature of x is 1 and only the gates look at it, so that it decides which neurons fire."""
    n, width = 45, 64
    values = rng.standard_normal((n, width)).astype(np.float32) * 0.01
    values[:, 0] = gate_scores(rng, 1, n, firing)[0].cpu().numpy() * 4
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    gate = Rows.from_gguf(kind, packed, width, DEVICE)
    x = tensor(rng.standard_normal((2, width)) * 0.1)
    x[:, 0] = 1
    scores = x @ gate.dequantize().T
    live = (scores > 0).any(0)
    assert {"all": 45, "none": 0, "one": 1, "some": 16}[firing] == live.sum()
    up, down = (poisoned(rows(rng, n, width, kind), live) for _ in range(2))
    a = torch.where(scores > 0, scores * (x @ up.dequantize().T).nan_to_num(), 0)
    y, count = ops.ffn_exact(x, gate, up, down)
    close(y, a @ down.dequantize().nan_to_num())
    assert int(count) == live.sum()
    again, _ = ops.ffn_exact(x, gate, up, down)
    assert torch.equal(y, again)


@pytest.mark.parametrize(("firing", "tokens"), CASES)
@pytest.mark.parametrize("kind", TYPES)
def test_listed_neurons(rng, kind, tokens, firing):
    """Predicted mode: gate rows of the list, up rows of those that fire, down rows of the same."""
    n, width = 45, 64
    predicted = gate_scores(rng, 1, n, firing)
    index, count = ops.select(predicted, 0.0)
    live = predicted[0] > 0
    gate, up, down = (poisoned(rows(rng, n, width, kind), live) for _ in range(3))
    x = tensor(rng.standard_normal((tokens, width)))
    scores, ups = ((x @ w.dequantize().T).nan_to_num() for w in (gate, up))
    expected = torch.where((scores > 0) & live, scores * ups, 0)
    a = ops.ffn_listed(x, gate, up, index, count)
    close(a[:, : int(count)], expected[:, live])
    fired = torch.tensor([3, 0], device=DEVICE)
    known = ops.ffn_listed(x, scores, up, index, count, fired=fired[1])
    close(known[:, : int(count)], expected[:, live])
    assert fired.tolist() == [3, int((expected != 0).sum())]
    close(ops.down_listed(a, down, index, count), expected @ down.dequantize().nan_to_num())


@pytest.mark.parametrize(("firing", "tokens"), CASES)
@pytest.mark.parametrize("kind", TYPES)
def test_listed_neurons_without_a_gate(rng, kind, tokens, firing):
    """One matrix into the FFN with a bias: its rows of the list are read, and no other matrix."""
    n, width = 45, 64
    predicted, bias = gate_scores(rng, 1, n, firing), tensor(rng.standard_normal(n) * 8)
    index, count = ops.select(predicted, 0.0)
    live = predicted[0] > 0
    into, x = poisoned(rows(rng, n, width, kind), live), tensor(rng.standard_normal((tokens, width)))
    bias[~live] = float("nan")
    scores = (x @ into.dequantize().T + bias).nan_to_num()
    expected = torch.where((scores >= 0.2) & live, scores, 0)
    for where in (ops, reference):
        fired = torch.tensor(3, device=DEVICE)
        a = where.ffn_listed(x, into, None, index, count, LayerRule(threshold=0.2), fired=fired, bias=bias)
        close(a[:, : int(count)], expected[:, live])
        assert fired == 3 + (expected != 0).sum()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", TYPES)
def test_a_bias_is_added_before_it_is_rectified(rng, kind, tokens, relu):
    w, x = rows(rng, 45, 64, kind), tensor(rng.standard_normal((tokens, 64)))
    bias = tensor(rng.standard_normal(45) * 8)
    expected = x @ w.dequantize().T + bias
    for where in (ops, reference):
        close(where.dot_rows(x, w, bias, relu), expected.relu() if relu else expected)


def test_a_bias_that_does_not_fit(rng):
    w, x = rows(rng, 45, 64, "F32"), torch.zeros(1, 64, device=DEVICE)
    for bias in (torch.zeros(44), torch.zeros(45).half()):
        with pytest.raises(ShapeError, match="bias does not fit the weights"):
            ops.dot_rows(x, w, bias)
        with pytest.raises(ShapeError, match="bias does not fit the weights"):
            ops.ffn_listed(x, w, None, *ops.select(torch.ones(1, 45, device=DEVICE), 0.0), bias=bias)


def test_an_up_row_whose_gate_does_not_fire_is_not_read(rng):
    index, count = ops.select(tensor(np.ones((1, 45))), 0.5)
    gate, x = rows(rng, 45, 64, "F32"), tensor(rng.standard_normal((1, 64)))
    fires = (x @ gate.dequantize().T)[0] > 0
    up = poisoned(rows(rng, 45, 64, "F32"), fires)
    close(ops.ffn_listed(x, gate, up, index, count), reference.ffn_listed(x, gate, up, index, count))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("n", [1, 37, 2500, 17000])
@pytest.mark.parametrize("always", [False, True])
def test_select_lists_in_order(rng, tokens, n, always):
    scores = tensor(rng.standard_normal((tokens, n)))
    flags = tensor(rng.random(n)) < 0.1 if always else None
    counter = torch.tensor([10, 20], device=DEVICE)
    index, count = ops.select(scores, 1.5, flags, counter[1])
    wanted = (scores >= 1.5).any(0) | (flags if always else False)
    assert torch.equal(index[: int(count)].long(), wanted.nonzero()[:, 0])
    assert counter.tolist() == [10, 20 + int(count)]


@pytest.mark.parametrize("linear", [False, True], ids=["relu, no bias", "linear, bias"])
@pytest.mark.parametrize("kind", TYPES)
def test_predictor(rng, kind, linear):
    fc1, fc2 = rows(rng, 32, 64, kind), rows(rng, 70, 32, kind)
    x, bias = tensor(rng.standard_normal((1, 64))), tensor(rng.standard_normal(70) * 9) if linear else None
    hidden = x @ fc1.dequantize().T
    logits = (hidden if linear else torch.relu(hidden)) @ fc2.dequantize().T + (bias if linear else 0)
    threshold = float(logits.quantile(0.8))
    always = torch.zeros(70, dtype=torch.bool, device=DEVICE)
    always[3] = True
    index, count = ops.predict(x, fc1, fc2, threshold, always, relu=not linear, bias=bias)
    listed = set(index[: int(count)].tolist())
    certain = set(((logits[0] > threshold + 1e-3) | always).nonzero()[:, 0].tolist())
    possible = set(((logits[0] > threshold - 1e-3) | always).nonzero()[:, 0].tolist())
    assert certain <= listed <= possible


@pytest.mark.parametrize("name", RULES)
def test_firing_rules(rng, name):
    """Each against its formula, by gate rows and by scores; dReLU rectifies up values too."""
    gate, up, down = (rows(rng, 20, 32, "F32") for _ in range(3))
    x, thresholds = tensor(rng.standard_normal((2, 32))), np.float32(0)
    if RULES[name].letter:
        thresholds = rng.uniform(0.1, 3, 20).astype(np.float32)
    own = tuple(thresholds.tolist()) if thresholds.ndim else 0.0
    rule = LayerRule.of(FiringRule(name, (own,)), 0, torch.device(DEVICE))
    scores, ups = x @ gate.dequantize().T, x @ up.dequantize().T
    values, fires = (tensor(part) for part in fired(name, scores.cpu().numpy(), thresholds))
    a = torch.where(fires > 0, values * (ups.relu() if name == "drelu" else ups), 0)
    for where in (ops, reference):
        close(where.activate(scores, ups, rule), a)
        close(where.s2(scores, x, up, rule), a)
        close(where.ffn_exact(x, gate, up, down, rule)[0], a @ down.dequantize())
        index, count = where.select_fired(scores, rule)
        listed = index[: int(count)].long()
        assert torch.equal(listed, (fires > 0).any(0).nonzero()[:, 0])
        found = where.ffn_listed(x, gate, up, index, count, rule)
        close(found[:, : len(listed)], a[:, listed])


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 70), width=st.integers(1, 70), tokens=st.integers(1, 8), seed=st.integers(0, 999))
def test_any_shape(n, width, tokens, seed):
    rng = np.random.default_rng(seed)
    gate, up, down = (rows(rng, n, width, FLOATS[seed % 3]) for _ in range(3))
    x = tensor(rng.standard_normal((tokens, width)))
    expected, count = reference.ffn_exact(x, gate, up, down)
    y, got = ops.ffn_exact(x, gate, up, down)
    assert torch.equal(got, count)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


def test_registered_with_torch(rng):
    """torch.library's own check of the schema."""
    w, x = rows(rng, 20, 64, "F32"), tensor(rng.standard_normal((1, 64)))
    torch.library.opcheck(
        torch.ops.hotcold.dot_rows, (x, w.data, w.scales, 0, None, False), test_utils="test_schema"
    )
    assert torch.ops.hotcold.s2.default._schema.name == "hotcold::s2"


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 63), r"x does not fit the weights \(got \(1, 63\), expected \(1, 64\)\)"),
        (torch.zeros(1, 64, dtype=torch.float16), "x must be contiguous float32"),
        (torch.zeros(64, 2).T, "x must be contiguous float32"),
        (torch.zeros(9, 64), r"x has too many tokens \(got 9, expected 1 to 8\)"),
    ],
)
def test_what_a_kernel_cannot_take(rng, x, message):
    with pytest.raises(ShapeError, match=message):
        ops.dot_rows(x, rows(rng, 4, 64, "F32"))
