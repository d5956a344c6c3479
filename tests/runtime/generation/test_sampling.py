"""Properties of the samplers, and the same candidates as llama.cpp's own sampler chain."""

from __future__ import annotations

import ctypes
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hotcold.errors import InputError
from hotcold.runtime.generation import sampling
from hotcold.runtime.generation.sampling import Sampler, SamplingParams, candidates

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temp": 1.0, "seed": 1}
finite = st.floats(-30, 30, width=32)
some_logits = st.integers(1, 60).flatmap(lambda n: arrays(np.float32, n, elements=finite))


def random_logits(seed, n=500, scale=3.0):
    return (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32)


@given(some_logits, st.floats(0.01, 5), st.integers(0, 70), st.floats(0.01, 1), st.floats(0, 1))
def test_candidates_are_a_distribution_over_the_likeliest(logits, temp, k, p, m):
    ids, probabilities = candidates(logits, [], SamplingParams(temp=temp, top_k=k, top_p=p, min_p=m))
    assert 1 <= len(ids) == len(set(ids.tolist())) <= min(len(logits), k or len(logits))
    np.testing.assert_allclose(probabilities.sum(), 1)
    assert (np.diff(probabilities) <= 0).all()
    left_out = np.delete(logits, ids)
    assert not len(left_out) or left_out.max() <= logits[ids].min()


@given(some_logits, st.integers(0, 2**32))
def test_greedy_is_the_first_maximum_whatever_the_seed(logits, seed):
    assert Sampler(SamplingParams(temp=0, seed=seed)).sample(logits) == int(np.argmax(logits))


@given(some_logits, st.integers(1, 70))
def test_top_k_equals_a_stable_sort(logits, k):
    ids, values = sampling.top_k(logits, k)
    np.testing.assert_array_equal(ids, np.argsort(-logits, kind="stable")[:k])
    np.testing.assert_array_equal(values, logits[ids])


@given(some_logits, st.floats(0.01, 1, exclude_max=True))
def test_top_p_is_the_smallest_sufficient_prefix(logits, p):
    logits = -np.sort(-logits)
    kept, probabilities = sampling.top_p(logits, p), sampling.softmax(logits)
    assert probabilities[: kept - 1].sum() < p + 1e-9
    assert probabilities[:kept].sum() >= p - 1e-9


@given(some_logits, st.floats(0.001, 1))
def test_min_p_bounds_the_odds_against_the_first(logits, p):
    logits = -np.sort(-logits)
    kept, probabilities = sampling.min_p(logits, p), sampling.softmax(logits)
    assert (probabilities[:kept] >= probabilities[0] * p * (1 - 1e-5)).all()
    assert (probabilities[kept:] <= probabilities[0] * p * (1 + 1e-5)).all()


@given(some_logits, st.data(), st.floats(1.01, 3))
def test_penalty_lowers_recent_tokens_once_and_leaves_the_rest(logits, data, penalty):
    history = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=8))
    last_n = data.draw(st.integers(-1, 8))
    recent = set(history if last_n < 0 else history[len(history) - min(last_n, len(history)) :])
    penalized = sampling.penalize(logits, history, penalty, last_n)
    for token, (before, after) in enumerate(zip(logits, penalized, strict=True)):
        wanted = before if token not in recent else before / penalty if before > 0 else before * penalty
        np.testing.assert_allclose(after, wanted, rtol=1e-5)


