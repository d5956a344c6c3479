"""The device engine, with torch on the CPU as the device, against the CPU engine and the oracle."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from decoding import greedy
from stored_rows import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from hotcold.errors import InputError, UnsupportedError
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.gpu import engine as gpu_engine
from hotcold.runtime.gpu import stage as gpu_stage
from hotcold.runtime.gpu.engine import GpuEngine
from hotcold.runtime.reference import ReferenceEngine

MODES = ["dense", "exact", "predicted"]
IDS = np.random.default_rng(3).integers(3, 300, 40)


@pytest.mark.parametrize("mode", MODES)
def test_the_cpu_engines_tokens(bundle, mode):
    device = GpuEngine.load(bundle.path, mode, "cpu", n_ctx=64)
    assert greedy(device, 40, IDS) == greedy(Engine.load(bundle.path, mode, 1, n_ctx=64), 40, IDS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fields", [
    {"quant": "Q8_0"},
    {"quant": "Q4_0"},
    {"quant": "BF16"},
    {"activation": "fatrelu", "activation_threshold": 0.3},
    {"activation": "drelu"},
    {"d_ff": 104, "hot": ((), tuple(range(96)))},
])  # fmt: skip
def test_equals_the_reference(make_bundle, mode, fields):
    path = make_bundle(**fields).path
    device, reference = GpuEngine.load(path, mode, "cpu"), ReferenceEngine.load(path, mode)
    reference.cache_dtype = torch.float16
    expected = reference.prefill(IDS, all_logits=True)
    assert relative_error(device.prefill(IDS, all_logits=True), expected) < 2e-4
    device.reset()
    steps = np.stack([device.decode(token) for token in IDS[:12]])
    assert relative_error(steps, expected[:12]) < 2e-4


def test_q_k_and_v_of_different_types(make_bundle):
    """They stay apart, and give what they give as one matrix."""
    path = make_bundle(quant="F16").path
    together, apart = (GpuEngine.load(path, "exact", "cpu") for _ in range(2))
    weights = apart._first._stages[0].weights
    layers, shape = weights.layers, weights.shape
    ends = np.cumsum([0, shape.n_heads, shape.n_kv_heads, shape.n_kv_heads]) * shape.head_dim
    for i, layer in enumerate(layers):
        (whole,) = layer.qkv
        parts = tuple(whole.take(torch.arange(*rows)) for rows in pairwise(ends))
        layers[i] = replace(layer, qkv=parts)
    expected = together.prefill(IDS, all_logits=True)
    assert relative_error(apart.prefill(IDS, all_logits=True), expected) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_counts(bundle, mode):
    device, reference = GpuEngine.load(bundle.path, mode, "cpu"), ReferenceEngine.load(bundle.path, mode)
    reference.cache_dtype = torch.float16
    for engine in (device, reference):
        engine.prefill(IDS[:7])
        for token in IDS[7:15]:
            engine.decode(token)
    got, expected = device.stats(), reference.stats()
    assert got.tokens == expected.tokens == 15
    assert np.array_equal(got.predicted, expected.predicted)
    assert np.array_equal(got.fired, expected.fired)
    assert device.bytes_per_token()["ffn"] > 0


def test_audit_counts_what_was_missed(bundle):
    device, reference = (
        e.load(bundle.path, "predicted", *a) for e, a in ((GpuEngine, ["cpu"]), (ReferenceEngine, []))
    )
    for engine in (device, reference):
        engine.audit = True
        engine.prefill(IDS[:5])
        engine.decode(7)
    assert np.array_equal(device.stats().missed, reference.stats().missed)
    assert device.stats().missed.sum() > 0


def test_silu_runs_dense(make_bundle):
    path = make_bundle(activation="silu").path
    device, reference = GpuEngine.load(path, "dense", "cpu"), ReferenceEngine.load(path, "dense")
    assert relative_error(device.prefill(IDS), reference.prefill(IDS)) < 2e-3


def test_prompts_longer_than_a_block(bundle, monkeypatch):
    whole = GpuEngine.load(bundle.path, "predicted", "cpu").prefill(IDS, all_logits=True)
    monkeypatch.setattr(GpuEngine, "block", 16)
    parts = GpuEngine.load(bundle.path, "predicted", "cpu").prefill(IDS, all_logits=True)
    assert relative_error(parts, whole) < 1e-5


def test_through_the_triton_kernels(bundle, monkeypatch):
    """The same engine on the kernels themselves, in Triton's interpreter."""
    from hotcold.runtime.triton import ops

    expected = GpuEngine.load(bundle.path, "predicted", "cpu", n_ctx=16).prefill(IDS[:3])
    monkeypatch.setattr(gpu_stage, "operators", lambda device: ops)
    device = GpuEngine.load(bundle.path, "predicted", "cpu", n_ctx=16)
    for token in IDS[:3]:
        logits = device.decode(token)
    assert relative_error(logits, expected) < 1e-4


