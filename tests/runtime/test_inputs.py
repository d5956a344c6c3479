"""Attention matrices by input, of which the smallest inputs are left out: the operator, and the engine."""

from __future__ import annotations

import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from stored_rows import ACTIVITY, TYPES, poison, relative_error, stored

from hotcold import storage
from hotcold.convert.bundle.manifest import Manifest
from hotcold.errors import FormatError, InputError, MismatchError, ShapeError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.files.quantize import dequantize
from hotcold.runtime.backends import BackendOptions
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.reference import ReferenceEngine

ops = _cpu.ops
# The kernel rounds products of inputs and scales to int8, 16 inputs at a time.
LIMITS = {"F32": 1e-5, "F16": 1e-5, "BF16": 1e-5, "Q8_0": 0.02, "Q4_0": 0.02}
# (inputs, outputs of each matrix): whole groups of 512, a tail, less than a chunk
SHAPES = [(1024, (1024, 512)), (576, (576, 192, 192)), (70, (96, 32))]
ISAS = _cpu.available_isas()
MODES = ["dense", "exact", "predicted"]
IDS = np.random.default_rng(3).integers(3, 300, 90).astype(np.int32)

isas = pytest.mark.parametrize("isa", ISAS)


@isas
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("inputs, outputs", SHAPES)
@pytest.mark.parametrize("activity", ACTIVITY)
@pytest.mark.parametrize("threads", [1, 3])
def test_only_rows_of_inputs_that_count_are_read(isa, kind, inputs, outputs, activity, threads, rng):
    x = rng.standard_normal((1, inputs)).astype(np.float32)
    share = ACTIVITY[activity]
    zero = rng.permutation(inputs)[1 if share < 0 else round(share * inputs) :]
    x[0, zero] = 0
    matrices = [stored(kind, rng.standard_normal((inputs, n))) for n in outputs]
    for rows, _ in matrices:
        poison(kind, rows, zero)
    data = [rows for rows, _ in matrices]
    found = ops.multiply_inputs(isa, threads, [TYPES[kind]] * len(outputs), data, list(outputs), x)
    for got, (_, values) in zip(found, matrices, strict=True):
        expected = x.astype(np.float64) @ values
        np.testing.assert_allclose(got, expected, atol=LIMITS[kind] * max(np.abs(expected).max(), 1e-9))


@isas
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("inputs, outputs", SHAPES)
@pytest.mark.parametrize("tokens", [2, 17, 64])
def test_a_block_of_tokens_is_like_each_alone(isa, kind, inputs, outputs, tokens, rng):
    x = rng.standard_normal((tokens, inputs)).astype(np.float32)
    x[np.abs(x) < 0.7] = 0
    matrices = [stored(kind, rng.standard_normal((inputs, n))) for n in outputs]
    kinds = [TYPES[kind]] * len(outputs)
    found = ops.multiply_inputs(isa, 2, kinds, [rows for rows, _ in matrices], list(outputs), x)
    for got, (_, values) in zip(found, matrices, strict=True):
        assert relative_error(got, x.astype(np.float64) @ values) < LIMITS[kind]


@isas
@pytest.mark.parametrize("tokens", [1, 5])
def test_matrices_may_be_of_different_types(isa, tokens, rng):
    x = rng.standard_normal((tokens, 64)).astype(np.float32)
    matrices = [stored(kind, rng.standard_normal((64, 96))) for kind in ("F16", "Q8_0", "Q4_0")]
    found = ops.multiply_inputs(isa, 2, [1, 3, 4], [rows for rows, _ in matrices], [96] * 3, x)
    for got, (_, values) in zip(found, matrices, strict=True):
        assert relative_error(got, x.astype(np.float64) @ values) < 0.02


@isas
def test_what_is_small_is_counted_and_dropped_whatever_its_sign(isa, rng):
    x = rng.standard_normal(96).astype(np.float32)
    x[:4] = [0.5, -0.5, np.nextafter(np.float32(0.5), np.float32(0)), np.nan]
    large = np.abs(x) >= 0.5
    assert ops.count_at_least(isa, x, 0.5) == large.sum()
    np.testing.assert_array_equal(ops.keep_at_least(isa, x, 0.5), np.where(large, x, 0))


