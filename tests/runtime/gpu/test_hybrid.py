"""Both sides together, torch on the CPU being the device: the CPU engine's tokens, wherever neurons live."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoding import greedy
from stored_rows import relative_error

from hotcold.errors import MismatchError
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.gpu.hybrid import HybridEngine
from hotcold.runtime.placement.plan import PlacedLayer, Placement
from hotcold.runtime.reference import ReferenceEngine

IDS = np.random.default_rng(5).integers(3, 300, 80)
D_FF = 96
MODES = ["exact", "predicted"]


def plan(*layers: PlacedLayer) -> Placement:
    return Placement(layers, (1 << 30,))


def split(*hot: int | range) -> PlacedLayer:
    return PlacedLayer(True, np.array(sorted(hot), np.int32), D_FF)


ALL, NONE = split(*range(D_FF)), split()
ON_CPU = PlacedLayer(False, np.empty(0, np.int32), D_FF)
SOME = split(*np.random.default_rng(1).choice(D_FF, 40, replace=False).tolist())
PLANS = {
    "split": plan(SOME, split(*range(5, 70))),
    "all hot": plan(ALL, ALL),
    "all cold": plan(NONE, NONE),
    "one of each": plan(ALL, NONE),
    "last layer on the CPU": plan(SOME, ON_CPU),
    "all layers on the CPU": plan(ON_CPU, ON_CPU),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PLANS)
def test_the_cpu_engines_tokens(bundle, mode, name):
    hybrid = HybridEngine.load(bundle.path, PLANS[name], mode, "cpu", 2, n_ctx=64)
    assert greedy(hybrid, 40, IDS) == greedy(Engine.load(bundle.path, mode, 2, n_ctx=64), 40, IDS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["split", "last layer on the CPU", "all layers on the CPU"])
def test_an_embedding_that_is_not_the_head_stays_in_main_memory(make_bundle, mode, name):
    path = make_bundle(tied=False).path
    hybrid = HybridEngine.load(path, PLANS[name], mode, "cpu", 2, n_ctx=64)
    weights = hybrid._first._stages[0].weights
    assert weights.embedding is None and weights.head is not None
    assert greedy(hybrid, 40, IDS) == greedy(Engine.load(path, mode, 2, n_ctx=64), 40, IDS)


# Layers without cold neurons before, between and after those with some: one run of the device each.
DEEP_PLANS = {
    "whole, split, whole, whole, split": (ALL, SOME, ALL, ALL, SOME),
    "split, whole, split, whole, whole": (SOME, ALL, NONE, ALL, ALL),
    "whole, split, whole, CPU, CPU": (ALL, SOME, ALL, ON_CPU, ON_CPU),
    "whole, whole, split, split, CPU": (ALL, ALL, SOME, SOME, ON_CPU),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DEEP_PLANS)
def test_runs_of_whole_layers(make_bundle, mode, name):
    bundle = make_bundle(n_layers=5)
    hybrid = HybridEngine.load(bundle.path, plan(*DEEP_PLANS[name]), mode, "cpu", 2, n_ctx=64)
    engine = Engine.load(bundle.path, mode, 2, n_ctx=64)
    assert greedy(hybrid, 30, IDS) == greedy(engine, 30, IDS)
    got, expected = hybrid.stats(), engine.stats()
    assert np.array_equal(got.predicted, expected.predicted)
    assert np.abs(got.fired - expected.fired).max() <= 4
    measured, splits = hybrid.measured(), sum(layer is SOME or layer is NONE for layer in DEEP_PLANS[name])
    assert measured.handovers + measured.skipped_handovers == splits * 30
    assert (measured.hot_s > 0) == (measured.cold_s > 0) == (splits > 0)


def test_a_share_comes_back_for_some_tokens_and_not_for_others(make_bundle):
    """Two layers with a single cold neuron each, so that a step follows hand-overs of both kinds."""
    bundle = make_bundle(n_layers=5)
    layers = (split(*range(1, D_FF)), split(*range(D_FF - 1)), ALL, ALL, split(*range(D_FF - 1)))
    hybrid = HybridEngine.load(bundle.path, plan(*layers), "predicted", "cpu", 1, n_ctx=64)
    assert greedy(hybrid, 40, IDS) == greedy(Engine.load(bundle.path, "predicted", 1, n_ctx=64), 40, IDS)
    measured = hybrid.measured()
    assert measured.handovers > 10 and measured.skipped_handovers > 10


@pytest.mark.parametrize(("layers", "handovers", "extra"), [
    ((ALL, ALL, ALL, ALL, ALL), 0, 1),
    ((ALL, SOME, ALL, ALL, SOME), 2, 1),
    ((SOME, SOME, SOME, SOME, SOME), 5, 1),
    ((ALL, SOME, ALL, ON_CPU, ON_CPU), 1, 2),
])  # fmt: skip
def test_recorded_steps_of_a_token(make_bundle, monkeypatch, layers, handovers, extra):
    """Each takes some 10 us of the host: two per hand-over, one to the end, one after layers on the CPU."""
    keys: list[object] = []
    hybrid = HybridEngine.load(make_bundle(n_layers=5).path, plan(*layers), "predicted", "cpu", 1, n_ctx=64)
    hybrid.prefill(IDS[:3])
    monkeypatch.setattr(hybrid._first._stages[0]._graphs, "run", lambda key, step: (keys.append(key), step()))
    hybrid.decode(7)
    assert len(keys) == len(set(keys)) == 2 * handovers + extra


@pytest.mark.parametrize("layers", [(ALL, ALL), (ALL, ON_CPU), (ON_CPU, ON_CPU)])
def test_the_cpu_engines_tokens_in_dense_mode(bundle, layers):
    hybrid = HybridEngine.load(bundle.path, plan(*layers), "dense", "cpu", 1, n_ctx=64)
    assert greedy(hybrid, 40, IDS) == greedy(Engine.load(bundle.path, "dense", 1, n_ctx=64), 40, IDS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fields", [
    {"quant": "Q8_0"},
    {"quant": "Q4_0"},
    {"activation": "fatrelu", "activation_threshold": 0.3},
    {"activation": "drelu"},
])  # fmt: skip
def test_variants_are_near_the_reference(make_bundle, mode, fields):
    """With quantized weights the CPU's share rounds activations to int8, as the CPU engine does."""
    path = make_bundle(**fields).path
    hybrid = HybridEngine.load(path, PLANS["split"], mode, "cpu", 2)
    reference = ReferenceEngine.load(path, mode)
    reference.cache_dtype = torch.float16
    expected = reference.prefill(IDS, all_logits=True)
    limit = 0.25 if "quant" in fields else 2e-3
    assert relative_error(hybrid.prefill(IDS, all_logits=True), expected) < limit
    hybrid.reset()
    steps = np.stack([hybrid.decode(token) for token in IDS[:10]])
    assert relative_error(steps, expected[:10]) < limit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["split", "last layer on the CPU"])
