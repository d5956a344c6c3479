"""The oracle itself is checked against transformers and against formulas written out here a second time."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from hotcold.convert.bundle.manifest import MANIFEST, BundleFile, Manifest
from hotcold.errors import FormatError, InputError, UnsupportedError
from hotcold.runtime.reference import ReferenceEngine

IDS = [5, 77, 123, 9, 300, 42, 42, 7, 250, 11, 19, 201]


def logits_of_transformers(bundle, ids=IDS):
    with torch.no_grad():
        return bundle.model(torch.tensor([ids])).logits[0].numpy()


def ffn_inputs(bundle, ids=IDS):
    """Per layer: the residual before the FFN norm, and the values of act(gate)·up, both from transformers."""
    residuals, values, handles = [], [], []
    for layer in bundle.model.model.layers:
        norm, down = layer.post_attention_layernorm, layer.mlp.down_proj
        handles.append(norm.register_forward_pre_hook(lambda _, args: residuals.append(args[0][0])))
        handles.append(down.register_forward_pre_hook(lambda _, args: values.append(args[0][0])))
    logits_of_transformers(bundle, ids)
    for handle in handles:
        handle.remove()
    return residuals, values


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_equals_transformers(bundle, mode):
    engine = ReferenceEngine.load(bundle.path, mode)
    logits = engine.prefill(IDS, all_logits=True)
    np.testing.assert_allclose(logits, logits_of_transformers(bundle), atol=2e-4)


def test_silu_model_in_a_dense_llama_file(make_bundle):
    bundle = make_bundle(activation="silu")
    logits = ReferenceEngine.load(bundle.path, "dense").prefill(IDS, all_logits=True)
    np.testing.assert_allclose(logits, logits_of_transformers(bundle), atol=2e-4)


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantized_weights(make_bundle, quant):
    bundle = make_bundle(quant=quant)
    logits = ReferenceEngine.load(bundle.path, "exact").prefill(IDS, all_logits=True)
    np.testing.assert_allclose(logits, logits_of_transformers(bundle), atol=2e-4)


@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
def test_a_block_equals_token_by_token(bundle, mode):
    engine = ReferenceEngine.load(bundle.path, mode)
    block = engine.prefill(IDS, all_logits=True)
    block_stats = engine.stats()
    engine.reset()
    engine.reset_stats()
    single = np.stack([engine.decode(token) for token in IDS])
    np.testing.assert_allclose(single, block, atol=1e-4)
    assert engine.position == len(IDS)
    np.testing.assert_array_equal(engine.stats().fired, block_stats.fired)
    np.testing.assert_array_equal(engine.stats().predicted, block_stats.predicted)


def test_prefill_in_two_pieces_and_last_logits(bundle):
    engine = ReferenceEngine.load(bundle.path, "predicted")
    whole = engine.prefill(IDS, all_logits=True)
    engine.reset()
    engine.prefill(IDS[:5])
    np.testing.assert_allclose(engine.prefill(IDS[5:]), whole[-1], atol=1e-4)


def test_threshold_of_minus_infinity_equals_exact(make_bundle):
    bundle = make_bundle(predictor_threshold=float("-inf"))
    exact = ReferenceEngine.load(bundle.path, "exact").prefill(IDS, all_logits=True)
    predicted = ReferenceEngine.load(bundle.path, "predicted").prefill(IDS, all_logits=True)
    np.testing.assert_array_equal(predicted, exact)


def test_without_predicted_or_hot_neurons_only_the_first_token_has_an_ffn(make_bundle):
    bundle = make_bundle(predictor_threshold=float("inf"), hot=((), ()))
    engine = ReferenceEngine.load(bundle.path, "predicted")
    logits = engine.prefill(IDS, all_logits=True)
    np.testing.assert_array_equal(engine.stats().predicted, [bundle.recipe.d_ff] * 2)
    for layer in bundle.model.model.layers:
        layer.mlp.down_proj.register_forward_hook(
            lambda _, args, y: y * (torch.arange(y.shape[1]) == 0)[:, None]
        )
    np.testing.assert_allclose(logits, logits_of_transformers(bundle), atol=2e-4)


def test_first_layer_computes_hot_neurons_and_those_above_the_threshold(make_bundle):
    """Layer 0 sees the same residual in every mode: its counts follow from transformers and the formula."""
    bundle = make_bundle(predictor_threshold=3.0)
    residuals, values = ffn_inputs(bundle)
    fc1, fc2 = bundle.predictors[0]
    chosen = np.maximum(residuals[0].numpy() @ fc1.T, 0) @ fc2.T >= 3.0
    chosen[:, list(bundle.recipe.hot[0])] = True
    chosen[0] = True
    fires = values[0].numpy() != 0
    engine = ReferenceEngine.load(bundle.path, "predicted")
    engine.audit = True
    engine.prefill(IDS)
    stats = engine.stats()
    assert 0 < chosen.sum() < chosen.size
    assert stats.predicted[0] == chosen.sum()
    assert stats.fired[0] == (fires & chosen).sum()
    assert stats.missed[0] == (fires & ~chosen).sum()


def test_exact_mode_counts_what_fires(bundle):
    _, values = ffn_inputs(bundle)
    engine = ReferenceEngine.load(bundle.path, "exact")
    engine.prefill(IDS)
    stats = engine.stats()
    np.testing.assert_array_equal(stats.fired, [int((value != 0).sum()) for value in values])
    np.testing.assert_array_equal(stats.predicted, [len(IDS) * bundle.recipe.d_ff] * 2)
    assert stats.tokens == len(IDS) and stats.d_ff == bundle.recipe.d_ff


@pytest.mark.parametrize("activation", ["fatrelu", "drelu"])
def test_other_gated_activations(make_bundle, activation):
    bundle = make_bundle(activation=activation, activation_threshold=0.5)
    for layer in bundle.model.model.layers:
        mlp = layer.mlp

        def forward(h, mlp=mlp):
            gate, up = mlp.gate_proj(h), mlp.up_proj(h)
            a = gate * (gate >= 0.5) * up if activation == "fatrelu" else gate.clamp(min=0) * up.clamp(min=0)
            return mlp.down_proj(a)

        mlp.forward = forward
    wanted = logits_of_transformers(bundle)
    for layer in bundle.model.model.layers:
        del layer.mlp.forward
    assert np.abs(wanted - logits_of_transformers(bundle)).max() > 0.1
    logits = ReferenceEngine.load(bundle.path, "exact").prefill(IDS, all_logits=True)
    np.testing.assert_allclose(logits, wanted, atol=2e-4)


@pytest.mark.parametrize(
    "ids,message",
    [
        ([], "no tokens given"),
        ([1, -1], "token id outside of the vocabulary (got -1, expected 0 to 319)"),
        ([320], "token id outside of the vocabulary (got 320, expected 0 to 319)"),
        ([1] * 9, "the context is full (got 9, expected at most 8); raise it with -c"),
    ],
)
def test_refused_tokens(bundle, ids, message):
    engine = ReferenceEngine.load(bundle.path, "exact", n_ctx=8)
    with pytest.raises(InputError) as error:
        engine.prefill(ids)
    assert str(error.value) == message and engine.position == 0


def test_refused_bundles(bundle, make_bundle, tmp_path):
    with pytest.raises(InputError, match=r"unknown mode \(got fast, expected auto, dense"):
        ReferenceEngine.load(bundle.path, "fast")
    with pytest.raises(InputError, match=r"not a bundle: no manifest\.json"):
        ReferenceEngine.load(tmp_path, "exact")
    with pytest.raises(InputError, match="the bundle has no sparse file"):
        ReferenceEngine.load(make_bundle(activation="silu").path, "predicted")


def broken_copy(bundle, folder, **changes):
    """A copy of the bundle whose manifest points to the wrong file, or whose file lacks something."""
    shutil.copytree(bundle.path, folder)
    manifest = Manifest.read(folder)
    files = {
        name: BundleFile.of(folder / name, changes.get(name, old.role))
        for name, old in manifest.files.items()
    }
    (folder / MANIFEST).write_text(json.dumps(replace(manifest, files=files).to_json()))
    return folder


def text(key, value):
    """The bytes of a string in GGUF metadata."""
    return key.encode() + struct.pack("<IQ", 8, len(value)) + value.encode()


def number(key, value):
    """The bytes of an unsigned 32-bit number in GGUF metadata."""
    return key.encode() + struct.pack("<II", 4, value)


def test_predicted_mode_needs_predictors(bundle, tmp_path):
    swapped = broken_copy(
        bundle, tmp_path / "swapped", **{"tiny.gguf": "sparse", "tiny.powerinfer.gguf": "dense"}
    )
    with pytest.raises(UnsupportedError, match="no predictors in this file; use --mode exact"):
        ReferenceEngine.load(swapped, "predicted")


def test_unknown_activation(make_bundle):
    unknown = make_bundle(activation="mish")
    with pytest.raises(UnsupportedError, match=r"unknown activation \(got mish, expected relu"):
        ReferenceEngine.load(unknown.path, "exact")


@pytest.mark.parametrize(
    "old,new,kind,message",
    [
        (
            text("general.architecture", "llama"),
            text("general.architecture", "zebra"),
            UnsupportedError,
            "zebra",
        ),
        (
            b"blk.0.ffn_up.",
            b"blk.0.ffn_xx.",
            FormatError,
            "tiny.powerinfer.gguf, blk.0.ffn_up.weight: missing",
        ),
        (
            number("llama.block_count", 2),
            number("llama.block_count", 1),
            FormatError,
            "wrong number of layers",
        ),
    ],
)
def test_refused_files(bundle, tmp_path, old, new, kind, message):
    folder = broken_copy(bundle, tmp_path / "broken")
    path = folder / "tiny.powerinfer.gguf"
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(kind, match=message):
        ReferenceEngine.load(folder, "exact")
