"""Planted patterns: frequencies, sparsity and recall come out of the weights, the same each time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotcold.errors import InputError, UnsupportedError
from hotcold.eval.synthetic import planted
from hotcold.eval.synthetic.planted import PlantedModel, firing_frequencies, pseudo_text
from hotcold.eval.synthetic.shapes import SHAPES, Synthetic, planted_predictor, write_synthetic
from hotcold.files.gguf import GGUFFile
from hotcold.model.weights import check_weights
from hotcold.runtime.reference import ReferenceEngine

SIZE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2000,
}


@pytest.fixture
def shape(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", {**SHAPES["llama-2-7b"], **SIZE})
    return "tiny"


def make_model(noise=0.36, sparsity=0.85):
    config = {**SHAPES["llama-2-7b"], **SIZE}
    return PlantedModel(config, sparsity=sparsity, rank=32, noise=noise, stored=lambda weight: weight)


@given(d_ff=st.integers(64, 20000), mean=st.floats(0.005, 0.9))
def test_frequencies_follow_a_power_law_with_the_given_mean(d_ff, mean):
    frequencies = firing_frequencies(d_ff, mean)
    assert frequencies.mean() == pytest.approx(mean, rel=1e-3)
    assert (np.diff(frequencies) <= 0).all()
    assert frequencies.max() <= 0.98
    below = frequencies[frequencies < 0.98]
    constant = below * (np.arange(d_ff)[d_ff - len(below) :] + 1)
    assert constant == pytest.approx(constant[:1].repeat(len(below)))


def test_a_few_neurons_fire_always_and_most_rarely():
    activities = list(make_model(sparsity=0.89).calibrate())
    for activity in activities:
        frequency = activity.fired.mean(axis=0)
        assert (frequency > 0.9).mean() < 0.05
        assert (frequency < 0.11).mean() > 0.6
        assert np.sort(frequency)[-len(frequency) // 4 :].sum() > 0.6 * frequency.sum()


@pytest.mark.parametrize("sparsity", [0.5, 0.67, 0.89, 0.97])
def test_sparsity_is_as_asked_in_every_layer(sparsity):
    for activity in make_model(sparsity=sparsity).calibrate():
        assert 1 - activity.fired.mean() == pytest.approx(sparsity, abs=0.02)


def test_the_predictor_is_the_gate_where_there_is_no_noise():
    for activity in make_model(noise=0.0).calibrate():
        fc1, fc2 = planted_predictor(activity)
        logits = np.maximum(activity.inputs @ fc1.T, 0) @ fc2.T
        assert ((logits > 0) == activity.fired).mean() > 0.999


def test_noise_makes_prediction_harder():
    shares = []
    for noise in (0.2, 0.8):
        activity = next(make_model(noise=noise).calibrate())
        fc1, fc2 = planted_predictor(activity)
        logits = np.maximum(activity.inputs @ fc1.T, 0) @ fc2.T
        shares.append(((logits > 0) == activity.fired).mean())
    assert shares[0] > shares[1] + 0.03


def test_tensors_are_those_that_calibration_saw():
    """The gates that `load` makes again fire on the calibration tokens just as they did then."""
    model = make_model()
    for layer, activity in enumerate(model.calibrate()):
        h = planted._rms_norm(activity.inputs)
        gate = model.load(f"model.layers.{layer}.mlp.gate_proj.weight")
        assert ((h @ gate.T > 0) == activity.fired).mean() > 0.9999


def test_names_and_shapes_are_those_of_a_whole_model():
    model = make_model()
    for _ in model.calibrate():
        pass
    check_weights(model, model.spec)
    for name in model.names():
        assert model.load(name).shape == model.shape(name)


def test_rows_of_random_matrices_differ():
    model = make_model()
    for _ in model.calibrate():
        pass
    weight = model.load("model.layers.0.mlp.up_proj.weight")
    assert len(np.unique(weight, axis=0)) == len(weight)
    assert not np.array_equal(weight, model.load("model.layers.1.mlp.up_proj.weight"))


@pytest.mark.parametrize("quant", ["q4_0", "f16"])
def test_a_bundle_has_the_sparsity_and_recall_that_it_says(shape, quant, tmp_path):
    path = write_synthetic(Synthetic(shape, sparsity=0.8, quant=quant, predictor_rank=128), tmp_path)
    engine = ReferenceEngine.load(path, "predicted", n_threads=1)
    engine.audit = True
    engine.prefill(pseudo_text(2000, 200, seed=99))
    stats = engine.stats()
    fired = stats.fired + stats.missed
    assert 1 - fired.mean() / (stats.tokens * stats.d_ff) == pytest.approx(0.8, abs=0.03)
    assert stats.recall > 0.92
    assert stats.predicted_sparsity > 0.55


def test_a_bundle_is_made_once_and_the_same_every_time(shape, tmp_path):
    synthetic = Synthetic(shape, n_layers=1)
    first = write_synthetic(synthetic, tmp_path / "a")
    kept = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in first.glob("*.gguf")}
    assert write_synthetic(synthetic, tmp_path / "a") == first
    assert {file.name: file.stat().st_mtime_ns for file in first.glob("*.gguf")} == {
        name: time for name, (time, _) in kept.items()
    }
    second = write_synthetic(synthetic, tmp_path / "b")
    assert {name: (second / name).read_bytes() for name in kept} == {
        name: data for name, (_, data) in kept.items()
    }


def test_bundles_of_other_figures_have_other_names(shape):
    variants = [Synthetic(shape), Synthetic(shape, sparsity=0.5), Synthetic(shape, seed=1)]
    assert len({(variant.name, variant.fingerprint) for variant in variants}) == 3
    assert all(variant.name.startswith("synthetic-") for variant in variants)


def test_files_say_that_they_are_synthetic(shape, tmp_path):
    path = write_synthetic(Synthetic(shape, n_layers=1), tmp_path)
    for file in path.glob("*.gguf"):
        assert GGUFFile(file).metadata["general.name"].startswith("synthetic-")


def test_shapes_are_those_of_the_models():
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = {name: tuple(shape[key] for key in keys) for name, shape in SHAPES.items()}
    assert sizes == {
        "llama-2-7b": (4096, 11008, 32),
        "llama-2-13b": (5120, 13824, 40),
        "mistral-7b": (4096, 14336, 32),
        "smollm2-135m": (576, 1536, 30),
    }


@pytest.mark.parametrize(
    ("figures", "error", "message"),
    [
        ({"shape": "gpt-5"}, InputError, "unknown synthetic shape"),
        ({"sparsity": 1.0}, InputError, "out of range"),
        ({"n_layers": 0}, InputError, "at least 1"),
        ({"predictor_rank": 96}, InputError, "multiple of 64"),
        ({"noise": -1.0}, InputError, "--noise out of range"),
        ({"quant": "q1"}, UnsupportedError, "unknown quantization"),
    ],
)
def test_impossible_figures_are_refused(figures, error, message):
    with pytest.raises(error, match=message):
        Synthetic(**{"shape": "llama-2-7b"} | figures)


@given(n=st.integers(1, 500), seed=st.integers(0, 1000))
def test_pseudo_text_is_the_same_for_a_seed_and_within_the_vocabulary(n, seed):
    ids = pseudo_text(300, n, seed)
    np.testing.assert_array_equal(ids, pseudo_text(300, n, seed))
    assert len(ids) == n and ids.min() >= 0 and ids.max() < 300
