"""The native engine against the torch reference, on tiny bundles of every type, mode and ISA."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from stored_rows import relative_error

from hotcold.errors import FormatError, InputError, ShapeError, UnsupportedError
from hotcold.model import weights as bundle_load
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.reference import ReferenceEngine

MODES = ["dense", "exact", "predicted"]
ISAS = _cpu.available_isas()
RNG = np.random.default_rng(3)
IDS = RNG.integers(3, 300, 150).astype(np.int32)

# Float weights: the engine differs by the order of float sums only. Quantized ones: it rounds activations to
# int8 per 32 values, the reference does not, and a neuron near a threshold may go the other way.
LIMITS = {"F32": 2e-4, "F16": 2e-4, "BF16": 2e-4, "Q8_0": 0.05, "Q4_0": 0.05}
PREDICTED_LIMITS = LIMITS | {"Q8_0": 0.25, "Q4_0": 0.25}


def reference_of(path, mode):
    reference = ReferenceEngine.load(path, mode)
    reference.cache_dtype = torch.float16
    return reference


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("HOTCOLD_CPU_ISA", request.param)
    return request.param


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quant", LIMITS)
def test_equals_the_reference(make_bundle, isa, mode, quant):
    bundle = make_bundle(quant=quant)
    engine, reference = Engine.load(bundle.path, mode, 2), reference_of(bundle.path, mode)
    assert engine.isa == isa
    ids = IDS[:70]  # more than one block
    expected = reference.prefill(ids, all_logits=True)
    limit = (PREDICTED_LIMITS if mode == "predicted" else LIMITS)[quant]
    assert relative_error(engine.prefill(ids, all_logits=True), expected) < limit
    engine.reset()
    steps = np.stack([engine.decode(token) for token in ids[:20]])
    assert relative_error(steps, expected[:20]) < limit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fields", [
    {"activation": "fatrelu", "activation_threshold": 0.3},
    {"activation": "drelu"},
    {"d_ff": 104},
    {"hot": ((), tuple(range(96)))},
    {"rank": 64},
])  # fmt: skip
def test_variants_equal_the_reference(make_bundle, mode, fields):
    bundle = make_bundle(**fields)
    engine, reference = Engine.load(bundle.path, mode, 2), reference_of(bundle.path, mode)
    expected = reference.prefill(IDS[:40], all_logits=True)
    assert relative_error(engine.prefill(IDS[:40], all_logits=True), expected) < LIMITS["F32"]
    if mode != "dense":
        # drelu also drops neurons by their up value, which the engine counts as fired by the gate.
        if fields.get("activation") != "drelu":
            assert abs(engine.stats().sparsity - reference.stats().sparsity) < 0.005
        if mode == "predicted":
            assert abs(engine.stats().predicted_sparsity - reference.stats().predicted_sparsity) < 0.005


def test_silu_models_run_dense_only(make_bundle):
    bundle = make_bundle(activation="silu")
    expected = reference_of(bundle.path, "dense").prefill(IDS[:20], all_logits=True)
    assert (
        relative_error(Engine.load(bundle.path, "dense", 1).prefill(IDS[:20], all_logits=True), expected)
        < 2e-3
    )
    with pytest.raises(InputError):
        Engine.load(bundle.path, "exact", 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_block_size_does_not_matter(make_bundle, mode, quant):
    bundle = make_bundle(quant=quant)
    engine = Engine.load(bundle.path, mode, 2)
    whole = engine.prefill(IDS, all_logits=True)
    for cut in (1, 63, 64, 65, 128):
        engine.reset()
        parts = [engine.prefill(IDS[:cut], all_logits=True), engine.prefill(IDS[cut:], all_logits=True)]
        assert relative_error(np.concatenate(parts), whole) < (1e-4 if quant == "F32" else 0.05)


@pytest.mark.parametrize("mode", MODES)
def test_last_logits_are_those_of_all(bundle, mode):
    engine = Engine.load(bundle.path, mode, 2)
    whole = engine.prefill(IDS[:70], all_logits=True)
    engine.reset()
    np.testing.assert_array_equal(engine.prefill(IDS[:70]), whole[-1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quant", ["F32", "Q8_0", "Q4_0"])
def test_threads_agree(make_bundle, mode, quant):
    """Sums are taken in another order. That is float rounding; on quantized weights it can turn an int8 step,
    and near a predictor's threshold a neuron."""
    bundle = make_bundle(quant=quant)
    one = Engine.load(bundle.path, mode, 1)
    expected = one.prefill(IDS[:40], all_logits=True), [one.decode(t) for t in IDS[:5]]
    for n_threads in (2, 3, 5):
        engine = Engine.load(bundle.path, mode, n_threads)
        limit = 1e-4 if quant == "F32" else 0.05 if mode != "predicted" else PREDICTED_LIMITS[quant]
        assert relative_error(engine.prefill(IDS[:40], all_logits=True), expected[0]) < limit
        for token, logits in zip(IDS[:5], expected[1], strict=True):
            assert relative_error(engine.decode(token), logits) < limit


