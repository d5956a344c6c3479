"""Metrics and thresholds against definitions counted by hand and by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import precision_score, recall_score

from hotcold.errors import InputError
from hotcold.predictor.training.metrics import LayerMetrics, mean_metrics, measure, table
from hotcold.predictor.training.thresholds import choose_threshold, threshold_for_recall

SHAPE = st.tuples(st.integers(1, 6), st.integers(1, 6))


@st.composite
def logits_and_active(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SHAPE)
    values = st.one_of(st.floats(-9, 9, width=32), st.sampled_from([0.0, 1.0]))  # ties matter
    return draw(hnp.arrays(np.float32, shape, elements=values)), draw(hnp.arrays(bool, shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_threshold_comes_from_logits_that_are_not_finite(value):
    logits = np.float32([[1, 2], [3, value]])
    with pytest.raises(InputError, match="logits that are not finite"):
        threshold_for_recall(lambda: [(logits, np.ones((2, 2), bool))], 0.9)


def test_by_hand() -> None:
    active = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool)
    logits = np.array([[2, -1, 1, -2], [0, -3, 0, -1]], np.float32)
    metrics = measure([(logits, active)], 0.0)  # predicted: 2, 1, 0 and 0; the -1 is missed
    assert metrics == LayerMetrics(
        recall=2 / 3, precision=2 / 4, predicted_sparsity=4 / 8, true_sparsity=5 / 8
    )


def test_recall_is_micro_averaged_over_tokens() -> None:
    active = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    logits = np.array([[1, 1, 1, 1], [-1, -1, -1, -1]], np.float32)
    assert measure([(logits, active)], 0.0).recall == 4 / 5  # the mean over tokens would be 1/2


@given(logits_and_active(), st.floats(-9, 9, width=32))
def test_agrees_with_scikit_learn(pair: tuple[np.ndarray, np.ndarray], threshold: float) -> None:
    logits, active = pair
    predicted = logits >= np.float32(threshold)
    metrics = measure([(logits, active)], threshold)
    one = {"zero_division": 1.0}
    assert metrics.recall == pytest.approx(recall_score(active.ravel(), predicted.ravel(), **one))
    assert metrics.precision == pytest.approx(precision_score(active.ravel(), predicted.ravel(), **one))
    assert metrics.predicted_sparsity == pytest.approx(1 - predicted.mean())


@given(logits_and_active())
def test_minus_infinity_predicts_all_and_infinity_nothing(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert measure([pair], -np.inf).recall == 1 and measure([pair], -np.inf).predicted_sparsity == 0
    assert measure([pair], np.inf).predicted_sparsity == 1


@given(logits_and_active(), st.floats(0.01, 1))
def test_threshold_is_the_greatest_that_reaches_the_target(
    pair: tuple[np.ndarray, np.ndarray], target: float
) -> None:
    logits, active = pair
    threshold = threshold_for_recall(lambda: [(logits, active)], target)
    assert measure([(logits, active)], threshold).recall >= target - 1e-9
    if active.any():
        above = np.nextafter(np.float32(threshold), np.float32(np.inf))
        assert measure([(logits, active)], float(above)).recall < target + 1e-9


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 40), st.just(3)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.data(),
    st.floats(0.01, 1),
)
def test_chunks_give_what_all_tokens_at_once_give(
    logits: np.ndarray, data: st.DataObject, target: float
) -> None:
    """Against sorting, for any finite float32 and any cut."""
    active = data.draw(hnp.arrays(bool, logits.shape))
    starts = data.draw(hnp.arrays(bool, len(logits)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(logits)), max_size=4)))
    rows = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, len(logits)], strict=True)]

    def direct(logits: np.ndarray, active: np.ndarray, target: float) -> float:
        firing = np.sort(logits[active])
        if not firing.size:
            return float(np.nextafter(logits.max(), np.float32(np.inf)))
        return float(firing[min(int((1 - target) * firing.size + 1e-9), firing.size - 1)])

    expected = direct(logits, active, target)
    if starts.any():
        expected = min(expected, direct(logits[starts], active[starts], max(target, 0.999)))
    found = choose_threshold(lambda: ((logits[r], active[r]) for r in rows), starts, target)
    assert found == expected
    whole = measure([(logits, active)], found)
    assert measure(((logits[r], active[r]) for r in rows), found) == whole


@given(logits_and_active(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_higher_target_is_never_sparser(
    pair: tuple[np.ndarray, np.ndarray], one: float, other: float
) -> None:
    low, high = (threshold_for_recall(lambda: [pair], target) for target in sorted((one, other)))
    assert high <= low


@given(logits_and_active(), st.data(), st.floats(0.01, 1))
def test_starts_are_served_nearly_in_full(
    pair: tuple[np.ndarray, np.ndarray], data: st.DataObject, target: float
) -> None:
    logits, active = pair
    starts = data.draw(hnp.arrays(bool, len(logits)))
    threshold = choose_threshold(lambda: [(logits, active)], starts, target)
    assert measure([(logits, active)], threshold).recall >= target - 1e-9
    if starts.any():
        assert measure([(logits[starts], active[starts])], threshold).recall >= 0.999
    else:
        assert threshold == threshold_for_recall(lambda: [(logits, active)], target)


def test_where_nothing_fires_nothing_is_predicted() -> None:
    logits, active = np.array([[0.5, -1.0]], np.float32), np.zeros((1, 2), bool)
    metrics = measure([(logits, active)], threshold_for_recall(lambda: [(logits, active)], 0.9))
    assert metrics == LayerMetrics(recall=1, precision=1, predicted_sparsity=1, true_sparsity=1)


@pytest.mark.parametrize("target", [0.0, -0.1, 1.01, float("nan")])
def test_targets_out_of_range_are_refused(target: float) -> None:
    with pytest.raises(InputError, match="target recall is out of range"):
        threshold_for_recall(lambda: [(np.zeros((1, 1), np.float32), np.ones((1, 1), bool))], target)


def test_means_weigh_layers_equally() -> None:
    layers = [LayerMetrics(1, 0.5, 0.2, 0.4), LayerMetrics(0.5, 0.7, 0.4, 0.8)]
    assert mean_metrics(layers).to_json() == pytest.approx(
        {"recall": 0.75, "precision": 0.6, "predicted_sparsity": 0.3, "true_sparsity": 0.6}
    )
    rows = table([64, 32], [0.5, -0.25], layers).splitlines()
    assert rows[2] == "| 0 | 64 | 0.500 | 1.0000 | 0.5000 | 0.2000 | 0.4000 |"
    assert rows[4] == "| mean | 48 |  | 0.7500 | 0.6000 | 0.3000 | 0.6000 |"
