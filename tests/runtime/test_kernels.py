"""Every kernel x type x shape x ISA against a readable numpy reference.

The references quantize activations exactly as the kernels do, so that the limits are those of float rounding
and not those of int8.
"""

import numpy as np
import pytest
from firing import SPARSE_RULES, fired, kernel_ids
from stored_rows import TYPES, stored

from hotcold.model.firing import RULES, FiringRule
from hotcold.runtime.cpu import _cpu

ops = _cpu.ops
ISAS = _cpu.available_isas()
WIDTHS = [32, 64, 96, 192, 512, 576, 1088, 2048]

isas = pytest.mark.parametrize("isa", ISAS)
types = pytest.mark.parametrize("kind", TYPES)
widths = pytest.mark.parametrize("n", WIDTHS)


def int8_blocks(x):
    """x as the kernels see it: int8 per 32 values; a last half block is padded by zeros."""
    blocks = np.pad(x, [(0, 0), (0, -x.shape[1] % 32)]).reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    q = np.rint(blocks * np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0).astype(np.float32))
    return (q * scale).reshape(len(x), -1)[:, : x.shape[1]].astype(np.float64)


def seen(kind, x):
    return int8_blocks(x) if kind.startswith("Q") else x.astype(np.float64)


def assert_close(got, expected, limit=2e-5):
    scale = max(np.sqrt(np.mean(expected**2)), 1e-9)
    assert np.abs(got - expected).max() <= limit * scale * np.sqrt(expected.size) + 1e-7


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@isas
@types
@widths
@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
def test_panel(isa, kind, n, tokens, rng):
    data, w = stored(kind, rng.standard_normal((40, n)))
    x = rng.standard_normal((tokens, n)).astype(np.float32)
    got = ops.panel(isa, TYPES[kind], data, x)[:, :40]
    assert_close(got, seen(kind, x) @ w.T, 2e-4 if kind.startswith("Q") else 2e-5)


@types
@widths
def test_a_packed_panel_unpacks_to_the_same_values(kind, n, rng):
    data, w = stored(kind, rng.standard_normal((19, n)))
    np.testing.assert_array_equal(ops.unpack_panel(TYPES[kind], data, n), w.astype(np.float32))


@isas
@types
@widths
@pytest.mark.parametrize("tokens", [[0], [2, 0], [0, 1, 2, 3], [5, 4, 3, 2, 1, 0]])
def test_row_dot(isa, kind, n, tokens, rng):
    data, w = stored(kind, rng.standard_normal((5, n)))
    x = rng.standard_normal((6, n)).astype(np.float32)
    got = ops.row_dot(isa, TYPES[kind], data, x, np.array(tokens, np.int32))
    assert_close(got, w @ seen(kind, x)[tokens].T, 2e-4 if kind.startswith("Q") else 2e-5)


@isas
@types
@widths
@pytest.mark.parametrize("count", [1, 2, 4, 7, 16])
def test_down(isa, kind, n, count, rng):
    data, w = stored(kind, rng.standard_normal((count, n)))
    a = (rng.standard_normal(count) ** 3).astype(np.float32)
    got = ops.down(isa, TYPES[kind], data, a, n)
    expected = a @ w
    # Per output block the sixteen products a_i * scale_i share one int8 scale: half a step of error each.
    limit = (
        0.5 / 127 * np.abs(w).max() * np.abs(a).max() * np.sqrt(count) * 4 if kind.startswith("Q") else 1e-4
    )
    assert np.abs(got - expected).max() <= limit
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert error <= (1e-2 if kind.startswith("Q") else 1e-5)


@isas
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_down_of_one_neuron_is_exact_to_its_int8_multipliers(isa, kind, rng):
    data, w = stored(kind, rng.standard_normal((1, 576)))
    got = ops.down(isa, TYPES[kind], data, np.array([3.0], np.float32), 576)
    np.testing.assert_allclose(got, 3 * w[0], rtol=1e-5, atol=1e-6)


@isas
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("extreme", [0.0, 1e-20, 1e4])
def test_extreme_activations(isa, kind, extreme, rng):
    data, w = stored(kind, rng.standard_normal((16, 64)))
    x = np.full((1, 64), extreme, np.float32)
    got = ops.row_dot(isa, TYPES[kind], data, x, np.array([0], np.int32))[:, 0]
    assert_close(got / max(extreme, 1e-30), (w @ x[0]) / max(extreme, 1e-30), 1e-3)


