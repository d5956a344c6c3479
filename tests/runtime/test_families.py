"""Every family of models: HF directory → export → the CPU runtime gives the logits of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from decoding import check_logits
from safetensors.numpy import load_file
from stored_rows import relative_error
from tiny_families import FAMILIES, IDS, SPARSE, write_model

from hotcold import storage
from hotcold.cli import main
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.bundle.verify import verify_bundle
from hotcold.convert.gguf.llama_cpp import is_exact
from hotcold.errors import InputError
from hotcold.files.gguf import GGUFFile
from hotcold.model import checkpoint
from hotcold.model.gguf_checkpoint import GGUFCheckpoint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.model.spec import ModelSpec
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.reference import ReferenceEngine


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_logits_are_those_of_transformers(name, make_bundle_of, logits_of):
    bundle = make_bundle_of(name)
    reference = ReferenceEngine.load(bundle, "dense", n_ctx=64)
    assert relative_error(reference.prefill(IDS, all_logits=True), logits_of(name)) < 1e-5
    engine = Engine.load(bundle, "dense", 2, n_ctx=64)
    check_logits(engine, IDS, logits_of(name), 1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_by_input_is_the_same_function(name, make_bundle_of, logits_of):
    """With no input left out: biases, head norms, rotary order and windows are those of the other layout."""
    engine = Engine.load(make_bundle_of(name), "dense", 2, n_ctx=64, input_sparsity=1e-6)
    check_logits(engine, IDS, logits_of(name), 1e-3)


@pytest.mark.parametrize("name", ["prosparse", "minicpm-s"])
def test_no_gate_is_near_a_threshold(name, make_family):
    model, gates = checkpoint.load_model(str(make_family(name))), []
    for layer in checkpoint.ffn_layers(model):
        layer.gate.register_forward_hook(lambda _, inputs, out: gates.append(out))
    with torch.no_grad():
        model(torch.from_numpy(IDS)[None])
    threshold = checkpoint.ffn_layers(model)[0].activation.threshold
    assert min((gate - threshold).abs().min() for gate in gates) > 0.002


@pytest.mark.parametrize("name", SPARSE)
def test_exact_is_dense_and_predicted_is_the_reference(name, make_bundle_of, logits_of):
    bundle = make_bundle_of(name)
    for mode, expected in (("exact", logits_of(name)), ("predicted", None)):
        reference = ReferenceEngine.load(bundle, mode, n_ctx=64)
        reference.audit = mode == "predicted"
        # the predictors jump at their thresholds, so here the oracle rounds its cache as the engine does
        reference.cache_dtype = torch.float16 if mode == "predicted" else torch.float32
        computed = reference.prefill(IDS, all_logits=True)
        engine = Engine.load(bundle, mode, 2, n_ctx=64)
        engine.audit = mode == "predicted"
        assert relative_error(engine.prefill(IDS, all_logits=True), computed) < 1e-3
        assert engine.stats().recall == pytest.approx(reference.stats().recall, abs=0.01, nan_ok=True)
        engine.reset()
        assert relative_error(np.stack([engine.decode(token) for token in IDS]), computed) < 1e-3
        if expected is not None:
            assert relative_error(computed, expected) < 1e-5
    assert relative_error(computed, logits_of(name)) > 0.01  # the random predictors did leave neurons out


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bundle_is_whole(name, make_bundle_of):
    assert verify_bundle(make_bundle_of(name)) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_agrees_where_it_has_the_function(name, make_bundle_of, logits_of):
    llama_cpp = pytest.importorskip("llama_cpp")
    bundle = make_bundle_of(name)
    spec = ModelSpec.from_config(json.loads((bundle / "config.json").read_text()))
    engine = llama_cpp.Llama(str(bundle / "m.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    engine.eval(IDS.tolist())
    error = relative_error(np.array(engine.scores[: len(IDS)]), logits_of(name))
    engine.close()
    differs = GGUFFile(bundle / "m.gguf").metadata.get("hotcold.llama_cpp_differences")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["llama_cpp_exact"] == is_exact(spec) == (differs is None)
    assert error < 5e-3 if is_exact(spec) else error > 5e-3


@pytest.mark.parametrize("name", ["llama-yarn", "mistral-window", "bamboo", "qwen2", "qwen3", "prosparse"])
def test_our_gguf_files_are_read_back_as_the_checkpoint(name, make_family, make_bundle_of):
    original = HFCheckpoint(make_family(name))
    spec = ModelSpec.from_config(original.config)
    for file in ("m.gguf", "m.powerinfer.gguf"):
        again = GGUFCheckpoint(make_bundle_of(name) / file)
        read = ModelSpec.from_config(again.config)
        assert (read.windows, read.activation, read.biases) == (spec.windows, spec.activation, spec.biases)
        np.testing.assert_allclose(read.rope.frequencies(16), spec.rope.frequencies(16), rtol=1e-6)
        assert again.names() == original.names()
        for tensor in original.names():
            np.testing.assert_array_equal(again.load(tensor), original.load(tensor))


def test_learned_positions_bound_the_context(make_bundle_of):
    with pytest.raises(InputError, match=r"so long a context \(got 65, expected at most 64\)"):
        Engine.load(make_bundle_of("opt"), "dense", 1, n_ctx=65)
    Engine.load(make_bundle_of("opt"), "exact", 1, n_ctx=64)


def test_opt_without_the_name_of_the_base_model(make_family, tmp_path):
    """As Meta's own checkpoints are; transformers reads them too."""
    tensors = load_file(make_family("opt") / "model.safetensors")
    write_model(tmp_path / "bare", FAMILIES["opt"])
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    storage.write_tensors(tmp_path / "bare" / "model.safetensors", bare, {"format": "pt"})
    source = HFCheckpoint(tmp_path / "bare")
    assert source.names() == set(tensors)
    np.testing.assert_array_equal(
        source.load("model.decoder.layers.1.fc1.weight"), tensors["model.decoder.layers.1.fc1.weight"]
    )
    loaded = checkpoint.load_model(str(tmp_path / "bare")).state_dict()
    np.testing.assert_array_equal(
        loaded["model.decoder.layers.1.fc1.weight"].numpy(), tensors["model.decoder.layers.1.fc1.weight"]
    )


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("qwen2", "model.layers.1.self_attn.v_proj.bias"),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight"),
        ("opt", "model.decoder.layers.0.fc2.bias"),
        ("opt", "model.decoder.embed_positions.weight"),
        ("falcon-40b-relu", "transformer.h.1.ln_attn.bias"),
    ],
)
def test_the_measure_sees_what_is_left_out(name, tensor, make_family, logits_of, tmp_path):
    model, changed = make_family(name), tmp_path / "changed"
    write_model(changed, FAMILIES[name])
    tensors = load_file(model / "model.safetensors")
    tensors[tensor] = (
        np.ones_like(tensors[tensor]) if "norm.weight" in tensor else np.zeros_like(tensors[tensor])
    )
    storage.write_tensors(changed / "model.safetensors", tensors, {"format": "pt"})
    export_bundle(
        HFCheckpoint(changed), tmp_path / "b", name="m", fingerprint="0" * 64, options=ExportOptions("f32")
    )
    engine = Engine.load(tmp_path / "b", "dense", 1, n_ctx=64)
    assert relative_error(engine.prefill(IDS, all_logits=True), logits_of(name)) > 0.01


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rng = tmp_path_factory.mktemp("text") / "text.jsonl", np.random.default_rng(0)
    words = [
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "東京",
        "naïve",
        "café",
        "0123",
        "🦊",
    ]
    path.write_text("\n".join(json.dumps({"text": " ".join(rng.choice(words, 20))}) for _ in range(300)))
    return path


