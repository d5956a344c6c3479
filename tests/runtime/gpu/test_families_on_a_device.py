"""Every family on a device, torch on the CPU being one: against transformers, oracle and CPU engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoding import check_logits, greedy
from stored_rows import relative_error
from tiny_families import D_FF, FAMILIES, IDS, SPARSE

from hotcold.errors import HotcoldError, InputError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.runtime.backends import BackendOptions, open_engine
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.gpu import engine as gpu_engine
from hotcold.runtime.gpu import stage
from hotcold.runtime.gpu.engine import GpuEngine
from hotcold.runtime.gpu.hybrid import HybridEngine
from hotcold.runtime.gpu.tune import tune_weights
from hotcold.runtime.gpu.weights import read_weights
from hotcold.runtime.placement.plan import PlacedLayer, Placement
from hotcold.runtime.reference import ReferenceEngine
from hotcold.runtime.triton import ops, tuning


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_logits_on_a_device(name, make_bundle_of, logits_of):
    """Torch on the CPU being the device; a prompt at once, by eights as the operators take it, one by one."""
    engine = GpuEngine.load(make_bundle_of(name), "dense", "cpu", n_ctx=64)
    for step in (len(IDS), 8, 1):
        engine.reset()
        logits = [engine.prefill(IDS[i : i + step], all_logits=True) for i in range(0, len(IDS), step)]
        assert relative_error(np.concatenate(logits), logits_of(name)) < 1e-3


@pytest.mark.parametrize("mode", ["exact", "predicted"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_modes_on_a_device(name, mode, make_bundle_of):
    """The logits and counts of the oracle, and the tokens of the CPU engine."""
    bundle = make_bundle_of(name)
    device, reference = (
        GpuEngine.load(bundle, mode, "cpu", n_ctx=64),
        ReferenceEngine.load(bundle, mode, n_ctx=64),
    )
    reference.cache_dtype, reference.audit, device.audit = torch.float16, True, True
    expected = reference.prefill(IDS, all_logits=True)
    assert relative_error(device.prefill(IDS, all_logits=True), expected) < 2e-4
    got, counts = device.stats(), reference.stats()
    assert np.abs(got.fired - counts.fired).max() <= 2 and np.abs(got.missed - counts.missed).max() <= 2
    assert np.array_equal(got.predicted, counts.predicted)
    device.reset()
    device.audit = False
    device.reset_stats()
    one_by_one = np.stack([device.decode(token) for token in IDS])
    assert relative_error(one_by_one, expected) < 2e-4
    assert np.abs(device.stats().fired - counts.fired).max() <= 2
    assert np.array_equal(device.stats().predicted, counts.predicted)
    device.reset()
    assert greedy(device, 20, IDS) == greedy(Engine.load(bundle, mode, 1, n_ctx=64), 20, IDS)


def test_learned_positions_are_on_the_first_device(make_bundle_of, monkeypatch):
    one = GpuEngine.load(make_bundle_of("opt"), "predicted", "cpu", n_ctx=64)
    monkeypatch.setattr(gpu_engine, "whole_model", lambda *_: [0, 1])
    two = GpuEngine.load(make_bundle_of("opt"), "predicted", "cpu,cpu", n_ctx=64)
    assert [stage.weights.positions is None for stage in two._first._stages] == [False, True]
    assert greedy(two, 20, IDS) == greedy(one, 20, IDS)


def test_learned_positions_bound_the_context(make_bundle_of):
    with pytest.raises(InputError, match=r"so long a context \(got 65, expected at most 64\)"):
        GpuEngine.load(make_bundle_of("opt"), "exact", "cpu", n_ctx=65)


def test_tuning_without_gates(make_bundle_of, monkeypatch):
    """One matrix into the FFN is listed, and exact mode's rows of `down` are another kernel's."""
    tuned = {}
    monkeypatch.setattr(tuning, "tune", lambda kernel, device, shape, run: tuned.update({kernel: run()}))
    weights = read_weights(GGUFFile(make_bundle_of("opt") / "m.powerinfer.gguf"), torch.device("cpu"))
    tune_weights(weights, "exact", ops, torch.device("cpu"))
    assert sorted(tuned) == ["dot", "down", "listed", "s3"]


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("opt", "hotcold.activation", "drelu", "dReLU needs a gate"),
        ("llama", "hotcold.activation", "silu", "SiLU and GELU models run in dense mode only"),
        ("opt", "opt.attention.key_length", 15, "heads of an odd width"),
    ],
)
def test_what_a_device_would_compute_wrongly(name, key, value, message, make_bundle_of, monkeypatch):
    def changed(path):
        file = GGUFFile(path)
        file.metadata[key] = value
        return file

    monkeypatch.setattr(gpu_engine, "open_gguf", changed)
    with pytest.raises(UnsupportedError, match=message):
        GpuEngine.load(make_bundle_of(name), "exact", "cpu", n_ctx=64)


@pytest.mark.parametrize(("old", "new"), [("ffn_down_t", "ffn_down"), ("ffn_up", "ffn_gate")])
def test_biases_under_other_names(old, new, make_bundle_of, monkeypatch):
    """Not read, they would be missing from what is computed."""

    def changed(path):
        file = GGUFFile(path)
        for block in ("blk.0", "blk.1"):  # in one of them alone a bias would be missing
            file.tensors[f"{block}.{new}.bias"] = file.tensors.pop(f"{block}.{old}.bias")
        return file

    monkeypatch.setattr(gpu_engine, "open_gguf", changed)
    with pytest.raises(HotcoldError, match=rf"\(got blk.0.{new}.bias"):
        GpuEngine.load(make_bundle_of("opt"), "exact", "cpu", n_ctx=64)


@pytest.mark.parametrize(
    ("name", "mode"), [("opt", "exact"), ("opt", "predicted"), ("falcon-40b-relu", "predicted")]
)
def test_without_gates_through_the_triton_kernels(name, mode, make_bundle_of, monkeypatch):
    """In Triton's interpreter: the first token, and one after it."""
    expected = GpuEngine.load(make_bundle_of(name), mode, "cpu", n_ctx=16).prefill(IDS[:2])
    monkeypatch.setattr(stage, "operators", lambda device: ops)
    device = GpuEngine.load(make_bundle_of(name), mode, "cpu", n_ctx=16)
    device.prefill(IDS[:1])
    assert relative_error(device.decode(IDS[1]), expected) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_device_and_the_cpu(name, make_bundle_of, logits_of):
    """A layer on either side, torch on the CPU being the device; with biases, head norms and windows."""
    all_hot, none_hot = np.arange(D_FF, dtype=np.int32), np.empty(0, np.int32)
    layers = (PlacedLayer(True, all_hot, D_FF), PlacedLayer(False, none_hot, D_FF))
    placement = Placement(layers, (1 << 30,))
    engine = HybridEngine.load(make_bundle_of(name), placement, "dense", "cpu", 2, n_ctx=64)
    check_logits(engine, IDS, logits_of(name), 1e-3)


