"""Plans keep their budget and give every neuron one home; the solver is no worse than brute force allows."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotcold.errors import InputError, UnsupportedError
from hotcold.runtime.placement import solver as placement_solver
from hotcold.runtime.placement.devices import Fixed, fill
from hotcold.runtime.placement.plan import Costs, FfnTime, LayerLoad, Problem, place, place_layers
from hotcold.runtime.sizes import parse_bytes

COSTS = Costs(device_bandwidth=1e9, cpu_bandwidth=1e8, handover_s=1e-5, split_s=2e-6)


def problem(frequencies, budget, *, neuron_bytes=100, frame=1000, fixed=500, costs=COSTS, always=0.0):
    layers = [LayerLoad(np.asarray(f, np.float32), neuron_bytes, frame, frame, always) for f in frequencies]
    return Problem(layers, Fixed(fixed), fixed, (budget,), costs)


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n_layers, d_ff = draw(st.integers(1, 5)), draw(st.integers(1, 200))
    frequencies = rng.power(draw(st.floats(0.1, 3)), (n_layers, d_ff)) * draw(
        st.sampled_from([0.0, 0.3, 1.0])
    )
    costs = Costs(
        device_bandwidth=10 ** draw(st.floats(7, 10)),
        cpu_bandwidth=10 ** draw(st.floats(7, 9)),
        handover_s=draw(st.sampled_from([0.0, 1e-6, 1e-3])),
        split_s=draw(st.sampled_from([0.0, 1e-6, 1e-4])),
    )
    most = 500 + n_layers * (1000 + d_ff * 100)
    always = draw(st.sampled_from([0.0, 1 / 3]))
    return problem(frequencies, draw(st.integers(500, most + 1000)), costs=costs, always=always)


@settings(max_examples=60)
@given(problems())
def test_budget_homes_and_least(of):
    plan = place(of)
    assert plan.device_bytes <= of.budgets[0]
    assert len(plan.layers) == len(of.layers)
    for layer, load in zip(plan.layers, of.layers, strict=True):
        both = np.concatenate([layer.hot, layer.cold])
        assert np.array_equal(np.sort(both), np.arange(load.d_ff))
        assert layer.on_device or not len(layer.hot)
        time, n = FfnTime(load, of.costs), len(layer.hot)
        assert n == 0 or n >= time.least
        # The most frequent neurons are the hot ones.
        if 0 < n < load.d_ff:
            assert load.frequency[layer.hot].min() >= load.frequency[layer.cold].max()
    framed = [layer.on_device for layer in plan.layers]
    assert framed == sorted(framed, reverse=True)
    assert plan.seconds >= 0


@settings(max_examples=60, deadline=None)
@given(problems(), st.lists(st.integers(0, 60_000), min_size=1, max_size=3), st.integers(0, 400))
def test_several_devices_keep_their_budgets(of, budgets, head):
    """The embedding is on the first device in use, the head on the last one, and layers in order."""
    fixed = Fixed(300, head, each=100, tied=head // 2)
    of = replace(of, fixed=fixed, budgets=tuple(budgets))
    for plan_of in (place, place_layers):
        if max(budgets) < fixed.on(first=True, last=True):
            with contextlib.suppress(UnsupportedError):  # it may fit two devices where it fits none alone
                plan_of(of)
            continue
        plan = plan_of(of)
        devices = [device for device, _ in plan.spans]
        assert devices == sorted(set(devices))
        assert [i for _, layers in plan.spans for i in layers] == list(range(plan.spans[-1][1].stop))
        for device, budget in enumerate(budgets):
            first, last = device == devices[0], device == devices[-1]
            extra = fixed.on(first=first, last=last) if device in devices else 0
            layers = [layer for layer in plan.layers if layer.on_device and layer.device == device]
            held = extra + sum(1000 + 100 * len(layer.hot) for layer in layers)
            assert plan.fixed[device] == extra and plan.bytes_on(device) == held <= budget
        for layer, load in zip(plan.layers, of.layers, strict=True):
            both = np.concatenate([layer.hot, layer.cold])
            assert np.array_equal(np.sort(both), np.arange(load.d_ff))


def test_a_second_device_is_used_when_the_first_is_full():
    """Twelve layers of 1,000 + 50 * 100 bytes; 500 bytes of head or embedding on each end."""
    frequencies = [np.linspace(0, 1, 50)] * 12
    of = problem(frequencies, 500 + 12 * 6000)

    def on_devices(*budgets: int) -> list[int]:
        plan = place(replace(of, fixed=Fixed(500, 500, tied=500), budgets=budgets))
        return [sum(layer.device == i for layer in plan.layers) for i in range(len(budgets))]

    assert on_devices(500 + 12 * 6000, 10**6) == [12, 0]
    assert on_devices(500 + 12 * 6000 - 1, 10**6) == [0, 12]  # one device is better than two
    assert on_devices(500 + 10 * 6000, 500 + 3 * 6000, 10**3) == [10, 2, 0]
    assert on_devices(100, 500 + 12 * 6000) == [0, 12]


def test_neurons_that_stay_away_do_so_on_all_devices():
    """Frames alone would fit the first device, whose neurons would then all be cold."""
    of = problem([np.linspace(0, 1, 50)] * 12, 0)
    plan = place(replace(of, budgets=(20_000, 20_000)))
    counts = [sum(len(x.hot) for x in plan.layers if x.device == device) for device in range(2)]
    assert [len(layers) for _, layers in plan.spans] == [6, 6] and all(x.on_device for x in plan.layers)
    assert min(counts) > 0.85 * max(counts) > 100


def test_what_is_fixed_may_fit_two_devices_only():
    fill_two = fill([100, 100], Fixed(500, 400, each=10), [700, 700])
    assert fill_two == ([0, 1], [510, 410])
    with pytest.raises(UnsupportedError, match="not enough GPU memory"):
        fill([100], Fixed(500, 400, each=10), [700, 700])


@pytest.mark.parametrize("budget, neurons", [(2_100, 20), (2_000, 20), (1_999, 18), (199, 0)])
def test_a_solution_is_read_as_neurons_within_the_budget(budget, neurons):
    """The last group of 65 neurons has one, not two, and a solver may like it best; it has a tolerance."""
    costs = Costs(device_bandwidth=1e7, cpu_bandwidth=1e7, handover_s=0.0, split_s=0.0)
    of = problem(np.full((1, 65), 0.3), budget, costs=costs)
    programme = placement_solver._Programme([FfnTime(of.layers[0], costs)], budget)
    v = np.zeros(programme.n_variables)
    v[:10] = v[32] = 1.0
    assert programme.counts(v) == [neurons]


@settings(max_examples=25)
@given(problems())
def test_no_worse_than_all_ways_to_cut(of):
    """Small enough to try every number of groups in every layer."""
    layers = of.layers[:2]
    of = Problem(layers, of.fixed, 0, (min(of.budgets[0], 20_000),), of.costs)
    left = of.budgets[0] - of.fixed.first
    n_framed = min(len(layers), left // 1000)
    times = [FfnTime(layer, of.costs) for layer in layers[:n_framed]]
    best = np.inf
    choices = [
        [n for n in sorted({*range(0, t.layer.d_ff, 20), t.layer.d_ff, t.least}) if n == 0 or n >= t.least]
        for t in times
    ]
    for counts in itertools.product(*choices):
        if sum(counts) * 100 <= left - 1000 * n_framed:
            best = min(best, sum(t.total(n) for t, n in zip(times, counts, strict=True)))
    plan = place(of)
    found = sum(t.total(len(layer.hot)) for t, layer in zip(times, plan.layers, strict=False))
    # The solver moves whole groups and stops within a thousandth of the best; the cuts above do neither.
    slack = sum(t.total(0) for t in times) * 0.02 + 1e-12
    assert not times or found <= best * 1.05 + slack


def test_times_of_a_layer():
    """40 neurons of 100 bytes, each active on half of the tokens, a third of their bytes always read."""
    (load,) = problem([np.full(40, 0.5)], 0, always=1 / 3).layers
    time, read = FfnTime(load, COSTS), 100 * (1 / 3 + 2 / 3 * 0.5)
    assert time.device(10) == pytest.approx(10 * read / 1e9 + 2e-6)
    assert time.cpu(10) == pytest.approx(30 * read / 1e8 + 1e-5)
    assert time.hit_rate(10) == pytest.approx(0.25)
    # Nothing is computed apart where there is nothing else.
    assert time.device(40) == pytest.approx(40 * read / 1e9) and time.cpu(40) == 0
    assert time.device(0) == 0 and time.cpu(0) == pytest.approx(40 * read / 1e8 + 1e-5)


def test_everything_fits():
    plan = place(problem([np.linspace(0, 1, 50)] * 3, 1 << 20))
    assert all(len(layer.cold) == 0 and layer.on_device for layer in plan.layers)
    assert plan.device_bytes == 500 + 3 * (1000 + 50 * 100)
    assert all(layer.hit_rate == 1 for layer in plan.layers)


def test_frames_come_first_and_the_last_layers_go_to_the_cpu():
    plan = place(problem([np.ones(50)] * 3, 500 + 2 * 1000 + 999))
    assert [layer.on_device for layer in plan.layers] == [True, True, False]
    assert plan.layers[2].cpu_bytes == 1000 + 50 * 100
    assert plan.device_bytes <= 500 + 2 * 1000 + 999


def test_a_layer_with_rare_neurons_gets_none():
    """What 1e-5 of a token needs does not pay for computing it apart."""
    plan = place(problem([np.full(50, 1e-5), np.ones(50)], 500 + 2000 + 60 * 100))
    assert len(plan.layers[0].hot) == 0 and len(plan.layers[1].hot) == 50


def test_hot_neurons_are_worth_more_than_cold_ones():
    frequency = np.r_[np.full(10, 0.9), np.full(90, 0.01)]
    plan = place(problem([frequency, frequency[::-1]], 500 + 2000 + 40 * 100))
    assert set(range(10)) <= set(plan.layers[0].hot.tolist())
    assert set(range(90, 100)) <= set(plan.layers[1].hot.tolist())
    assert plan.tokens_per_second > place(problem([frequency, frequency[::-1]], 2500)).tokens_per_second


def test_the_greedy_answer_stands_in_for_the_solver(monkeypatch):
    monkeypatch.setattr(placement_solver, "solver_counts", lambda *_: None)
    of = problem([np.linspace(0, 1, 100)] * 4, 500 + 4000 + 150 * 100)
    plan = place(of)
    assert plan.method == "greedy" and plan.device_bytes <= of.budgets[0]
    assert sum(len(layer.hot) for layer in plan.layers) > 100


def test_time_limit_zero_still_gives_a_plan():
    assert place(problem([np.linspace(0, 1, 100)] * 4, 20_000), time_limit=0.0).device_bytes <= 20_000


def test_whole_layers_for_dense_mode():
    plan = place_layers(problem([np.ones(50)] * 3, 500 + 2 * 6000 + 5999))
    assert [len(layer.hot) for layer in plan.layers] == [50, 50, 0]
    assert [layer.on_device for layer in plan.layers] == [True, True, False]


def test_too_little_memory():
    with pytest.raises(
        UnsupportedError, match=r"not enough GPU memory .*expected 0.0 MiB or more.*--backend cpu"
    ):
        place(problem([np.ones(5)], 499))


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("6G", 6 << 30),
        ("1.5k", 1536),
        ("10MiB", 10 << 20),
        ("123B", 123),
        ("8", 8 << 30),
        (" 2 gb ", 2 << 30),
    ],
)
def test_sizes(text, n):
    assert parse_bytes(text) == n


@pytest.mark.parametrize("text", ["", "G", "6X", "-1G", "nan", "inf", "1e999G"])
def test_no_sizes(text):
    with pytest.raises(InputError, match="not a size in bytes"):
        parse_bytes(text)