class Launches(TorchDispatchMode):
    """Counts what is called and is not a view: on a GPU, launches (an operator of ours is at most two)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "most"), [("exact", 10), ("predicted", 11), ("dense", 10)])
def test_a_layer_is_few_launches(bundle, monkeypatch, mode, most):
    """Launches take as long as reading the weights where a layer is many small ones."""
    from hotcold.runtime.triton import ops

    monkeypatch.setattr(gpu_stage, "operators", lambda device: ops)
    device = GpuEngine.load(bundle.path, mode, "cpu", n_ctx=16)
    device.prefill(IDS[:1])
    with torch.inference_mode(), Launches() as launches:
        device._first._stages[0]._one_token(16)
    assert len(launches.names) <= 2 * most + 5, launches.names


def test_the_gpu_that_is_asked_for_becomes_the_current_one(monkeypatch):
    """Triton, events and graphs go to the current GPU, whatever the tensors' is; torch.cuda is replaced."""
    from hotcold.runtime.gpu import device

    current = [0]
    monkeypatch.setattr(device, "_check_cuda", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.insert(0, device.index))
    assert device.open_device("cuda:1") == torch.device("cuda", 1) and current[0] == 1
    assert device.open_device("cuda") == torch.device("cuda", 1)


def test_no_gpu(bundle):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UnsupportedError, match=r"(built without CUDA|no NVIDIA GPU).*use --backend cpu"):
        GpuEngine.load(bundle.path, "exact", "cuda")


def test_unknown_device_and_full_context(bundle):
    with pytest.raises(InputError, match=r"unknown device \(got tpu"):
        GpuEngine.load(bundle.path, "exact", "tpu")
    engine = GpuEngine.load(bundle.path, "exact", "cpu", n_ctx=4)
    with pytest.raises(InputError, match="the context is full"):
        engine.prefill(IDS[:5])
    with pytest.raises(InputError, match="outside of the vocabulary"):
        engine.prefill([10**6])


def test_out_of_memory_says_so(bundle, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_engine, "read_weights", full)
    with pytest.raises(UnsupportedError, match="out of GPU memory; lower --vram-budget"):
        GpuEngine.load(bundle.path, "exact", "cpu")


@pytest.mark.parametrize("mode", ["exact", "predicted"])
def test_tuning_measures_each_kind_of_matrix_once(bundle, mode, monkeypatch):
    """The stopwatch is replaced, the calls that it would time are made."""
    from hotcold.files.gguf import GGUFFile
    from hotcold.runtime.gpu.tune import tune_weights
    from hotcold.runtime.gpu.weights import read_weights
    from hotcold.runtime.triton import ops, tuning

    tuned = {}

    def once(kernel, device, shape, run):
        tuned[f"{kernel} {shape}"] = run()

    monkeypatch.setattr(tuning, "tune", once)
    file = GGUFFile(bundle.path / "tiny.powerinfer.gguf")
    weights = read_weights(file, torch.device("cpu"), with_predictors=True)
    tune_weights(weights, mode, ops, torch.device("cpu"))
    # Rows count to the next power of two: q, k and v together have as many as the gates, which are read as a
    # whole in exact mode alone.
    kernels = [f"dot {size}" for size in ("512x64", "128x64", "64x64", "32x64", "128x32")]
    kernels += ["listed 64", "down 64"]
    assert sorted(tuned) == sorted(f"{kernel} float32 kind 0 tokens 1" for kernel in kernels)
    tuned.clear()
    first = read_weights(file, torch.device("cpu"), range(1), with_predictors=True, with_head=False)
    tune_weights(first, mode, ops, torch.device("cpu"))
    assert len(tuned) == len(kernels) - 1  # the head is on another device
