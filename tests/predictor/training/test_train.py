"""Training: the loss is the published one, predictors learn, and data and seed alone decide the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hotcold.cli import main
from hotcold.errors import FormatError, InputError
from hotcold.predictor.bundle import PredictorBundle
from hotcold.predictor.kinds.lowrank_mlp import (
    PredictorNetwork,
    class_weighted_bce,
    class_weighted_bce_gradient,
    negative_weight,
)
from hotcold.predictor.kinds.table import Kind, Weights
from hotcold.predictor.traces.reader import Traces
from hotcold.predictor.training import data as data_module
from hotcold.predictor.training import train as train_module
from hotcold.predictor.training import train_bundle as train_bundle_module
from hotcold.predictor.training.metrics import measure
from hotcold.predictor.training.thresholds import threshold_for_recall
from hotcold.predictor.training.train import LayerData, TrainOptions, default_rank, train_layer
from hotcold.predictor.training.train_bundle import train_bundle
from hotcold.text import PARTS

D_MODEL, D_FF = 48, 80


def _planted(tokens: int = 4000, seed: int = 0, rank: int = 12) -> LayerData:
    """Traces whose neurons fire by a linear rule of low rank, on inputs of very different norms."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(1).normal(size=(rank, D_MODEL))
    mixing = np.random.default_rng(2).normal(size=(D_FF, rank))
    direction = rng.normal(size=(tokens, rank)) @ basis + 0.1 * rng.normal(size=(tokens, D_MODEL))
    gate = direction @ (mixing @ basis).T / D_MODEL
    active = np.packbits(gate > np.std(gate) / 2, axis=1, bitorder="little")
    x = (direction * rng.lognormal(sigma=0.7, size=(tokens, 1))).astype(np.float16)
    return LayerData(x, active, _parts(tokens, 0.8, 0.9), D_FF)


def _parts(tokens: int, calibrate: float, test: float) -> np.ndarray:
    """Parts that begin at these shares of the tokens."""
    at = np.arange(tokens) / tokens
    return ((at >= calibrate).astype(np.uint8) + (at >= test)).astype(np.uint8)


@pytest.fixture(scope="module")
def planted() -> LayerData:
    return _planted()


def _train(data: LayerData, **options: object):
    return train_layer(
        data, TrainOptions(**{"rank": 64, "epochs": 8, "batch": 256, **options}), lambda loss: None
    )


def test_learns_a_planted_rule(planted: LayerData) -> None:
    metrics = _train(planted, target_recall=0.95).metrics
    assert metrics.recall == pytest.approx(0.95, abs=0.02)  # chosen on other tokens
    assert metrics.true_sparsity == pytest.approx(0.69, abs=0.05)
    assert metrics.predicted_sparsity > metrics.true_sparsity - 0.1


def test_more_rank_predicts_better(planted: LayerData) -> None:
    small, large = (_train(planted, rank=rank, epochs=4).metrics for rank in (32, 128))
    assert large.predicted_sparsity > small.predicted_sparsity


def test_the_reported_metrics_are_those_of_the_exported_predictor(planted: LayerData) -> None:
    layer = _train(planted, epochs=2)
    pairs = {}
    for part in ("calibrate", "test"):
        rows = planted.rows(part)
        pairs[part] = layer.logits(planted.x[rows]), planted.labels(rows).astype(bool)
    assert layer.threshold == threshold_for_recall(lambda: [pairs["calibrate"]], 0.97)
    assert layer.metrics == measure([pairs["test"]], layer.threshold)
    assert measure([pairs["test"]], float("-inf")).predicted_sparsity == 0
    assert measure([pairs["calibrate"]], layer.threshold).recall >= 0.97