def test_counts_are_the_cpu_engines(bundle, mode, name):
    hybrid = HybridEngine.load(bundle.path, PLANS[name], mode, "cpu", 2)
    engine = Engine.load(bundle.path, mode, 2)
    for each in (hybrid, engine):
        each.audit = mode == "predicted"
        each.prefill(IDS[:70])
        for token in IDS[70:]:
            each.decode(token)
    got, expected = hybrid.stats(), engine.stats()
    assert got.tokens == expected.tokens == 80
    assert np.array_equal(got.predicted, expected.predicted)
    # A gate within rounding of zero may fall on either side.
    assert np.abs(got.fired - expected.fired).max() <= 4
    assert np.abs(got.missed - expected.missed).max() <= 4


def test_telemetry(bundle):
    hybrid = HybridEngine.load(bundle.path, PLANS["split"], "predicted", "cpu", 1)
    hybrid.prefill(IDS[:4])
    hybrid.reset_stats()
    for token in IDS[4:14]:
        hybrid.decode(token)
    measured, stats = hybrid.measured(), hybrid.stats()
    assert measured.decoded == measured.tokens == 10
    assert measured.hot_fired + measured.cold_fired == stats.fired.sum()
    assert 0 < measured.hot_hit_rate < 1 and 0 < measured.cold_per_token < 2 * D_FF
    assert measured.handovers + measured.skipped_handovers == 20
    out = 64 * 4
    cold_masks = (D_FF - 40) + (D_FF - 65)
    assert measured.bytes_to_host == 10 * (2 * out + cold_masks)
    assert measured.bytes_to_device == measured.handovers * out
    assert 0 < measured.hot_s + measured.cold_s + measured.wait_s < measured.decode_s <= measured.total_s
    assert measured.as_json()["overlap"] == 0 and len(measured.lines()) == 2


def test_layers_without_cold_neurons_never_hand_over(bundle):
    hybrid = HybridEngine.load(bundle.path, PLANS["all hot"], "predicted", "cpu", 1)
    greedy(hybrid, 5, IDS)
    measured = hybrid.measured()
    assert measured.handovers == measured.skipped_handovers == measured.bytes_to_host == 0
    assert measured.hot_hit_rate == 1 and measured.as_json()["overlap"] is None


def test_a_layer_whose_cold_neurons_are_not_wanted_sends_nothing_back(make_bundle):
    """A threshold that no logit reaches: only the hot neurons of the bundle, which the device has."""
    bundle = make_bundle(predictor_threshold=1e9)
    hybrid = HybridEngine.load(bundle.path, plan(split(1, 5, 9, 20), split(3)), "predicted", "cpu", 1)
    tokens = greedy(hybrid, 10, IDS)
    measured = hybrid.measured()
    assert measured.handovers == 0 and measured.skipped_handovers == 20 and measured.bytes_to_device == 0
    assert tokens == greedy(Engine.load(bundle.path, "predicted", 1), 10, IDS)


def test_plans_of_other_models(bundle):
    with pytest.raises(MismatchError, match="this plan is for another model"):
        HybridEngine.load(bundle.path, plan(SOME), "exact", "cpu")
    with pytest.raises(
        MismatchError, match=r"dense mode needs a plan with whole layers \(got layer 0 is split"
    ):
        HybridEngine.load(bundle.path, PLANS["split"], "dense", "cpu")


@pytest.mark.parametrize("mode", MODES)
def test_bytes_are_the_cpu_engines(bundle, mode):
    """But for padding, and for what the CPU engine keeps in another type."""
    hybrid, engine = (
        HybridEngine.load(bundle.path, PLANS["split"], mode, "cpu", 1),
        Engine.load(bundle.path, mode, 1),
    )
    for each in (hybrid, engine):
        each.prefill(IDS[:20])
    got, expected = hybrid.bytes_per_token(), engine.bytes_per_token()
    for part in ("attention", "predictor", "ffn", "head", "kv", "other"):
        assert got[part] == pytest.approx(expected[part], rel=0.3), part
