"""Models with input rules: transformers, the reference and the CPU engine compute one function."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from stored_rows import TYPES, poison, relative_error, stored
from tiny_families import D_FF, D_MODEL, FAMILIES, IDS, N_LAYERS

from hotcold import storage
from hotcold.cli import main
from hotcold.convert.bundle.manifest import BundleFile, Manifest
from hotcold.convert.bundle.verify import verify_bundle
from hotcold.convert.gguf.write import copied, write_gguf
from hotcold.errors import FormatError, InputError
from hotcold.files.gguf import GGUFFile
from hotcold.files.json import read_json
from hotcold.files.quantize import dequantize
from hotcold.model import checkpoint
from hotcold.model.gguf_checkpoint import GGUFCheckpoint
from hotcold.model.inputs import SCORES, SITES, rules_of_config
from hotcold.runtime.bundle_files import ModelPath
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.reference import ReferenceEngine

ISAS = _cpu.available_isas()
ALL = tuple(SITES)
# Every way in which families differ where inputs are read: fused q/k/v, no gates, parallel blocks, scales
NAMES = ["llama", "llama-silu-tied", "qwen2", "opt", "falcon-7b", "falcon-40b-relu", "minicpm", "granite"]
# An input at its threshold may count in one program and not in the other, by rounding.
LIMIT = 5e-3


def reference_of(bundle, mode):
    """The reference with what the engine reads by input: another quantization of the same weights."""
    reference = ReferenceEngine.load(bundle, mode, n_ctx=64)
    reference.cache_dtype = torch.float16
    path = ModelPath(bundle).input_rows(any_share=False)
    rows = {name: dequantize(tensor) for name, tensor in GGUFFile(path).tensors.items()}
    read = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    read |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    read = {slot: name for slot, name in read.items() if slot not in _by_neuron(mode)}
    for i, layer in enumerate(reference._layers):
        for slot, name in read.items():
            if f"blk.{i}.{name}_t.weight" not in rows:
                continue
            weight = np.array(rows[f"blk.{i}.{name}_t.weight"])
            weight = weight if slot == "down" else weight.T
            weight = torch.from_numpy(np.ascontiguousarray(weight))
            old = getattr(layer, slot)
            layer = replace(layer, **{slot: weight if slot == "down" else replace(old, weight=weight)})
        reference._layers[i] = layer
    return reference


def _by_neuron(mode):
    return {"dense": (), "exact": ("up", "down"), "predicted": ("gate", "up", "down")}[mode]


def both(engine, ids=IDS):
    """The logits of one block, and of a token at a time."""
    block = engine.prefill(ids, all_logits=True)
    engine.reset()
    return block, np.stack([engine.decode(token) for token in ids])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("score", SCORES)
def test_one_function_from_transformers_to_the_engine(make_ruled, name, score):
    model, bundle = make_ruled(name, ALL, score)
    with torch.no_grad():
        expected = checkpoint.load_model(str(model))(torch.from_numpy(IDS)[None]).logits[0].numpy()
    for mode in ModelPath(bundle).modes:
        reference = ReferenceEngine.load(bundle, mode, n_ctx=64)
        computed = reference.prefill(IDS, all_logits=True)
        if mode != "predicted":
            assert relative_error(computed, expected) < LIMIT
        reference.reset()
        reference.reset_stats()
        reference.cache_dtype = torch.float16
        computed = reference.prefill(IDS, all_logits=True)
        engine = Engine.load(bundle, mode, 2, n_ctx=64)
        for found in both(engine):
            assert relative_error(found, computed) < LIMIT
        assert set(engine.stats().input_sparsity) == set(SITES)
        for site, share in reference.stats().input_sparsity.items():
            assert engine.stats().input_sparsity[site] == pytest.approx(share, abs=0.002)
    plain = ReferenceEngine.load(bundle, "dense", n_ctx=64)
    plain._least = {}
    assert relative_error(plain.prefill(IDS, all_logits=True), expected) > 0.02  # the rules have their say


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("quant", [kind.lower() for kind in TYPES])
def test_every_site_type_and_isa(make_ruled, monkeypatch, isa, site, quant):
    monkeypatch.setenv("HOTCOLD_CPU_ISA", isa)
    _, bundle = make_ruled(sites=(site,), quant=quant)
    for mode in ("dense", "exact", "predicted"):
        expected = reference_of(bundle, mode).prefill(IDS, all_logits=True)
        # with quantized weights the inputs are rounded too, and others count
        limit = LIMIT if quant in ("f32", "f16", "bf16") else 0.5 if mode == "predicted" else 0.3
        for found in both(Engine.load(bundle, mode, 2, n_ctx=64)):
            assert relative_error(found, expected) < limit


@pytest.mark.parametrize("name", NAMES)
def test_a_file_without_its_rows_by_input_is_the_same_function(make_ruled, name):
    """A GGUF file that was copied out of its bundle: nothing is skipped, the same inputs do not count."""
    _, bundle = make_ruled(name, ALL, "wina")
    for mode in [mode for mode in ModelPath(bundle).modes if mode != "predicted"]:
        whole = Engine.load(bundle, mode, 2, n_ctx=64)
        alone = Engine.load(ModelPath(bundle).file_for(mode), mode, 2, n_ctx=64)
        for one, other in zip(both(whole), both(alone), strict=True):
            assert relative_error(one, other) < LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_the_bundle_is_whole_and_gives_the_rules_back(make_ruled, name):
    model, bundle = make_ruled(name, ALL, "wina")
    assert verify_bundle(bundle) == []
    manifest = Manifest.read(bundle)
    assert manifest.of_role("inputs") == ["m.inputs.gguf"]
    assert not manifest.llama_cpp_exact
    assert any("qkv, o, gate_up, down" in line for line in manifest.llama_cpp_differences)
    rules = rules_of_config(read_json(model / "config.json"), N_LAYERS)
    if FAMILIES[name]["model_type"] not in ("opt", "falcon"):  # whose dense files are not read back
        assert rules_of_config(GGUFCheckpoint(bundle / "m.gguf").config, N_LAYERS) == rules


def test_a_bundle_of_a_gguf_file_keeps_the_rules(make_ruled, tmp_path):
    """The weights of scores are worked out anew, from the stored matrices."""
    _, bundle = make_ruled("llama-silu-tied", ALL, "wina")
    again = tmp_path / "again"
    assert main(["convert", str(bundle / "m.gguf"), "--to", "bundle", "--out", str(again)]) == 0
    assert verify_bundle(again) == []
    for name in ("m.gguf", "m.inputs.gguf"):
        first, second = GGUFFile(bundle / name), GGUFFile(again / name)
        np.testing.assert_equal(
            {name: tensor.data for name, tensor in first.tensors.items()},
            {name: tensor.data for name, tensor in second.tensors.items()},
        )
        for key in (key for key in first.metadata if key.startswith("hotcold.inputs.")):
            assert np.array_equal(first.metadata[key], second.metadata[key])


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_verify_wants_the_scores_weights(make_ruled, tmp_path, damage):
    """Of the right number, even where the manifest agrees with the file."""
    _, bundle = make_ruled("llama-silu-tied", ALL, "wina")
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    file, key = GGUFFile(copy / "m.gguf"), "hotcold.inputs.o.weights"
    exact = {int: np.uint32, float: np.float32}
    metadata = {k: exact.get(type(v), lambda same: same)(v) for k, v in file.metadata.items()}
    metadata[key] = metadata[key][:-1]
    if damage == "missing":
        del metadata[key]
    write_gguf(tmp_path / "m.gguf", metadata, [copied(tensor) for tensor in file.tensors.values()])
    shutil.move(tmp_path / "m.gguf", copy / "m.gguf")
    manifest = Manifest.read(copy)
    files = manifest.files | {"m.gguf": BundleFile.of(copy / "m.gguf", "dense")}
    storage.write_json(copy / "manifest.json", replace(manifest, files=files).to_json())
    (error,) = verify_bundle(copy)
    assert key in str(error)
    with pytest.raises(FormatError, match=r"inputs\.o\.weights"):
        Engine.load(copy, "dense", 1, n_ctx=64)


def test_bytes_are_those_of_inputs_that_count(make_ruled):
    _, bundle = make_ruled()
    tokens = len(IDS)
    for mode in ("dense", "exact"):
        engine = Engine.load(bundle, mode, 2, n_ctx=64)
        engine.prefill(IDS)
        kept = {site: n / (N_LAYERS * tokens) for site, (_, n) in engine.stats().inputs.items()}
        fired = engine.stats().fired.sum() / (N_LAYERS * tokens)
        gate_up = 2 * D_FF * kept["gate_up"] if mode == "dense" else D_FF * kept["gate_up"] + D_MODEL * fired
        found = engine.bytes_per_token()
        assert found["attention"] == pytest.approx(
            4 * N_LAYERS * (kept["qkv"] * (64 + 64 + 64) + kept["o"] * D_MODEL)  # rows of 32 are padded
        )
        assert found["ffn"] == pytest.approx(4 * N_LAYERS * (gate_up + D_MODEL * kept["down"]))


def test_a_share_is_not_left_out_beside_rules(make_ruled):
    _, bundle = make_ruled()
    with pytest.raises(InputError, match="by its own rules"):
        Engine.load(bundle, "exact", 1, n_ctx=64, input_sparsity=0.5)


def test_threads_agree_and_runs_are_bit_identical(make_ruled):
    _, bundle = make_ruled()
    for mode in ("dense", "exact"):
        runs = {n: [both(Engine.load(bundle, mode, n, n_ctx=64)) for _ in range(2)] for n in (1, 2, 5)}
        for first, second in runs.values():
            for one, other in zip(first, second, strict=True):
                np.testing.assert_array_equal(one, other)
            assert relative_error(first[0], runs[1][0][0]) < LIMIT


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_down_rows_of_small_values_are_not_read(isa, kind, tokens, threads):
    """They are NaN: what a neuron that fires gives is left out where it is below its threshold."""
    rng, d, n = np.random.default_rng(2), 96, 160
    model = _cpu.Model(
        n_layers=1, d_model=d, d_ff=n, n_heads=2, n_kv_heads=1, head_dim=48, n_vocab=32,
        norm_eps=1e-5, value=0, score=1, mode=1, threads=threads, weight_bytes=64 << 20, isa=isa,
    )  # fmt: skip
    for slot, rows in (("q", d), ("k", 48), ("v", 48), ("o", d)):
        model.set_panel(0, slot, 0, np.zeros(rows * d, np.float32).view(np.uint8), rows, d)
    for slot in ("attn_norm", "ffn_norm"):
        model.set_vector(0, slot, np.ones(d, np.float32))
    gate, up = (stored(kind, rng.standard_normal((n, d))) for _ in range(2))
    down, values = stored(kind, rng.standard_normal((n, d)))
    least = np.where(rng.random(n) < 0.5, 1e30, 0).astype(np.float32)
    poison(kind, down, np.flatnonzero(least))
    model.set_panel(0, "gate", TYPES[kind], gate[0].reshape(-1), n, d)
    model.set_bundles(0, None, 0, up[0].reshape(-1), TYPES[kind], down.reshape(-1), TYPES[kind])
    model.set_least_inputs(0, "down", least)
    x = rng.standard_normal((tokens, d)).astype(np.float32)
    found = x.copy()
    sequence = _cpu.Sequence(model, 16)
    _cpu.parts.run_layers(sequence, found, 0, 1, 3)
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
    a = np.maximum(normed @ gate[1].T, 0) * (normed @ up[1].T)
    expected = x + np.where(least > 0, 0, a) @ values
    assert relative_error(found, expected) < (1e-4 if kind in ("F32", "F16", "BF16") else 0.05)
    counts = sequence.stats()["inputs"]["down"]
    assert counts[1] == tokens * n
    assert counts[2] <= (least == 0).sum() * tokens