@isas
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (-1, 1)])
def test_products_at_their_largest_do_not_saturate(isa, kind, signs):
    weights = np.full((16, 512), 7 / 8 if kind == "Q4_0" else 1)
    if kind == "Q4_0":
        weights[:, ::32] = -1  # sets the scale of its block, so that all others are stored as 15
    data, w = stored(kind, weights)
    x = np.tile(np.array([signs], np.float32), (1, 256))
    assert_close(ops.panel(isa, TYPES[kind], data, x)[0], w @ x[0], 1e-3)
    assert_close(ops.row_dot(isa, TYPES[kind], data, x, np.array([0], np.int32))[:, 0], w @ x[0], 1e-3)


@isas
@pytest.mark.parametrize("n", [16, 48, 100, 576])
def test_rms_norm(isa, n, rng):
    x, weight = rng.standard_normal((2, n)).astype(np.float32)
    expected = x / np.sqrt(np.mean(x.astype(np.float64) ** 2) + 1e-5) * weight
    np.testing.assert_allclose(ops.rms_norm(isa, x, weight, 1e-5), expected, rtol=2e-6, atol=1e-7)


ODD_GATES = [0, 100, -100, 88, -88, 1e-8, -1e-8, 30, 0.5, np.nextafter(np.float32(0.5), np.float32(0)), -0.5]


@isas
@pytest.mark.parametrize("each", [False, True], ids=["one-threshold", "one-each"])
@pytest.mark.parametrize("rule", RULES)
def test_activate_and_fires(isa, rule, each, rng):
    """Values, who fires, and how many: gates at a threshold do, NaN does not."""
    gate = np.concatenate([rng.standard_normal(53) * 4, ODD_GATES]).astype(np.float32)
    up = rng.standard_normal(64).astype(np.float32)
    threshold = np.float32(0.5) if RULES[rule].letter else np.float32(0)
    thresholds = rng.permutation(np.linspace(0.1, 0.9, 64)).astype(np.float32) if each else threshold
    thresholds = thresholds if RULES[rule].letter else threshold
    values, fires = fired(rule, gate, thresholds)
    limits = FiringRule(rule, (tuple(np.atleast_1d(thresholds).tolist()),)).kernel_thresholds(0)
    # a difference, and 1 + erf of what is far below 0
    atol = 1e-6 if rule == "shifted_relu" or rule.endswith("gelu") else 1e-30
    found, count = ops.activate(isa, *kernel_ids(rule), gate, up, limits)
    expected = np.where(fires, values * (np.maximum(up, 0) if rule == "drelu" else up), 0)
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=atol)
    assert count == fires.sum()
    for i in range(0, 64, 16):
        here = limits[i : i + 16] if len(limits) > 1 else limits
        became, bits = ops.fires(isa, *kernel_ids(rule), gate[i : i + 16], here)
        assert [bool(bits >> j & 1) for j in range(16)] == fires[i : i + 16].tolist()
        kept = fires[i : i + 16]
        np.testing.assert_allclose(became[kept], values[i : i + 16][kept], rtol=3e-6, atol=atol)


@isas
@pytest.mark.parametrize("rule", SPARSE_RULES)
def test_what_is_no_number_does_not_fire(isa, rule):
    gate, ones = np.full(16, np.nan, np.float32), np.ones(16, np.float32)
    limit = np.array([0.1], np.float32)
    assert ops.fires(isa, *kernel_ids(rule), gate, limit)[1] == 0
    found, count = ops.activate(isa, *kernel_ids(rule), gate, ones, limit)
    assert (found.any(), count) == (False, 0)


@isas
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("positions", [1, 15, 16, 33, 200])
def test_attention(isa, heads, dim, positions, rng):
    q = rng.standard_normal((heads, dim)).astype(np.float32)
    k, v = rng.standard_normal((2, positions, dim)).astype(np.float16).astype(np.float32)
    scores = q.astype(np.float64) @ k.T
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(ops.attention(isa, q, k, v), expected, rtol=2e-4, atol=2e-5)


@isas
def test_nan_in_the_cache_beyond_the_last_position_is_not_used(isa, rng):
    q, k, v = (rng.standard_normal((n, 32)).astype(np.float32) for n in (2, 17, 17))
    assert np.isfinite(ops.attention(isa, q, k, v)).all()


def test_unknown_isa_is_refused():
    with pytest.raises(ValueError, match="does not support the kernels 'sse9'"):
        ops.rms_norm("sse9", np.ones(16, np.float32), np.ones(16, np.float32), 1e-5)
