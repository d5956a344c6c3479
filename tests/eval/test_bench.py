"""The order of runs, the pairing of ratios and the counting, on sides whose speed is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from hotcold.errors import InputError
from hotcold.eval import bench as module
from hotcold.eval.bench import Plan, bench, segments
from hotcold.eval.results import Ratio
from hotcold.eval.sides import EngineSide
from hotcold.runtime.stats import Stats

N_VOCAB = 11
PARTS = {"attention": 3e6, "predictor": 1e6, "ffn": 4e6, "head": 2e6, "kv": 1e5, "other": 1e4}


class Clockwork:
    """A side that takes `per_token[round]` seconds for a token it decodes, and a tenth of it in a prompt."""

    n_vocab, n_ctx = N_VOCAB, 64

    def __init__(self, name, log, seconds_per_token, path=None):
        self.name, self.log, self.per_token, self.path = name, log, seconds_per_token, path
        self.runs, self.seconds, self.position = -1, 0.0, 0

    def reset(self):
        self.seconds, self.position = 0.0, 0

    def prefill(self, ids, all_logits=False):
        if not all_logits:
            self.runs += 1
            self.log.append((self.name, tuple(ids)))
        self._work(len(ids), 0.1)
        return np.tile(np.arange(N_VOCAB, dtype=np.float32), (len(ids), 1))

    def decode(self, token):
        self._work(1, 1.0)
        return np.arange(N_VOCAB, dtype=np.float32)

    def _work(self, n, weight):
        self.seconds += n * weight * self.per_token[min(self.runs, len(self.per_token) - 1)]
        self.position += n


class CountingEngine:
    """Fires a fixed share of 100 neurons in 2 layers; counts missed ones only while it is audited."""

    audit = False

    def __init__(self, mode):
        self.mode = mode
        self.reset_stats()

    def reset_stats(self):
        self.tokens = self.audited = 0

    def count(self, n):
        self.tokens += n
        self.audited += n * self.audit

    def stats(self):
        fired, predicted, missed = (
            np.array([n * count, n * count])
            for n, count in ((20, self.tokens), (30, self.tokens), (5, self.audited))
        )
        return Stats(self.tokens, 100, fired, predicted, missed, audit=self.audit)

    def bytes_per_token(self, position):
        assert not self.audit
        return {**PARTS, "kv": PARTS["kv"] * position}


class ClockworkEngine(Clockwork, EngineSide):
    def __init__(self, name, *arguments):
        super().__init__(name, *arguments)
        self.engine = CountingEngine(name)

    def _work(self, n, weight):
        super()._work(n, weight)
        self.engine.count(n)


@pytest.fixture
def measured(monkeypatch, bundle):
    """One bench of two peers and two modes over three rounds that get slower and slower."""
    monkeypatch.setattr(module, "_SETTLE_S", 0.0)
    # seven readings a round, with plain loads and asking ahead; the machine gets slower as the sides do
    plain, prefetched = (
        itertools.chain.from_iterable(itertools.repeat(gb_s, 7) for gb_s in speeds)
        for speeds in ((40.0, 20.0, 10.0), (30.0, 15.0, 12.0))
    )

    def read_bandwidth(n_threads, *, prefetching=False):
        return next(prefetched if prefetching else plain) / 2 * n_threads

    monkeypatch.setattr(module, "read_bandwidth", read_bandwidth)
    log: list = []
    drift = np.array([9.0, 1.0, 2.0, 4.0])  # the first is the warm-up
    path = bundle / "tiny.gguf"
    peers = {
        "llama.cpp (smallthinker)": Clockwork("true", log, drift * 0.010, path),
        "llama.cpp (llama)": Clockwork("twin", log, drift * 0.008, path),
    }
    ours = {
        "exact": ClockworkEngine("exact", log, drift * 0.004),
        "predicted": ClockworkEngine("predicted", log, drift * np.array([1, 0.005, 0.004, 0.002])),
    }
    texts = segments(np.arange(30), Plan(rounds=3, n_prompt=6, n_gen=4))
    windows = [np.arange(8) % N_VOCAB]
    originals = {
        "as it came": Clockwork("came", log, drift * 0.005, path),
        "original dense": ClockworkEngine("dense", log, drift * 0.006),
    }
    report = bench(
        peers, ours, texts, windows, truth="llama.cpp (smallthinker)", n_threads=2, originals=originals
    )
    return report, log, texts


def row(measured, side):
    return next(row for row in measured[0].rows if row.side == side)


def test_every_side_runs_every_segment_once_after_its_warm_up(measured):
    _, log, texts = measured
    prompts = [tuple(text.prompt) for text in [texts[0], *texts]]
    for name in ("came", "dense", "true", "twin", "exact"):
        assert [ids for who, ids in log if who == name] == prompts
    audited = [tuple(text.prompt) for text in texts]
    assert [ids for who, ids in log if who == "predicted"] == prompts + audited


def test_the_order_differs_between_rounds(measured):
    names = [name for name, _ in measured[1]]
    rounds = [names[at : at + 6] for at in range(6, 24, 6)]
    assert len({tuple(order) for order in rounds}) == 3
    assert len({order[0] for order in rounds}) > 1


@given(n=st.integers(1, 6), index=st.integers(0, 50))
def test_any_order_has_every_side_once(n, index):
    names = [f"side {i}" for i in range(n)]
    assert sorted(module._order(names, index)) == names


def test_speeds_are_medians_of_the_rounds_without_the_warm_up(measured):
    exact = row(measured, "exact")
    assert exact.generation.median == pytest.approx(1 / 0.008)
    assert exact.generation.low == pytest.approx(1 / 0.016)
    assert exact.generation.high == pytest.approx(1 / 0.004)
    assert exact.prompt.median == pytest.approx(10 / 0.008)


def test_ratios_are_paired_and_to_the_fastest_peer(measured):
    assert measured[0].baseline == "llama.cpp (llama)"
    exact, predicted = row(measured, "exact"), row(measured, "predicted")
    # speeds drift fourfold, and yet the pairs agree
    assert (exact.ratio.low, exact.ratio.high) == (pytest.approx(2.0), pytest.approx(2.0))
    assert predicted.ratio.median == pytest.approx(2.0)
    assert (predicted.ratio.low, predicted.ratio.high) == (pytest.approx(1.6), pytest.approx(4.0))
    assert row(measured, "llama.cpp (smallthinker)").ratio.median == pytest.approx(0.8)


def test_every_row_has_its_ratios_to_the_originals(measured):
    exact = row(measured, "exact").to_originals
    assert exact["as it came"].median == pytest.approx(5 / 4)
    assert exact["original dense"].median == pytest.approx(6 / 4)
    assert row(measured, "original dense").to_originals["original dense"].median == 1.0
    assert measured[0].baseline == "llama.cpp (llama)"  # the originals, though faster, are no baseline


def test_originals_have_a_perplexity_and_no_distance(measured):
    for name in ("as it came", "original dense"):
        quality = row(measured, name).quality
        assert quality.ppl > 1 and quality.kl is None
    assert row(measured, "original dense").activity.parts["ffn"] == PARTS["ffn"]


def test_a_side_of_another_vocabulary_is_refused(bundle):
    sides = {name: Clockwork(name, [], np.ones(2), bundle / "tiny.gguf") for name in ("a", "b")}
    sides["b"].n_vocab = N_VOCAB + 1
    texts = segments(np.arange(30), Plan(rounds=3, n_prompt=6, n_gen=4))
    with pytest.raises(InputError, match=r"b: the vocabulary size differs \(got 12, expected 11\)"):
        bench({"a": sides["a"]}, {}, texts, [], truth="a", n_threads=1, originals={"b": sides["b"]})


@given(st.lists(st.floats(0.05, 20), min_size=2, max_size=30))
def test_the_interval_is_scipys_of_a_paired_test_on_logarithms(samples):
    ratio = Ratio.of(samples)
    assert (ratio.median, ratio.low, ratio.high) == (np.median(samples), min(samples), max(samples))
    if np.ptp(np.log(samples)) < 1e-9:
        return  # scipy's test has no answer for samples that are all alike
    interval = ttest_1samp(np.log(samples), 0).confidence_interval(0.95)
    assert (ratio.ci_low, ratio.ci_high) == pytest.approx(np.exp([interval.low, interval.high]))


@given(st.lists(st.floats(0.05, 20), min_size=2, max_size=30))
def test_a_ratio_and_its_inverse_have_the_same_interval(samples):
    ratio, inverse = Ratio.of(samples), Ratio.of([1 / sample for sample in samples])
    assert (1 / inverse.ci_high, 1 / inverse.ci_low) == pytest.approx((ratio.ci_low, ratio.ci_high))


def test_one_round_has_no_interval():
    assert np.isnan(Ratio.of([2.0]).ci_low)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    ratios = [Ratio.of(2.0 * np.exp(rng.normal(0, 0.2, 7))) for _ in range(2000)]
    assert np.mean([ratio.ci_low <= 2.0 <= ratio.ci_high for ratio in ratios]) == pytest.approx(
        0.95, abs=0.02
    )


def test_shares_are_of_the_best_bandwidth_beside_each_run(measured):
    share = row(measured, "exact").share
    n_bytes = sum(row(measured, "exact").roofline.parts.values())
    # plain loads are faster in two rounds and in the third those that ask ahead
    shares = sorted(n_bytes / 0.004 / gb_s for gb_s in (40e9, 40e9, 48e9))
    assert (share.low, share.median, share.high) == pytest.approx((shares[0], shares[1], shares[2]))


def test_both_read_loops_stand_beside_the_best(measured):
    report, *_ = measured
    assert (report.bandwidth.low, report.bandwidth.high) == (12.0, 40.0)
    assert (report.bandwidth_plain.low, report.bandwidth_plain.high) == (10.0, 40.0)
    assert (report.bandwidth_prefetching.low, report.bandwidth_prefetching.high) == (12.0, 30.0)


def test_without_windows_nothing_has_a_quality(bundle):
    sides = {name: Clockwork(name, [], np.ones(2), bundle / "tiny.gguf") for name in ("a", "b")}
    texts = segments(np.arange(10), Plan(rounds=1, n_prompt=6, n_gen=4))
    report = bench({"a": sides["a"]}, {}, texts, [], truth="a", n_threads=1, originals={"b": sides["b"]})
    assert [row.quality for row in report.rows] == [None, None]


def test_recall_comes_from_an_audited_pass(measured):
    activity = row(measured, "predicted").activity
    assert activity.sparsity == pytest.approx(0.80)
    assert activity.predicted_sparsity == pytest.approx(0.70)
    assert activity.recall == pytest.approx(20 / 25)


def test_bytes_are_those_at_the_middle_of_the_generated_tokens(measured):
    roofline = row(measured, "predicted").roofline
    assert roofline.parts["kv"] == PARTS["kv"] * (6 + 2)
    assert roofline.bandwidth == 20.0


def test_the_twin_computes_something_else_and_gets_no_quality(measured):
    assert row(measured, "llama.cpp (llama)").quality is None
    assert row(measured, "llama.cpp (smallthinker)").quality.ppl > 1
    assert row(measured, "exact").quality.kl == pytest.approx(0)


@pytest.mark.parametrize("field", ["rounds", "n_prompt", "n_gen"])
def test_a_plan_of_nothing_is_refused(field):
    sizes = {"rounds": 1, "n_prompt": 1, "n_gen": 1} | {field: 0}
    with pytest.raises(InputError, match=rf"{field}: must be at least 1 \(got 0\)"):
        Plan(**sizes)


def test_segments_share_no_token():
    texts = segments(np.arange(24), Plan(rounds=4, n_prompt=4, n_gen=2))
    np.testing.assert_array_equal(
        np.concatenate([np.concatenate([text.prompt, text.generated]) for text in texts]), np.arange(24)
    )
    assert texts[0].middle == 5
