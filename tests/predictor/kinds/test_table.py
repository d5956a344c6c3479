"""A kind is a module and a row: one that only these tests know goes all the way, from traces to engines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_kind
from hypothesis import given
from hypothesis import strategies as st

from hotcold.cli import main
from hotcold.convert.bundle.verify import verify_bundle
from hotcold.errors import FormatError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle
from hotcold.predictor.kinds.table import KINDS, LOWRANK_MLP, Kind, Weights, kind_of_file
from hotcold.predictor.traces.reader import Traces
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.reference import ReferenceEngine


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kind]:
    """The third kind, while a test lasts."""
    monkeypatch.setitem(KINDS, "toy", toy_kind.TOY)
    yield toy_kind.TOY


def test_a_new_kind_goes_from_traces_to_the_engines(
    toy: Kind, traces: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictors, bundle = tmp_path / "predictors", tmp_path / "bundle"
    train = ["train-predictors", "--kind", "toy", "--traces", str(traces), "--out", str(predictors)]
    assert main([*train, "--rank", "32", "--seed", "3", "-t", "1"]) == 0
    made = PredictorBundle.load(predictors)
    assert made.kind is toy and made.training["seed"] == 3 and "epochs" not in made.training
    assert "kind: `toy`" in (predictors / "README.md").read_text()

    run = Traces(traces)
    x, active = run.layer(1)
    test = run.part == 2
    layer, labels = made.layers[1], np.unpackbits(active[test], axis=1, count=44, bitorder="little")
    hidden = np.maximum(x[test].astype(np.float64) @ layer.fc1.T, 0)
    scores = hidden @ layer.fc2.T + layer.bias
    np.testing.assert_allclose(layer.logits(x[test]), scores, rtol=1e-3, atol=1e-3)
    recall = (scores >= layer.threshold)[labels == 1].mean()
    assert layer.metrics.recall == pytest.approx(recall, abs=0.002)

    export = ["export", "--model", str(model), "--predictors", str(predictors), "--quant", "f32"]
    assert main([*export, "--predictor-quant", "f32", "--out", str(bundle)]) == 0
    assert "PowerInfer itself knows no toy predictors" in capsys.readouterr().err
    assert verify_bundle(bundle) == []
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["predictor_kind"] == "toy"
    engines = [kind.load(bundle, "predicted", 1, 64) for kind in (Engine, ReferenceEngine)]
    engines[1].cache_dtype = torch.float16
    logits = [engine.prefill([3, 9, 4, 7, 70], all_logits=True) for engine in engines]
    np.testing.assert_allclose(*logits, atol=1e-3)
    predicted = [engine.stats().predicted_sparsity for engine in engines]
    assert predicted[0] == predicted[1] > 0


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 7), st.integers(0, 99))
def test_scores_are_the_formula(rank: int, d_model: int, d_ff: int, bits: int, seed: int) -> None:
    kind = Kind("any", "", relu=bool(bits & 1), bias=bool(bits & 2), normed=bool(bits & 4))
    rng, shapes = np.random.default_rng(seed), kind.shapes(rank, d_model, d_ff)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes.values()]
    x = rng.standard_normal((3, d_model)).astype(np.float16)
    expected = []
    for token in x.astype(np.float64):
        hidden = [sum(w * v for w, v in zip(row, token, strict=True)) for row in arrays[0]]
        hidden = [max(value, 0) for value in hidden] if kind.relu else hidden
        sums = [sum(w * v for w, v in zip(row, hidden, strict=True)) for row in arrays[1]]
        expected.append(np.add(sums, arrays[2]) if kind.bias else sums)
    np.testing.assert_allclose(kind.scores(Weights(*arrays), x), expected, rtol=1e-4, atol=1e-4)
    assert len(shapes) == (3 if kind.bias else 2) and ("+ bias" in kind.formula) == kind.bias


def test_a_kind_that_is_not_known(tmp_path: Path) -> None:
    layer = LayerPredictor(
        np.ones((2, 4), "f4"), np.ones((6, 2), "f4"), 0.0, kind=toy_kind.TOY, bias=np.ones(6, "f4")
    )
    PredictorBundle("a" * 64, [layer]).save(tmp_path / "p")
    with pytest.raises(UnsupportedError, match=r"unknown kind of predictor \(got toy, expected lowrank-mlp"):
        PredictorBundle.load(tmp_path / "p")
    (tmp_path / "p/config.json").write_text(
        (tmp_path / "p/config.json").read_text().replace('"toy"', '["toy"]')
    )
    with pytest.raises(FormatError, match="kind: wrong or missing"):
        PredictorBundle.load(tmp_path / "p")


def test_a_file_that_names_no_kind_is_powerinfers(traces: Path, model: Path, tmp_path: Path) -> None:
    """And what hotcold writes for PowerInfer's kind is, key for key, what versions before wrote."""
    predictors, bundle = tmp_path / "predictors", tmp_path / "bundle"
    train = ["train-predictors", "--traces", str(traces), "--out", str(predictors), "--epochs", "1"]
    assert main([*train, "-t", "1"]) == 0
    assert main(["export", "--model", str(model), "--predictors", str(predictors), "--out", str(bundle)]) == 0
    file = GGUFFile(bundle / f"{model.name}.powerinfer.gguf")
    assert not [key for key in file.metadata if "kind" in key]
    assert kind_of_file(file) is KINDS[LOWRANK_MLP] and "powerinfer.sparse_threshold" in file.metadata
    config = json.loads((predictors / "config.json").read_text())
    assert (config["version"], config["kind"]) == (2, LOWRANK_MLP)
