"""The kind `svd` against its formula in float64, against a plain SVD, and through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hotcold.cli import main
from hotcold.model import checkpoint
from hotcold.model.gates import Gates
from hotcold.predictor.bundle import PredictorBundle
from hotcold.predictor.kinds import svd
from hotcold.predictor.kinds.table import KINDS
from hotcold.predictor.traces.reader import Traces
from hotcold.predictor.training import train_bundle as train_bundle_module
from hotcold.predictor.training.train import LayerData, TrainOptions, train_layer
from hotcold.predictor.training.train_bundle import train_bundle

N_LAYERS, D_FF = 2, 44


@pytest.fixture(scope="module")
def layers(traces: Path, model: Path) -> list[LayerData]:
    run, gates = Traces(traces), Gates(str(model))
    parts = [(*run.layer(i), run.part, D_FF, None, gates.layer(i)) for i in range(N_LAYERS)]
    return [LayerData(*part) for part in parts]


def normed_and_gates(model: Path, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The FFN's input and its gates, by transformers' own modules, float64."""
    modules = checkpoint.ffn_layers(checkpoint.load_model(str(model)))[layer]
    with torch.no_grad():
        h = modules.norm(torch.from_numpy(x).float())
        return h.double().numpy(), modules.gate(h).double().numpy()


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_the_scores_are_the_whitened_svd(layers: list[LayerData], model: Path, layer: int) -> None:
    """S here is the symmetric root and its inverse is formed; the product does not depend on that choice."""
    data, rank = layers[layer], 8
    weights = svd.train(data, data.firing_frequency(), _options(rank), lambda loss: None)
    h, _ = normed_and_gates(model, layer, data.x)
    w = checkpoint.ffn_layers(checkpoint.load_model(str(model)))[layer].gate.weight.detach().double().numpy()
    train = h[data.rows("train")]
    moment = sum(np.outer(token, token) for token in train) / len(train)
    moment += 0.01 * np.mean(np.diag(moment)) * np.eye(len(moment))
    values, vectors = np.linalg.eigh(moment)
    root = vectors @ np.diag(values**0.5) @ vectors.T
    u, s, v = np.linalg.svd(w @ root)
    cut = u[:, :rank] @ np.diag(s[:rank]) @ v[:rank] @ np.linalg.inv(root)
    scores = KINDS["svd"].scores(weights, h) - weights.bias
    np.testing.assert_allclose(scores, h @ cut.T, atol=1e-4 * np.abs(h @ cut.T).max())
    assert weights.fc1.shape == (rank, 32) and weights.fc2.shape == (D_FF, rank)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_the_bias_is_k_deviations_less_the_firing_point(
    layers: list[LayerData], model: Path, layer: int
) -> None:
    """A ReLU fires from 0 on, so that the bias is one multiple of what the cut leaves of each gate."""
    data = layers[layer]
    weights = svd.train(data, data.firing_frequency(), _options(8), lambda loss: None)
    rows = data.rows("train")
    h, gates = normed_and_gates(model, layer, data.x[rows])
    labels = data.labels(rows)
    assert ((labels == 1) == (gates > 0)).mean() > 0.999  # the traces' inputs are rounded to float16
    error = gates - (KINDS["svd"].scores(weights, h) - weights.bias)
    ratio = weights.bias / np.sqrt((error**2).mean(axis=0))
    assert np.median(ratio) > 0 and np.ptp(ratio) < 0.5 * np.median(ratio)
    found = (KINDS["svd"].scores(weights, h) >= 0)[labels == 1].mean()
    assert found == pytest.approx(0.97, abs=0.005)  # on the tokens that the bias is from, at threshold 0


def naive(data: LayerData, rank: int) -> np.ndarray:
    """Scores of all tokens by the plain SVD of the gates."""
    u, s, v = np.linalg.svd(data.gates.weight.astype(np.float64))
    h = data.inputs(np.arange(len(data.x)), normed=True)
    return h @ v[:rank].T @ np.diag(s[:rank]) @ u[:, :rank].T


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_it_recalls_more_than_a_plain_svd(layers: list[LayerData], layer: int) -> None:
    """Both predict the same share of the neurons of the tokens that nothing was chosen by."""
    data, rank = layers[layer], 8
    weights = svd.train(data, data.firing_frequency(), _options(rank), lambda loss: None)
    test = data.rows("test")
    labels, plain = data.labels(test) == 1, naive(data, rank)[test]
    scores = KINDS["svd"].scores(weights, data.inputs(test, normed=True))
    for share in (0.4, 0.6, 0.8):
        ours, theirs = ((s >= np.quantile(s, 1 - share))[labels].mean() for s in (scores, plain))
        assert ours > theirs + 0.01


