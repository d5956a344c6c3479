"""A tiny seeded ReLU model, exported as the product exports it, with predictors that know the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from hotcold import storage
from hotcold.convert.bundle.export import ExportOptions, export_bundle, export_file
from hotcold.model import checkpoint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.predictor.bundle import PredictorBundle

SENTENCE = "a sparse model computes only the neurons that fire and skips the many cold ones in between"
D_MODEL, D_FF, N_LAYERS = 64, 96, 2


def make_text(n_words: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    words = rng.choice(SENTENCE.split(), n_words)
    return "\n\n".join(" ".join(words[at : at + 40]) for at in range(0, n_words, 40)) + "\n"


def make_tokenizer(text: str | None = None, vocab_size: int = 300) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text or make_text(400)], trainer)
    return tokenizer


def make_model(vocab_size: int, **changes: object) -> LlamaForCausalLM:
    config = {
        "vocab_size": vocab_size,
        "hidden_size": D_MODEL,
        "intermediate_size": D_FF,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "hidden_act": "relu",
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    config = LlamaConfig(**config | changes)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def write_predictors(path: Path, model: LlamaForCausalLM, fingerprint: str, threshold: float) -> None:
    """Predictors whose logit is the gate, times rms(x): fc1 = [I; -I] keeps x whole through the ReLU."""
    eye, tensors = np.eye(D_MODEL, dtype=np.float32), {}
    for i, layer in enumerate(checkpoint.ffn_layers(model)):
        gate = (layer.gate.weight * layer.norm.weight).detach().numpy()
        tensors[f"layers.{i}.fc1.weight"] = np.concatenate([eye, -eye])
        tensors[f"layers.{i}.fc2.weight"] = np.concatenate([gate, -gate], axis=1)
        tensors[f"layers.{i}.firing_frequency"] = np.full(D_FF, 0.4, np.float32)
    storage.write_tensors(path / "model.safetensors", tensors)
    config = {"format": "hotcold-predictor", "version": 1, "model_fingerprint": fingerprint}
    config |= {"n_layers": N_LAYERS, "d_model": D_MODEL, "d_ff": D_FF, "target_recall": 1.0, "metrics": []}
    config |= {"ranks": [2 * D_MODEL] * N_LAYERS, "thresholds": [threshold] * N_LAYERS}
    storage.write_json(path / "config.json", config)


def write_bundle(folder: Path, threshold: float) -> Path:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer.get_vocab_size())
    checkpoint.save(model, tokenizer, folder / "model")
    fingerprint = checkpoint.fingerprint(str(folder / "model"))
    write_predictors(folder / "predictors", model, fingerprint, threshold)
    export_bundle(
        HFCheckpoint(folder / "model"),
        folder / "bundle",
        name="tiny",
        fingerprint=fingerprint,
        folder=folder / "model",
        predictors=PredictorBundle.load(folder / "predictors"),
        options=ExportOptions(quant="f16", predictor_quant="f32", attention_rows=True),
    )
    return folder / "bundle"


@pytest.fixture(scope="session", autouse=True)
def short_bandwidth_probes() -> Iterator[None]:
    """No test looks at how fast the memory is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hotcold.eval.roofline._PROBE_BYTES", 1 << 22)
        yield


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its predictors miss nothing."""
    return write_bundle(tmp_path_factory.mktemp("perfect"), threshold=0.0)


@pytest.fixture(scope="session")
def lossy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its predictors miss the neurons whose gates are barely open."""
    return write_bundle(tmp_path_factory.mktemp("lossy"), threshold=0.5)


@pytest.fixture(scope="session")
def make_dense_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a model with these changes of its config as a dense GGUF file in F16."""

    def make(**changes: object) -> Path:
        folder, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
        checkpoint.save(make_model(tokenizer.get_vocab_size(), **changes), tokenizer, folder)
        path, options = folder / "tiny.gguf", ExportOptions(quant="f16")
        export_file(HFCheckpoint(folder), path, "dense", name="tiny", fingerprint="0" * 64, options=options)
        return path

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(2000, seed=1))
    return path