def test_logits_are_never_held_together(planted: LayerData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of seven tokens give what one chunk of all gives, and no more than seven are asked for."""
    whole, sizes = _train(planted, epochs=1), []

    scores = Kind.scores

    def counting(kind: Kind, weights: Weights, x: np.ndarray) -> np.ndarray:
        sizes.append(len(x))
        return scores(kind, weights, x)

    monkeypatch.setattr(data_module, "_TOKENS", 7)
    monkeypatch.setattr(Kind, "scores", counting)
    weights = Weights(whole.fc1, whole.fc2)
    cut = train_module._calibrated(whole.kind, weights, whole.firing_frequency, planted, 0.97)
    assert max(sizes) == 7
    assert cut.threshold == pytest.approx(whole.threshold, rel=1e-4)
    for name, share in whole.metrics.to_json().items():
        assert getattr(cut.metrics, name) == pytest.approx(share, abs=1e-3)


def test_the_threshold_falls_near_zero(planted: LayerData) -> None:
    for target in (0.9, 0.97, 0.99):
        layer = _train(planted, target_recall=target)
        logits = layer.logits(planted.x[planted.rows("calibrate")])
        assert abs(layer.threshold) < 0.5 * logits.std()


def test_same_seed_same_bits_and_another_seed_others(planted: LayerData) -> None:
    first, again, other = (_train(planted, epochs=2, seed=seed) for seed in (5, 5, 6))
    assert (first.fc1 == again.fc1).all() and (first.fc2 == again.fc2).all()
    assert first.threshold == again.threshold and first.metrics == again.metrics
    assert not np.array_equal(first.fc1, other.fc1)


@pytest.mark.parametrize("part", ["calibrate", "test"])
def test_other_parts_are_not_trained_on(part: str) -> None:
    """Other labels may move what calibrate chooses, and what test measures, never the steps."""
    one = _planted(1000)
    labels = one.active.copy()
    labels[one.rows(part)] = ~labels[one.rows(part)]
    other = LayerData(one.x, labels, one.part, one.d_ff)
    first, second = (_train(data, epochs=1) for data in (one, other))
    assert (first.fc1 == second.fc1).all() and (first.fc2 == second.fc2).all()
    assert (first.firing_frequency == second.firing_frequency).all()
    assert (first.threshold == second.threshold) == (part == "test")
    assert first.metrics != second.metrics


def test_the_test_part_chooses_no_epoch() -> None:
    """Nonsense in test leaves the weights of all epochs, and which of them is kept, as they were."""
    one = _planted(1000)
    labels = one.active.copy()
    labels[one.rows("test")] = np.random.default_rng(0).integers(0, 256, labels[one.rows("test")].shape)
    other = LayerData(one.x, labels, one.part, one.d_ff)
    losses: list[list[float]] = [[], []]
    options = TrainOptions(rank=64, epochs=6, batch=100, patience=2)
    first, second = (
        train_layer(d, options, kept.append) for d, kept in zip((one, other), losses, strict=True)
    )
    assert losses[0] == losses[1]
    assert (first.fc1 == second.fc1).all() and first.threshold == second.threshold


def test_firing_frequency_counts_training_tokens(planted: LayerData) -> None:
    labels = np.unpackbits(planted.active[planted.rows("train")], axis=1, count=D_FF, bitorder="little")
    np.testing.assert_allclose(planted.firing_frequency(), labels.mean(axis=0), rtol=1e-6)


def test_stops_early_and_keeps_the_best_epoch() -> None:
    """With random labels, learning is memorising: the loss elsewhere only worsens, and patience ends it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, D_MODEL)).astype(np.float16)
    bits = rng.integers(0, 256, size=(400, D_FF // 8), dtype=np.uint8)
    data = LayerData(x, bits, _parts(400, 0.5, 0.75), D_FF)
    losses: list[float] = []
    options = TrainOptions(rank=256, epochs=60, batch=50, patience=2, target_recall=0.9)
    layer = train_layer(data, options, losses.append)
    best = int(np.argmin(losses))
    assert len(losses) == best + 1 + 2 < 60
    active = torch.from_numpy(data.labels(data.rows("calibrate"))).float()
    rms = torch.from_numpy(x[200:300]).float().square().mean(dim=1, keepdim=True).sqrt()
    scale = torch.from_numpy(x[:200]).float().square().mean(dim=1).sqrt().median()
    logits = torch.from_numpy(layer.logits(x[200:300])) / rms * scale
    negative = negative_weight(float(layer.firing_frequency.mean()), 0.9)
    assert float(class_weighted_bce(logits, active, negative)) == pytest.approx(losses[best], rel=1e-4)


@given(st.integers(0, 2**31), st.floats(0.01, 1))
def test_the_closed_form_gradient_is_autograds(seed: int, negative: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(7, 11, generator=generator, dtype=torch.float64)).requires_grad_()
    active = (torch.rand(7, 11, generator=generator) < 0.3).double()
    (class_weighted_bce(logits, active, negative) * logits.numel()).backward()
    ours = class_weighted_bce_gradient(logits.detach(), active, negative)
    torch.testing.assert_close(ours, logits.grad)


def test_the_loss_is_the_published_one() -> None:
    """DejaVu_predictor: binary_cross_entropy(sigmoid(z), y, weight=y * (1 - w) + w), w = mean(y) + 0.005."""
    logits, active = torch.randn(5, 9), (torch.rand(5, 9) < 0.3).float()
    weight = float(active.mean()) + 0.005
    expected = torch.nn.functional.binary_cross_entropy(
        logits.sigmoid(), active, weight=active * (1 - weight) + weight
    )
    assert negative_weight(float(active.mean()), 0.9) == pytest.approx(weight)
    torch.testing.assert_close(class_weighted_bce(logits, active, weight), expected)


@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_the_network_is_positively_homogeneous(scale: float, seed: int) -> None:
    network = PredictorNetwork(16, 24, 32, torch.Generator().manual_seed(seed))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(network(scale * x), scale * network(x), rtol=1e-4, atol=1e-4 * scale)


def test_default_ranks() -> None:
    ranks = [default_rank(d_model) for d_model in (32, 576, 2048, 4096, 8192)]
    assert ranks == [64, 128, 192, 256, 384]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 48}, r"--rank: .*cannot be quantized .got 48, expected a multiple of 32."),
        ({"rank": 0}, r"--rank: .*got 0"),
        ({"rank": 64, "target_recall": 1.5}, r"--target-recall: out of range .got 1.5"),
        ({"rank": 64, "epochs": 0}, r"--epochs: must be positive .got 0."),
        ({"rank": 64, "batch": -1}, r"--batch: must be positive"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainOptions(**options)


def test_a_diverging_training_says_so(planted: LayerData) -> None:
    with pytest.raises(InputError, match=r"training diverged: .* give a lower --lr"):
        _train(planted, learning_rate=1e30, epochs=1)


@pytest.mark.parametrize("part", range(3))
def test_traces_without_a_part_are_refused(planted: LayerData, part: int) -> None:
    parts = np.where(planted.part == part, (part + 1) % 3, planted.part).astype(np.uint8)
    with pytest.raises(InputError, match=f"the traces hold no {PARTS[part]} tokens"):
        LayerData(planted.x, planted.active, parts, D_FF)


def _command(traces: Path, out: Path, *more: str) -> list[str]:
    return ["train-predictors", "--traces", str(traces), "--out", str(out), "--epochs", "2", "-t", "1", *more]


def test_command_prints_the_table_that_it_saves(
    traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictors"
    assert main(_command(traces, out, "--rank", "32", "--target-recall", "0.9")) == 0
    printed = capsys.readouterr().out
    assert printed.strip() in (out / "README.md").read_text()
    bundle = PredictorBundle.load(out)
    assert bundle.ranks == [32, 32] and bundle.target_recall == 0.9
    assert bundle.model_fingerprint == Traces(traces).run.model_fingerprint
    assert all(0.75 < metrics.recall < 1 for metrics in bundle.metrics)  # of 150 tokens that chose nothing
    tokens = [bundle.training[f"{part}_tokens"] for part in PARTS]
    assert tokens == [2700, 150, 150]
    assert (
        "threshold from 150 tokens of other documents, metrics from 150 tokens"
        in (out / "README.md").read_text()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictors"]


def test_json_holds_the_means(traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_command(traces, tmp_path / "p", "--json")) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name, value in report["mean"].items():
        assert value == pytest.approx(np.mean([layer[name] for layer in report["metrics"]]))


def test_finished_layers_are_kept(
    traces: Path, tmp_path: Path, snapshot: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, trained = TrainOptions(rank=32, epochs=2), []

    def counting(data: LayerData, *rest: object, fail_at: int) -> object:
        trained.append(data)
        if len(trained) == fail_at:
            raise KeyboardInterrupt
        return train_layer(data, *rest)

    train_bundle(Traces(traces), tmp_path / "whole", options)
    monkeypatch.setattr(train_bundle_module, "train_layer", lambda *a: counting(*a, fail_at=2))
    with pytest.raises(KeyboardInterrupt):
        train_bundle(Traces(traces), tmp_path / "p", options)
    assert not (tmp_path / "p").exists() and (tmp_path / "p.partial" / "layer-000.safetensors").exists()
    train_bundle(Traces(traces), tmp_path / "p", options)
    assert len(trained) == 3  # layer 0, layer 1 broken off, layer 1
    assert snapshot(tmp_path / "p") == snapshot(tmp_path / "whole")
    assert not (tmp_path / "p.partial").exists()


def test_a_damaged_layer_of_unfinished_training_is_named(
    traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, real = TrainOptions(rank=32, epochs=1), train_layer
    calls = []

    def once(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_bundle_module, "train_layer", once)
    with pytest.raises(KeyboardInterrupt):
        train_bundle(Traces(traces), tmp_path / "p", options)
    layer = tmp_path / "p.partial" / "layer-000.safetensors"
    layer.write_bytes(layer.read_bytes()[:-100])
    with pytest.raises(FormatError, match="a damaged layer of unfinished training") as caught:
        train_bundle(Traces(traces), tmp_path / "p", options)
    assert str(layer) in str(caught.value)


def test_layers_trained_in_another_way_are_not_taken_up(
    traces: Path, tmp_path: Path, snapshot: Callable
) -> None:
    train_bundle(Traces(traces), tmp_path / "whole", TrainOptions(rank=32, epochs=1))
    partial = tmp_path / "p.partial"
    partial.mkdir()
    (partial / "training.json").write_text('{"format": "hotcold-partial"}')
    (partial / "layer-000.safetensors").write_bytes(b"of another run")
    train_bundle(Traces(traces), tmp_path / "p", TrainOptions(rank=32, epochs=1))
    assert snapshot(tmp_path / "p") == snapshot(tmp_path / "whole")


def test_a_damaged_description_of_unfinished_training_is_named(traces: Path, tmp_path: Path) -> None:
    partial = tmp_path / "p.partial"
    partial.mkdir()
    (partial / "training.json").write_text("{")
    (partial / "layer-000.safetensors").write_bytes(b"of days")
    with pytest.raises(FormatError, match="is not JSON") as caught:
        train_bundle(Traces(traces), tmp_path / "p", TrainOptions(rank=32, epochs=1))
    assert str(partial / "training.json") in str(caught.value)
    assert (partial / "layer-000.safetensors").read_bytes() == b"of days"


def test_only_a_predictor_bundle_is_replaced(
    traces: Path, model: Path, tmp_path: Path, snapshot: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = Path(shutil.copytree(model, tmp_path / "model"))
    assert main(_command(traces, precious)) == 2
    assert (
        "hotcold wrote something else here (got checkpoint, expected predictors)" in capsys.readouterr().err
    )
    assert snapshot(precious) == snapshot(model)
    (tmp_path / "p").mkdir()
    assert main(_command(traces, tmp_path / "p")) == main(_command(traces, tmp_path / "p")) == 0