@isas
@pytest.mark.parametrize("n", [16, 70, 576, 4096])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1 - 1e-9])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_the_smallest_inputs_are_left_out(isa, n, share, spread, rng):
    """Sizes over one or several orders of magnitude; with n / 256 more kept than asked for, at most."""
    x = (np.exp(spread * rng.standard_normal(n)) * rng.choice([-1, 1], n)).astype(np.float32)
    found = ops.leave_out_smallest(isa, x, share)
    kept, keep = np.count_nonzero(found), n - int(share * n)
    assert keep <= kept <= keep + n // 256
    least = np.sort(np.abs(x))[n - kept]
    np.testing.assert_array_equal(found, np.where(np.abs(x) >= least, x, 0))


@isas
def test_inputs_that_are_alike_or_of_very_different_sizes(isa):
    for same in (np.zeros(100), np.full(100, -3.0), np.full(100, 1e-44), np.full(100, np.inf)):
        same = same.astype(np.float32)
        np.testing.assert_array_equal(ops.leave_out_smallest(isa, same, 0.9), same)
    spread = np.float32([2.0**-15, 1.0, -(2.0**-17), 2.0**-140])
    for share, kept in ((0.0, [1, 1, 1, 1]), (0.25, [1, 1, 1, 0]), (0.5, [1, 1, 0, 0]), (0.75, [0, 1, 0, 0])):
        np.testing.assert_array_equal(ops.leave_out_smallest(isa, spread, share), spread * np.float32(kept))


def reference_of(bundle, mode, share):
    """The reference with the projections of the attention file."""
    reference = ReferenceEngine.load(bundle.path, mode)
    reference.cache_dtype, reference.input_sparsity = torch.float16, share
    rows = GGUFFile(bundle.path / "tiny.attention.gguf").tensors
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    for i, layer in enumerate(reference._layers):
        weights = {slot: dequantize(rows[f"blk.{i}.{name}_t.weight"]).T for slot, name in names.items()}
        linear = {
            slot: replace(getattr(layer, slot), weight=torch.from_numpy(np.array(weight)))
            for slot, weight in weights.items()
        }
        reference._layers[i] = replace(layer, **linear)
    return reference


@isas
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quant", TYPES)
@pytest.mark.parametrize("share", [1e-6, 0.5, 0.9])
def test_the_engine_equals_the_reference(make_bundle, monkeypatch, isa, mode, quant, share):
    monkeypatch.setenv("HOTCOLD_CPU_ISA", isa)
    bundle = make_bundle(quant=quant)
    engine, reference = (
        Engine.load(bundle.path, mode, 2, input_sparsity=share),
        reference_of(bundle, mode, share),
    )
    ids = IDS[:70]  # more than one block
    expected = reference.prefill(ids, all_logits=True)
    # With quantized weights inputs are rounded too: at the edge others are left out, and other neurons fire.
    limit = 2e-4 if quant in ("F32", "F16", "BF16") else 0.5 if mode == "predicted" else 0.3
    assert relative_error(engine.prefill(ids, all_logits=True), expected) < limit
    engine.reset()
    steps = np.stack([engine.decode(token) for token in ids[:20]])
    assert relative_error(steps, expected[:20]) < limit


def test_the_share_is_what_is_left_out(make_bundle):
    """Bytes that a token needed: 64 inputs of q, k, v (rows of 32 are padded to 64) and of o, in 2 layers."""
    bundle = make_bundle()
    full = 2 * 4 * (64 * (64 + 64 + 64) + 64 * 64)
    for share, kept in ((1e-6, 1.0), (0.25, 0.75), (0.5, 0.5)):
        engine = Engine.load(bundle.path, "exact", 2, input_sparsity=share)
        engine.prefill(IDS[:1])  # position 0 has all of them
        assert engine.bytes_per_token()["attention"] == full
        engine.reset_stats()
        engine.prefill(IDS[1:40])
        assert engine.bytes_per_token()["attention"] == pytest.approx(full * kept, rel=1e-3)
        engine.reset_stats()
        engine.decode(5)
        assert engine.bytes_per_token()["attention"] == pytest.approx(full * kept, rel=1e-3)