SOME = np.arange(5, 90, dtype=np.int32)
SPLITS = {
    "split": (PlacedLayer(True, SOME, D_FF), PlacedLayer(True, SOME[::2], D_FF)),
    "all cold": (PlacedLayer(True, SOME[:0], D_FF),) * 2,
    "last layer on the CPU": (PlacedLayer(True, SOME, D_FF), PlacedLayer(False, SOME[:0], D_FF)),
}


@pytest.mark.parametrize("mode", ["exact", "predicted"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "name", ["opt", "falcon-7b-relu", "falcon-40b-relu", "falcon-11b-relu", "bamboo", "qwen3", "prosparse"]
)
def test_neurons_on_both_sides(name, split, mode, make_bundle_of):
    """The logits and counts of the oracle, for a prompt and one by one; the tokens of the CPU engine."""
    bundle = make_bundle_of(name)
    hybrid = HybridEngine.load(bundle, Placement(SPLITS[split], (1 << 30,)), mode, "cpu", 2, n_ctx=64)
    reference = ReferenceEngine.load(bundle, mode, n_ctx=64)
    reference.cache_dtype = torch.float16
    expected = reference.prefill(IDS, all_logits=True)
    check_logits(hybrid, IDS, expected, 1e-3)
    hybrid.reset()
    hybrid.reset_stats()
    hybrid.prefill(IDS)
    if name != "bamboo":  # whose gates alone are what the CPU counts
        assert np.abs(hybrid.stats().fired - reference.stats().fired).max() <= 2
    assert np.array_equal(hybrid.stats().predicted, reference.stats().predicted)
    hybrid.reset()
    assert greedy(hybrid, 20, IDS) == greedy(Engine.load(bundle, mode, 1, n_ctx=64), 20, IDS)


@pytest.mark.parametrize("name", ["opt", "falcon-7b-relu", "falcon-11b-relu", "prosparse"])
def test_a_layer_that_wants_no_cold_neuron(name, make_bundle_of, monkeypatch):
    """Nothing comes back from the first layer, and the second one hands over too."""

    def changed(path):
        file = GGUFFile(path)
        file.metadata["hotcold.predictor.thresholds"] = np.array([1e9, 0.0], np.float32)
        file.metadata["hotcold.hot.counts"] = np.zeros(2, np.int32)
        return file

    monkeypatch.setattr(gpu_engine, "open_gguf", changed)
    bundle, placement = make_bundle_of(name), Placement(SPLITS["all cold"], (1 << 30,))
    hybrid = HybridEngine.load(bundle, placement, "predicted", "cpu", 1, n_ctx=64)
    alone = GpuEngine.load(bundle, "predicted", "cpu", n_ctx=64)
    got, expected = (np.stack([engine.decode(token) for token in IDS]) for engine in (hybrid, alone))
    assert relative_error(got, expected) < 1e-4
    assert np.array_equal(hybrid.stats().predicted, alone.stats().predicted)
    assert hybrid.measured().skipped_handovers == len(IDS) - 1  # the first token wants everything


@pytest.mark.parametrize("name", ["opt", "falcon-40b-relu"])
def test_both_sides_through_the_triton_kernels(name, make_bundle_of, monkeypatch):
    """In Triton's interpreter: the first token, and one after it."""
    bundle, placement = make_bundle_of(name), Placement(SPLITS["split"], (1 << 30,))
    expected = GpuEngine.load(bundle, "predicted", "cpu", n_ctx=16).prefill(IDS[:2])
    monkeypatch.setattr(stage, "operators", lambda device: ops)
    hybrid = HybridEngine.load(bundle, placement, "predicted", "cpu", 1, n_ctx=16)
    hybrid.prefill(IDS[:1])
    assert relative_error(hybrid.decode(IDS[1]), expected) < 1e-4


@pytest.mark.parametrize("name", ["opt", "falcon-40b-relu"])
def test_plans_without_gates(name, make_bundle_of):
    bundle, options = make_bundle_of(name), BackendOptions("hybrid", device="cpu", vram_budget="1G")
    hybrid = open_engine(bundle, "predicted", 1, 64, options)
    taken = sum(stage.weights.nbytes for stage in hybrid._first._stages)
    assert taken <= hybrid.placement.bytes_on(0) <= 1 << 30


@pytest.mark.parametrize("name", ["opt", "falcon-40b-relu"])
def test_what_a_token_reads_without_gates(name, make_bundle_of):
    bundle, placement = make_bundle_of(name), Placement(SPLITS["split"], (1 << 30,))
    hybrid = HybridEngine.load(bundle, placement, "predicted", "cpu", 1, n_ctx=64)
    alone = GpuEngine.load(bundle, "predicted", "cpu", n_ctx=64)
    hybrid.prefill(IDS), alone.prefill(IDS)
    got, expected = hybrid.bytes_per_token(8), alone.bytes_per_token(8)
    for part in ("attention", "predictor", "ffn", "head", "kv"):
        assert got[part] == pytest.approx(expected[part], rel=0.01)
