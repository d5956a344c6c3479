"""The table of firing rules, and that what is written of a rule is what is read."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotcold.convert.gguf.write import planned, write_gguf
from hotcold.errors import FormatError, HotcoldError, ShapeError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model.firing import NAMES, RULES, FiringRule, Score, Value, threshold_tensor

D_FF = 3
numbers = st.floats(0, 2.0**100, width=32)
THRESHOLDS = st.lists(numbers | st.tuples(*[numbers] * D_FF), min_size=1, max_size=4).map(tuple)


@st.composite
def rules(draw):
    name = draw(st.sampled_from(list(RULES)))
    thresholds = draw(THRESHOLDS)
    return FiringRule(name, thresholds if RULES[name].letter else (0.0,) * len(thresholds))


@given(rules())
def test_a_config_reads_as_it_was_written(rule):
    config = json.loads(json.dumps(rule.as_config("activation")))
    assert FiringRule.from_config(config, config["activation"], len(rule.thresholds), D_FF) == rule
    assert ("activation_thresholds" in config) == (
        bool(rule.rule.letter) and (rule.per_neuron or len(set(rule.thresholds)) > 1)
    )


@settings(max_examples=60, deadline=None)
@given(rules())
def test_a_gguf_file_reads_as_it_was_written(tmp_path_factory, rule):
    path = tmp_path_factory.mktemp("rule") / "m.gguf"
    plans = [
        planned(name, values.shape, "F32", lambda values=values: values)
        for name, values in rule.tensors(D_FF)
    ]
    write_gguf(path, {"general.architecture": "llama", **rule.metadata()}, plans)
    read = FiringRule.from_gguf(GGUFFile(path), "silu", len(rule.thresholds), D_FF)
    for layer in range(len(rule.thresholds)):
        own, again = rule.kernel_thresholds(layer), read.kernel_thresholds(layer)
        np.testing.assert_array_equal(*np.broadcast_arrays(own, again))
    assert read.name == rule.name and read.per_neuron == rule.per_neuron


def test_the_names_of_before_mean_what_they_did():
    def read(name, **config):
        return FiringRule.from_config(config, name, 2)

    assert read("fatrelu_0.01") == FiringRule("fatrelu", (0.01, 0.01))
    assert read("fatrelu", hidden_act_param=0.01) == FiringRule("fatrelu", (0.01, 0.01))
    assert read("fatrelu", activation_thresholds=[0.0, 0.5]) == FiringRule("fatrelu", (0.0, 0.5))
    assert read("fatrelu") == FiringRule("fatrelu", (0.0, 0.0))
    assert read("swish") == FiringRule("silu", (0.0, 0.0))


def test_what_kernels_compare_with():
    tiny = np.finfo(np.float32).tiny
    assert FiringRule("relu", (0.0,)).kernel_thresholds(0).tolist() == [tiny]
    assert FiringRule("fatrelu", ((0.0, 0.5),)).kernel_thresholds(0).tolist() == [tiny, 0.5]
    assert FiringRule("thresholded_silu", (0.0,)).kernel_thresholds(0).tolist() == [0]
    assert FiringRule("gate_thresholded_gelu", (-1.0,)).kernel_thresholds(0).tolist() == [-1]


@pytest.mark.parametrize(
    ("name", "config", "error", "message"),
    [
        ("mish", {}, UnsupportedError, r"unknown activation \(got mish, expected relu \| relu2"),
        ("relu_0.1", {}, UnsupportedError, "got relu_0.1"),
        (
            "thresholded_silu",
            {},
            FormatError,
            r"got None, expected one number >= 0, or 2 of",
        ),
        ("fatrelu", {"activation_thresholds": [0.1]}, FormatError, "or 2 of them"),
        ("fatrelu", {"activation_thresholds": [[0.1, 0.2], 0.1]}, FormatError, "or lists of d_ff"),
        ("fatrelu", {"activation_thresholds": [[[0.1]] * D_FF, 0.1]}, FormatError, "bad thresholds"),
        ("fatrelu", {"activation_thresholds": [math.nan, 0.1]}, FormatError, "bad thresholds"),
        ("fatrelu", {"hidden_act_param": -0.1}, FormatError, "bad thresholds"),
        ("fatrelu_1e99", {}, FormatError, "bad thresholds"),
    ],
)
def test_what_a_config_must_not_say(name, config, error, message):
    with pytest.raises(error, match=message):
        FiringRule.from_config(config, name, 2, D_FF)


@given(st.text(max_size=20) | st.sampled_from(NAMES), st.recursive(st.none() | st.floats(), st.lists))
def test_any_config_is_read_or_refused_by_name(name, value):
    try:
        rule = FiringRule.from_config({"activation_thresholds": value}, name, 2, D_FF)
    except HotcoldError:
        return
    assert len(rule.thresholds) == 2


@pytest.mark.parametrize(
    ("metadata", "tensors", "error", "message"),
    [
        ({"hotcold.activation": "mish"}, {}, UnsupportedError, "unknown activation"),
        ({"hotcold.activation": "thresholded_silu"}, {}, FormatError, "missing metadata key"),
        ({}, {threshold_tensor(0): np.zeros(D_FF)}, FormatError, "blk.1.ffn_act.thresholds"),
        ({}, {threshold_tensor(i): np.zeros(D_FF + 1) for i in (0, 1)}, ShapeError, "does not fit the model"),
        ({"hotcold.activation_thresholds": np.full(2, np.nan, np.float32)}, {}, FormatError, "not a number"),
        ({"hotcold.activation_thresholds": np.zeros(3, np.float32)}, {}, FormatError, "one value per layer"),
    ],
)
def test_what_a_file_must_not_say(tmp_path, metadata, tensors, error, message):
    metadata = {"general.architecture": "llama", "hotcold.activation": "fatrelu", **metadata}
    plans = [planned(name, a.shape, "F32", lambda a=a: a.astype(np.float32)) for name, a in tensors.items()]
    write_gguf(tmp_path / "m.gguf", metadata, plans)
    with pytest.raises(error, match=message):
        FiringRule.from_gguf(GGUFFile(tmp_path / "m.gguf"), "silu", 2, D_FF)


def test_the_kernels_number_them_as_the_table_does():
    """csrc/firing.h and triton/tiles.py count in this order."""
    assert [value.name for value in Value] == ["GATE", "SQUARE", "SHIFTED", "SILU", "GELU"]
    assert [score.name for score in Score] == ["ALWAYS", "GATE", "MAGNITUDE", "GATE_AND_UP"]
