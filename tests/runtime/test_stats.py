"""The ratios that are shown to users, on counts small enough to check by hand."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hotcold.runtime.stats import Stats


def stats(fired, predicted, missed, tokens=10, d_ff=100, audit=True):
    return Stats(tokens, d_ff, np.array(fired), np.array(predicted), np.array(missed), audit)


def test_by_hand():
    two_layers = stats(fired=[100, 300], predicted=[200, 600], missed=[0, 100])
    assert two_layers.sparsity == 0.8
    assert two_layers.predicted_sparsity == 0.6
    assert two_layers.recall == (1 + 0.75) / 2


def test_recall_is_unknown_without_audit_and_all_are_before_the_first_token():
    assert math.isnan(stats([1], [1], [0], audit=False).recall)
    nothing = stats([0], [0], [0], tokens=0)
    assert all(math.isnan(value) for value in (nothing.sparsity, nothing.predicted_sparsity, nothing.recall))


def test_a_layer_in_which_nothing_fires_misses_nothing():
    assert stats([0, 50], [0, 80], [0, 50]).recall == 0.75


@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 3), min_size=1, max_size=5))
def test_ratios_are_shares(counts):
    fired, skipped_right, missed = (np.array(column) for column in zip(*counts, strict=True))
    d_ff = int((fired + skipped_right + missed).max()) or 1
    summed = Stats(1, d_ff, fired, fired, missed, audit=True)
    assert 0 <= summed.sparsity <= 1 and 0 <= summed.recall <= 1