@pytest.mark.parametrize("mode", MODES)
def test_runs_are_bit_identical(make_bundle, mode):
    bundle = make_bundle(quant="Q4_0")
    results = []
    for _ in range(3):
        engine = Engine.load(bundle.path, mode, 3)
        results.append(np.concatenate([engine.prefill(IDS[:66]), engine.decode(7)]))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_threshold_of_minus_infinity_equals_exact(make_bundle, quant):
    bundle = make_bundle(quant=quant, predictor_threshold=float("-inf"))
    exact, predicted = Engine.load(bundle.path, "exact", 2), Engine.load(bundle.path, "predicted", 2)
    expected = exact.prefill(IDS[:70], all_logits=True)
    assert relative_error(predicted.prefill(IDS[:70], all_logits=True), expected) < (
        1e-4 if quant == "F32" else 0.02
    )
    assert predicted.stats().predicted_sparsity == 0.0
    np.testing.assert_allclose(predicted.stats().fired, exact.stats().fired, atol=3)


@pytest.mark.parametrize("block", [True, False])
def test_threshold_of_infinity_leaves_the_first_token_and_the_hot_neurons(make_bundle, block):
    bundle = make_bundle(predictor_threshold=float("inf"), hot=((1, 5, 9), ()))
    engine = Engine.load(bundle.path, "predicted", 2)
    if block:
        engine.prefill(IDS[:10])
    else:
        for token in IDS[:10]:
            engine.decode(token)
    np.testing.assert_array_equal(engine.stats().predicted, [96 + 9 * 3, 96])


@pytest.mark.parametrize("block", [True, False])
def test_audit_counts_what_was_missed(bundle, block):
    engine, reference = (
        Engine.load(bundle.path, "predicted", 2),
        reference_of(bundle.path, "predicted"),
    )
    engine.audit = reference.audit = True
    reference.prefill(IDS[:33])
    if block:
        engine.prefill(IDS[:33])
    else:
        for token in IDS[:33]:
            engine.decode(token)
    np.testing.assert_allclose(engine.stats().missed, reference.stats().missed, atol=3)
    assert abs(engine.stats().recall - reference.stats().recall) < 0.01


def _edit_rows(path, name, rows, value):
    """Overwrite rows of an F32 tensor in a GGUF file."""
    with path.open("r+b") as file:
        file.write(b"GGUF")
    reader = gguf.GGUFReader(path)
    tensor = next(t for t in reader.tensors if t.name == name)
    with path.open("r+b") as file:
        for row in rows:
            file.seek(tensor.data_offset + row * tensor.data.shape[1] * 4)
            file.write(np.full(tensor.data.shape[1], value, np.float32).tobytes())
        file.seek(0)
        file.write(b"PWRI")