_ALL_THE_WAY = [
    "llama-3-rope", "prosparse", "bamboo", "qwen2", "qwen3", "opt", "falcon-7b-relu", "falcon-40b-relu",
    "minicpm-s",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "lowrank-mlp") for name in _ALL_THE_WAY),
        ("prosparse", "svd"),
        ("bamboo", "svd"),
        ("opt", "svd"),
    ],
)
def test_the_commands_from_traces_to_perplexity(name, kind, make_family, bundle, text_file, tmp_path, capsys):
    """collect-traces → train-predictors → export → perplexity: what the predictors cost stays small."""
    model = tmp_path / "model"
    write_model(model, FAMILIES[name])
    bundle.tokenizer.save(str(model / "tokenizer.json"))
    paths = {part: str(tmp_path / part) for part in ("model", "traces", "predictors", "bundle")}
    commands = [
        ["collect-traces", "--model", paths["model"], "--text", str(text_file), "--tokens", "1500",
         "--window", "32", "--out", paths["traces"], "-t", "1"],
        ["train-predictors", "--traces", paths["traces"], "--out", paths["predictors"], "--kind", kind,
         *(["--model", paths["model"]] if kind == "svd" else ["--epochs", "2"])],
        ["export", "--model", paths["model"], "--predictors", paths["predictors"], "--out", paths["bundle"],
         "--quant", "f16"],
        ["perplexity", "--bundle", paths["bundle"], "--mode", "exact,predicted", "--reference", "dense",
         "--text", str(text_file), "--tokens", "128", "--window", "32", "-t", "1", "--json"],
    ]  # fmt: skip
    for command in commands:
        assert main(command) == 0, capsys.readouterr().err
    exact, predicted = (json.loads(line) for line in capsys.readouterr().out.splitlines()[-2:])
    assert exact["kl"] < 1e-3 and exact["same_top"] > 0.97
    assert predicted["kl"] < 0.5
