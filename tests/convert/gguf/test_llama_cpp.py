"""The dense file computes in stock llama.cpp what transformers computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.gguf.llama_cpp import is_exact, write_llama_twin
from hotcold.errors import FormatError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model.checkpoint import fingerprint, load_tokenizer
from hotcold.model.huggingface import HFCheckpoint
from hotcold.model.spec import ModelSpec

llama_cpp = pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def dense_file(make_model, tmp_path_factory):
    def export(activation: str, quant: str = "f16", **kind: object):
        model = make_model(activation, **kind)
        out = tmp_path_factory.mktemp("bundle")
        export_bundle(
            HFCheckpoint(model), out, name="m", fingerprint=fingerprint(str(model)), folder=model,
            options=ExportOptions(quant),
        )  # fmt: skip
        return model, out / "m.gguf"

    return export


def llama_logits(path, ids) -> np.ndarray:
    engine = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    engine.eval(ids)
    logits = np.array(engine.scores[: len(ids)])
    engine.close()
    return logits


def torch_logits(model, ids) -> np.ndarray:
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return loaded(torch.tensor([ids])).logits[0].numpy()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


IDS = np.random.default_rng(3).integers(3, 390, 32).tolist()


@pytest.mark.parametrize("activation, tied", [("relu", True), ("relu", False), ("silu", True)])
@pytest.mark.parametrize("quant", ["f16", "f32"])
def test_logits_equal_those_of_transformers(dense_file, activation, tied, quant):
    model, path = dense_file(activation, quant, tie_word_embeddings=tied)
    assert GGUFFile(path).metadata["general.architecture"] == (
        "llama" if activation == "silu" else "smallthinker"
    )
    assert difference(llama_logits(path, IDS), torch_logits(model, IDS)) < 0.01


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("config", [{"head_dim": 32}, {"model_type": "mistral"}])
def test_other_heads_and_another_model_type(dense_file, activation, config):
    model, path = dense_file(activation, "f32", **config)
    assert difference(llama_logits(path, IDS), torch_logits(model, IDS)) < 0.01


def test_the_measure_sees_another_activation(dense_file):
    _, relu = dense_file("relu")
    model, _ = dense_file("silu")
    assert difference(llama_logits(relu, IDS), torch_logits(model, IDS)) > 0.05


def test_llama_cpp_splits_text_as_the_tokenizer_does(dense_file, corpus):
    model, path = dense_file("relu")
    tokenizer = load_tokenizer(str(model))
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in [*corpus, "<|im_start|>user\nHi 42!<|im_end|>\n", "   ", "a\n\n\n b\t\tc", "".join(corpus)]:
        assert engine.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text).ids
    engine.close()


def test_the_twin_holds_the_same_weights_as_a_plain_llama(dense_file, tmp_path):
    """The twin of an expert file is the file that a SiLU model of the same weights is written as."""
    _, relu = dense_file("relu")
    write_llama_twin(relu, tmp_path / "twin.gguf")
    twin = GGUFFile(tmp_path / "twin.gguf")
    _, silu = dense_file("silu")  # the same seed, so the same weights
    plain = GGUFFile(silu)
    assert set(twin.tensors) == set(plain.tensors)
    for name, tensor in plain.tensors.items():
        assert (twin.tensors[name].shape, twin.tensors[name].type) == (tensor.shape, tensor.type)
        assert twin.tensors[name].data.tobytes() == tensor.data.tobytes()
    assert difference(llama_logits(tmp_path / "twin.gguf", IDS), llama_logits(silu, IDS)) == 0


def test_the_twin_of_another_file_is_refused(dense_file, tmp_path):
    _, silu = dense_file("silu")
    with pytest.raises(UnsupportedError, match=r"not a one-expert smallthinker file \(got llama\)"):
        write_llama_twin(silu, tmp_path / "twin.gguf")
    (tmp_path / "x.gguf").write_bytes(b"no")
    with pytest.raises(FormatError):
        write_llama_twin(tmp_path / "x.gguf", tmp_path / "twin.gguf")
    assert not (tmp_path / "twin.gguf").exists()


def test_thresholds_and_drelu_are_not_claimed_exact(make_model):
    config = HFCheckpoint(make_model()).config
    assert is_exact(ModelSpec.from_config(config))
    assert is_exact(ModelSpec.from_config(config | {"hidden_act": "silu"}))
    assert is_exact(ModelSpec.from_config(config | {"hidden_act": "fatrelu"}))
    assert not is_exact(ModelSpec.from_config(config | {"hidden_act": "fatrelu_0.01"}))
    assert not is_exact(ModelSpec.from_config(config | {"hidden_act": "drelu"}))