@pytest.fixture
def nan_allowed(monkeypatch):
    """Files with NaN are refused; here it marks what may not be read."""
    monkeypatch.setattr(bundle_load, "check_stored", lambda data, *_: data.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("mode", ["exact", "predicted"])
def test_rows_of_inactive_neurons_are_not_used(make_bundle, tmp_path, nan_allowed, mode, n):
    """Neurons whose gate row is zero never fire: their up and down rows may hold anything."""
    bundle = make_bundle(hot=((), ()))
    folder = tmp_path / "poisoned"
    shutil.copytree(bundle.path, folder)
    path, dead = folder / "tiny.powerinfer.gguf", [0, 13, 17, 64, 95]
    for layer in range(2):
        _edit_rows(path, f"blk.{layer}.ffn_gate.weight", dead, 0.0)
        for part in ("up", "down_t"):
            _edit_rows(path, f"blk.{layer}.ffn_{part}.weight", dead, np.nan)
    assert np.isfinite(Engine.load(folder, mode, 2).prefill(IDS[:n], all_logits=True)).all()


@pytest.mark.parametrize("n", [1, 40])
def test_rows_of_unpredicted_neurons_are_not_used(make_bundle, tmp_path, nan_allowed, n):
    """A zero row of fc2 stays below a positive threshold: the neuron is left out, though its gate fires."""
    bundle = make_bundle(predictor_threshold=1e-3, hot=((), ()))
    folder = tmp_path / "poisoned"
    shutil.copytree(bundle.path, folder)
    path, cold = folder / "tiny.powerinfer.gguf", [0, 13, 17, 64, 95]
    for layer in range(2):
        _edit_rows(path, f"blk.{layer}.fc2.weight", cold, 0.0)
        for part in ("up", "down_t"):
            _edit_rows(path, f"blk.{layer}.ffn_{part}.weight", cold, np.nan)
    engine = Engine.load(folder, "predicted", 2)
    engine._first._native.position = 1  # position 0 is computed in full
    assert np.isfinite(engine.prefill(IDS[:n], all_logits=True)).all()
    engine.reset()
    assert np.isnan(engine.prefill(IDS[:n], all_logits=True)).any()


def test_a_full_context_and_bad_tokens_are_refused(bundle):
    engine = Engine.load(bundle.path, "exact", 1, n_ctx=8)
    engine.prefill(IDS[:8])
    with pytest.raises(InputError, match="context is full"):
        engine.decode(5)
    engine.reset()
    for bad in (-1, engine.n_vocab):
        with pytest.raises(InputError, match="outside of the vocabulary"):
            engine.decode(bad)
    with pytest.raises(InputError, match="no tokens"):
        engine.prefill([])


def test_unknown_modes_isas_and_thread_counts_are_refused(bundle, monkeypatch):
    for n_threads in (-1, 0):
        with pytest.raises(InputError, match=rf"--threads: must be at least 1 \(got {n_threads}\)"):
            Engine.load(bundle.path, "exact", n_threads)
    with pytest.raises(InputError, match="unknown mode"):
        Engine.load(bundle.path, "fast")
    monkeypatch.setenv("HOTCOLD_CPU_ISA", "sse9")
    with pytest.raises(UnsupportedError, match="HOTCOLD_CPU_ISA"):
        Engine.load(bundle.path, "exact")


def test_a_sparse_file_is_no_dense_one(bundle):
    with pytest.raises(UnsupportedError, match="dense mode cannot run"):
        Engine(bundle.path / "tiny.powerinfer.gguf", "dense")
    with pytest.raises(UnsupportedError, match="exact mode cannot run"):
        Engine(bundle.path / "tiny.gguf", "exact")


def test_per_layer_metadata_of_the_wrong_length(make_bundle):
    bundle = make_bundle(hot=((1, 2), (3,), (4,)))
    with pytest.raises(FormatError, match=r"hotcold\.hot\.counts"):
        Engine.load(bundle.path, "predicted")


def test_a_tensor_of_the_wrong_shape(make_bundle, monkeypatch):
    from hotcold.files.gguf import GGUFFile

    file = GGUFFile(make_bundle().path / "tiny.powerinfer.gguf")
    key = "llama.feed_forward_length"
    file.metadata[key] = file.metadata[key] + 32
    from hotcold.runtime.cpu.load import load_model

    with pytest.raises(ShapeError, match=r"blk\.0\.ffn_(gate|up)"):
        load_model(file, "exact", 1, 16)


def test_auto_chooses_and_remembers(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = Engine.load(bundle.path, "auto", 1)
    assert first.mode in ("dense", "exact", "predicted")
    remembered = list(tmp_path.rglob("*.json"))
    assert len(remembered) == 1
    other = {"dense": "exact", "exact": "predicted", "predicted": "dense"}[first.mode]
    remembered[0].write_text(json.dumps({"mode": other}))
    assert Engine.load(bundle.path, "auto", 1).mode == other


def test_bytes_per_token(make_bundle):
    bundle = make_bundle(quant="Q4_0")
    engine = Engine.load(bundle.path, "exact", 1)
    engine.prefill(IDS[:20])
    parts = engine.bytes_per_token()
    row = 64 // 2 + 4  # 64 nibbles and two f16 scales
    fired = (1 - engine.stats().sparsity) * 2 * 96
    down = 128 // 2 + 8  # down rows are padded to 128 outputs
    assert parts["ffn"] == pytest.approx(2 * 96 * row + fired * (row + down))
    assert parts["kv"] == 2 * 2 * 2 * 2 * 16 * 20
    assert parts["predictor"] == 0


@pytest.mark.parametrize("prefetching", [False, True])
def test_read_bandwidth_is_that_of_memory(prefetching):
    assert 0.5 < _cpu.read_bandwidth(1, 1 << 26, 2, prefetching=prefetching) < 2000


def test_more_context_than_the_model_was_trained_on_is_said(bundle, capsys):
    Engine.load(bundle.path, "exact", 1, n_ctx=2048)
    assert capsys.readouterr().err == ""
    Engine.load(bundle.path, "exact", 1, n_ctx=2049)
    assert "a context of 2049 tokens, where the model was trained on 2048" in capsys.readouterr().err