def test_the_whole_rank_predicts_nearly_perfectly(layers: list[LayerData]) -> None:
    options = [TrainOptions(rank, kind="svd") for rank in (32, 64)]
    small, whole = (train_layer(layers[1], option, lambda loss: None) for option in options)
    assert small.rank == whole.rank == 32  # d_model, which is all there is
    assert whole.metrics.recall > 0.96 and whole.metrics.precision > 0.96


def test_neurons_that_never_fire(layers: list[LayerData]) -> None:
    one = layers[0]
    silent = np.zeros_like(one.active)
    data = LayerData(one.x, silent, one.part, D_FF, None, one.gates)
    layer = train_layer(data, TrainOptions(32, kind="svd"), lambda loss: None)
    assert np.isfinite(layer.bias).all() and layer.metrics.predicted_sparsity > 0.99


def _options(rank: int, recall: float = 0.97) -> TrainOptions:
    """A rank below a block, as the model is tiny."""
    options = TrainOptions(32, recall, kind="svd")
    object.__setattr__(options, "rank", rank)
    return options


def _command(traces: Path, model: Path, out: Path, *more: str) -> list[str]:
    made = {"--traces": traces, "--model": model, "--out": out, "--kind": "svd", "--rank": 32, "-t": 1}
    return ["train-predictors", *(str(item) for pair in made.items() for item in pair), *more]


def test_the_command(
    traces: Path, model: Path, tmp_path: Path, snapshot: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_command(traces, model, tmp_path / "p", "--json", "--target-recall", "0.9")) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["kind"], report["version"], report["ranks"]) == ("svd", 2, [32, 32])
    assert report["mean"]["recall"] > 0.8
    bundle = PredictorBundle.load(tmp_path / "p")
    assert (
        bundle.kind is KINDS["svd"] and bundle.training["damping"] == 0.01 and "seed" not in bundle.training
    )
    assert all(layer.bias.shape == (D_FF,) for layer in bundle.layers)
    assert "(fc2 · fc1 · x + bias)[j]" in (tmp_path / "p/README.md").read_text()
    assert main(_command(traces, model, tmp_path / "q", "--target-recall", "0.9")) == 0
    assert snapshot(tmp_path / "p") == snapshot(tmp_path / "q")


def test_finished_layers_are_kept(
    traces: Path, model: Path, tmp_path: Path, snapshot: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, gates, trained = TrainOptions(rank=32, kind="svd"), Gates(str(model)), []

    def breaking_off(*args: object) -> object:
        trained.append(args)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train_layer(*args)

    train_bundle(Traces(traces), tmp_path / "whole", options, gates=gates)
    monkeypatch.setattr(train_bundle_module, "train_layer", breaking_off)
    with pytest.raises(KeyboardInterrupt):
        train_bundle(Traces(traces), tmp_path / "p", options, gates=gates)
    train_bundle(Traces(traces), tmp_path / "p", options, gates=gates)
    assert len(trained) == 3
    assert snapshot(tmp_path / "p") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": None}, "--model: svd predictors are made of the model's own gates"),
        (
            {"--kind": "nonsense"},
            "--kind: unknown kind of predictor (got nonsense, expected lowrank",
        ),
        ({"--epochs": "3"}, "--epochs: svd predictors have no such option"),
        ({"--lr": "0.1"}, "--lr: svd predictors have no such option"),
    ],
)
def test_what_does_not_go_together(
    traces: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    made = {
        "--traces": traces,
        "--model": model,
        "--out": tmp_path / "p",
        "--kind": "svd",
        "-t": "1",
    } | change
    pairs = [str(item) for pair in made.items() if pair[1] is not None for item in pair]
    assert main(["train-predictors", *pairs]) == 2
    captured = capsys.readouterr().err
    assert message in captured and captured.count("\n") == 1 and not (tmp_path / "p").exists()


def test_the_gates_of_another_model(
    traces: Path, write_model: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_model(tmp_path / "other", seed=1)
    assert main(_command(traces, other, tmp_path / "p")) == 2
    assert "traces of another model" in capsys.readouterr().err