def test_same_seed_same_tokens_and_another_seed_others():
    logits = random_logits(0)
    draws = [
        [sampler.sample(logits) for _ in range(50)]
        for sampler in (Sampler(SamplingParams(seed=seed)) for seed in (7, 7, 8))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_seed_of_minus_one_is_new_each_time_and_is_told():
    first, second = Sampler(SamplingParams()), Sampler(SamplingParams())
    assert first.seed != second.seed and first.seed >= 0
    repeated = Sampler(SamplingParams(seed=first.seed))
    assert [first.sample(random_logits(1)) for _ in range(20)] == [
        repeated.sample(random_logits(1)) for _ in range(20)
    ]


@pytest.mark.parametrize("temp", [0, 0.8])
@pytest.mark.parametrize("bad", [[1, np.nan, 2], [np.inf, 1, 2], [np.nan] * 3, [-np.inf] * 3])
def test_logits_that_are_not_finite_are_refused(bad, temp):
    with pytest.raises(InputError, match="the model gives logits that are not finite"):
        Sampler(SamplingParams(temp=temp, seed=1)).sample(np.float32(bad))


def test_a_masked_token_is_never_drawn():
    sampler = Sampler(SamplingParams(seed=1))
    logits = np.float32([0, -np.inf, 0, -np.inf])
    assert {sampler.sample(logits) for _ in range(50)} == {0, 2}


def test_draws_follow_the_probabilities():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(SamplingParams(**OFF))
    counts = Counter(sampler.sample(np.log(probabilities).astype(np.float32)) for _ in range(20_000))
    drawn = np.array([counts[token] / 20_000 for token in range(4)])
    # Five standard deviations of a share of 20,000 draws is at most 0.018.
    np.testing.assert_allclose(drawn, probabilities, atol=0.018)


def test_a_low_temperature_sharpens_and_a_high_one_flattens():
    logits = random_logits(2, n=10)
    peaks = [candidates(logits, [], SamplingParams(**OFF | {"temp": t}))[1][0] for t in (0.2, 1.0, 5.0)]
    assert peaks[0] > peaks[1] > peaks[2]


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("temp", -0.1, "--temp out of range (got -0.1, expected 0 (greedy) or more)"),
        ("top_k", -1, "--top-k out of range (got -1, expected 0 (off) or more)"),
        ("top_p", 0.0, "--top-p out of range (got 0.0, expected above 0, at most 1 (off))"),
        ("min_p", 1.5, "--min-p out of range (got 1.5, expected 0 (off) to 1)"),
        ("repeat_penalty", 0.0, "--repeat-penalty out of range (got 0.0, expected above 0; 1 is off)"),
        ("repeat_last_n", -2, "--repeat-last-n out of range (got -2, expected -1 (all) or more)"),
        ("seed", -2, "--seed out of range (got -2, expected -1 (a new one) or more)"),
        ("temp", float("nan"), "--temp out of range (got nan, expected 0 (greedy) or more)"),
    ],
)
def test_values_out_of_range(name, value, message):
    with pytest.raises(InputError) as error:
        SamplingParams(**{name: value})
    assert str(error.value) == message


def llama_cpp_candidates(logits, history, params):
    """What llama.cpp's sampler chain leaves of `logits`: a dict of id to probability."""
    import llama_cpp as lib

    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    penalties = lib.llama_sampler_init_penalties(
        len(logits), params.repeat_last_n, params.repeat_penalty, 0.0, 0.0
    )
    for token in history:
        lib.llama_sampler_accept(penalties, token)
    for sampler in (
        penalties,
        lib.llama_sampler_init_top_k(params.top_k),
        lib.llama_sampler_init_top_p(params.top_p, 1),
        lib.llama_sampler_init_min_p(params.min_p, 1),
        lib.llama_sampler_init_temp(params.temp),
        lib.llama_sampler_init_dist(1),
    ):
        lib.llama_sampler_chain_add(chain, sampler)
    data = (lib.llama_token_data * len(logits))()
    for token, logit in enumerate(logits):
        data[token] = lib.llama_token_data(token, float(logit), 0.0)
    array = lib.llama_token_data_array(data, len(logits), -1, False)
    lib.llama_sampler_apply(chain, ctypes.byref(array))
    left = {array.data[i].id: array.data[i].p for i in range(array.size)}
    lib.llama_sampler_free(chain)
    return left


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temp": 1.7, "min_p": 0.0},
        {"top_k": 0, "min_p": 0.0, "top_p": 0.7},
        {"top_p": 1.0, "min_p": 0.02, "temp": 0.3},
        {"repeat_penalty": 1.3, "repeat_last_n": 5},
    ],
)
def test_same_candidates_as_llama_cpp(seed, changes):
    logits, params = random_logits(seed), SamplingParams(**changes)
    likeliest = np.argsort(-logits)
    history = [int(likeliest[i]) for i in (1, 0, 2, 0, 3, 400)]
    ids, probabilities = candidates(logits, history, params)
    wanted = llama_cpp_candidates(logits, history, params)
    assert set(ids.tolist()) == set(wanted)
    np.testing.assert_allclose(probabilities, [wanted[int(i)] for i in ids], rtol=1e-4)