def test_threads_agree_and_runs_are_bit_identical(make_bundle):
    bundle = make_bundle()
    results = {
        n: [Engine.load(bundle.path, "exact", n, input_sparsity=0.5).prefill(IDS[:66]) for _ in range(2)]
        for n in (1, 2, 5)
    }
    for first, second in results.values():
        np.testing.assert_array_equal(first, second)
        assert relative_error(first, results[1][0]) < 1e-4


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan")])
def test_an_impossible_share_is_refused(bundle, share):
    with pytest.raises(InputError, match="--input-sparsity out of range"):
        Engine.load(bundle.path, "exact", 1, input_sparsity=share)


def test_all_but_one_input_may_be_left_out(bundle):
    engine = Engine.load(bundle.path, "exact", 1, input_sparsity=1 - 1e-9)  # 1 in float32
    assert np.isfinite(engine.prefill(IDS, all_logits=True)).all()


def test_a_bundle_without_the_rows_is_refused_with_the_remedy(bundle, tmp_path):
    manifest = Manifest.read(bundle.path)
    files = {name: file for name, file in manifest.files.items() if file.role != "attention"}
    storage.write_json(tmp_path / "manifest.json", replace(manifest, files=files).to_json())
    for path in (tmp_path, bundle.path / "tiny.gguf"):
        with pytest.raises(InputError, match="create one with `hotcold export --attention-rows`"):
            Engine.load(path, "dense", 1, input_sparsity=0.5)
    with pytest.raises(InputError, match="create one with `hotcold export --attention-rows`"):
        Engine(bundle.path / "tiny.gguf", "dense", 1, input_sparsity=0.5)


def test_other_backends_refuse_it():
    with pytest.raises(InputError, match="--input-sparsity requires the cpu backend"):
        BackendOptions(backend="gpu", input_sparsity=0.5)


def _attention_file(path, d=64, *, fingerprint=None, without="", layers=2):
    writer = gguf.GGUFWriter(path, "hotcold-attention")
    if fingerprint:
        writer.add_string("hotcold.model_fingerprint", fingerprint)
    for i in range(layers):
        for name, outputs in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", d)):
            if name != without:
                writer.add_tensor(f"blk.{i}.{name}_t.weight", np.zeros((64, outputs), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_rows_that_do_not_fit_are_refused(bundle, tmp_path):
    sparse = bundle.path / "tiny.powerinfer.gguf"

    def load(path):
        return Engine(sparse, "exact", 1, input_rows=path, input_sparsity=0.5)

    load(_attention_file(tmp_path / "good.gguf"))
    with pytest.raises(ShapeError, match="attn_output_t"):
        load(_attention_file(tmp_path / "shape.gguf", d=32))
    with pytest.raises(FormatError, match=r"blk\.0\.attn_v_t\.weight: missing tensor"):
        load(_attention_file(tmp_path / "missing.gguf", without="attn_v"))
    with pytest.raises(MismatchError, match="these rows belong to another model"):
        load(_attention_file(tmp_path / "other.gguf", fingerprint="f" * 64))
    with pytest.raises(UnsupportedError, match=r"tensors of an unknown kind \(got blk\.2\.attn_k_t\.weight"):
        load(_attention_file(tmp_path / "deeper.gguf", layers=3))
    shutil.copy(sparse, tmp_path / "model.gguf")
    with pytest.raises(FormatError, match=r"blk\.0\.attn_q_t\.weight: missing tensor"):
        load(tmp_path / "model.gguf")


@pytest.fixture
def rng():
    return np.random.default_rng(11)
