"""The L1 schedule has the properties of ProSparse's Algorithm 1; the learning rate rises, then falls."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotcold.errors import InputError
from hotcold.sparsify.training.schedule import ProgressiveL1, Stage, TargetSparsity, cosine, wsd

# ProSparse, appendix L, LLaMA2-7B
PROSPARSE_7B = [
    Stage(0, 5000),
    Stage(5e-3, 6000),
    Stage(5e-2, 10000),
    Stage(5e-2, 12000),
    Stage(2e-1, 16000),
    Stage(2e-1, 16500),
]


@st.composite
def stages(draw):
    n = draw(st.integers(1, 6))
    peaks = [0.0, *sorted(draw(st.lists(st.floats(1e-6, 10), min_size=n, max_size=n)))]
    lengths = draw(st.lists(st.integers(1, 50), min_size=n + 1, max_size=n + 1))
    return [Stage(peak, sum(lengths[: i + 1])) for i, peak in enumerate(peaks)]


@given(stages())
def test_each_stage_ends_at_its_peak(table):
    l1 = ProgressiveL1(table)
    for stage in table:
        assert l1(stage.end) == pytest.approx(stage.peak, rel=1e-12)


@given(stages())
def test_it_never_falls_and_stays_after_the_last_stage(table):
    l1 = ProgressiveL1(table)
    values = [l1(step) for step in range(1, table[-1].end + 10)]
    assert all(a <= b + 1e-12 for a, b in pairwise(values))
    assert values[-1] == table[-1].peak


def test_the_warm_up_is_constant_and_equal_peaks_are_flat():
    l1 = ProgressiveL1(PROSPARSE_7B)
    assert {l1(step) for step in range(1, 5001)} == {0}
    assert {l1(step) for step in range(5001, 6001)} == {5e-3}
    assert {l1(step) for step in range(10001, 12001)} == {5e-2}


def test_ramps_are_flat_at_both_ends_and_halfway_in_the_middle():
    l1 = ProgressiveL1(PROSPARSE_7B)
    steepest = l1(14001) - l1(14000)
    assert l1(14000) == pytest.approx((5e-2 + 2e-1) / 2)
    assert l1(12001) - l1(12000) < steepest / 100
    assert l1(16000) - l1(15999) < steepest / 100
    # Algorithm 1 writes the ramp with a sine; this is the same curve
    u = (13000 - 12000) / 4000
    eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * u) + 1)
    assert l1(13000) == pytest.approx(5e-2 + eta * (2e-1 - 5e-2))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "stage 0"),
        ([Stage(0.1, 10)], "stage 0"),
        ([Stage(0, 10), Stage(0.2, 20), Stage(0.1, 30)], "must not fall"),
        ([Stage(0, 10), Stage(0.1, 10)], "ends .* must rise"),
    ],
)
def test_impossible_schedules_are_refused(table, message):
    with pytest.raises(InputError, match=message):
        ProgressiveL1(table)


def test_learning_rate():
    factors = [cosine(step, 100, 10) for step in range(1, 101)]
    assert factors[0] < factors[4] < factors[9] == max(factors)
    assert factors[-1] == pytest.approx(0.05)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_warm_up_stable_decay():
    factors = [wsd(step, 100, 10, floor=0.1, decay_share=0.2) for step in range(1, 101)]
    assert factors[4] == pytest.approx(0.5)
    assert set(factors[9:80]) == {1.0}
    assert factors[89] == pytest.approx(0.1**0.5)
    assert factors[-1] == pytest.approx(0.1)
    assert [wsd(step, 10, 0, decay_share=0.0) for step in (1, 10)] == [1.0, 1.0]


def test_a_controller_finds_the_factor_that_gives_the_sparsity():
    """A model whose sparsity is a rising function of the factor, as the paper's law says it is."""

    def sparsity(factor):
        return 1 - math.exp(-1.76 * factor**0.3)

    control = TargetSparsity(0.6, start=1e-4, multiplier=1.05, first_step=10)
    for step in range(1, 400):
        factor = control(step)
        assert (factor == 0) == (step <= 10)
        control.observe(step, sparsity(factor))
    assert sparsity(control(400)) == pytest.approx(0.6, abs=0.01)


@given(st.lists(st.floats(0, 1), max_size=50))
def test_a_controller_never_falls_below_its_start(seen):
    control = TargetSparsity(0.5, start=1e-3, multiplier=1.2, first_step=0)
    for step, sparsity in enumerate(seen, start=1):
        control.observe(step, sparsity)
        assert control(step + 1) >= 1e-3
