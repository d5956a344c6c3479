"""Tiny seeded models with a real tokenizer, and predictors for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hotcold import storage
from hotcold.model.checkpoint import fingerprint

N_LAYERS, D_MODEL, D_FF, N_VOCAB, RANK = 3, 64, 160, 400, 32
CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "In 1984 we'll count 12345 sheep; they've gone, don't they? ",
    "naïve café — 你好, мир! 🎉\n\tdef f(x):\r\n    return x**2  # square\n\n\n",
]


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel as Decoder

    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    tokenizer.decoder = Decoder()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB - 5, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def _model(activation: str, *, seed: int = 0, **config: object):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    values = {
        "model_type": "llama", "vocab_size": N_VOCAB, "hidden_size": D_MODEL, "intermediate_size": D_FF,
        "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 128, "hidden_act": activation, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
        "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values | config))
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """make_model("relu", head_dim=32) -> the HF directory of a tiny Llama, made once per set of arguments."""
    made: dict[tuple, Path] = {}

    def make(activation: str = "relu", **config: object) -> Path:
        key = (activation, *sorted(config.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            _model(activation, **config).save_pretrained(folder)
            (folder / "tokenizer.json").write_text(_tokenizer().to_str())
            settings = {"eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}"}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_predictors(tmp_path_factory):
    """make_predictors(model_folder) -> a random predictor bundle for that model."""

    def make(model: Path, **changes: object) -> Path:
        folder = tmp_path_factory.mktemp("predictors")
        rng = np.random.default_rng(0)
        tensors = {}
        for layer in range(N_LAYERS):
            tensors[f"layers.{layer}.fc1.weight"] = rng.standard_normal((RANK, D_MODEL)).astype(np.float32)
            tensors[f"layers.{layer}.fc2.weight"] = rng.standard_normal((D_FF, RANK)).astype(np.float32)
            tensors[f"layers.{layer}.firing_frequency"] = np.linspace(0, 1, D_FF, dtype=np.float32)
        config = {
            "format": "hotcold-predictor", "version": 1, "model_fingerprint": fingerprint(str(model)),
            "n_layers": N_LAYERS, "d_model": D_MODEL, "d_ff": D_FF, "ranks": [RANK] * N_LAYERS,
            "thresholds": [0.5, -0.25, 0.0], "target_recall": 0.95, "metrics": [],
        }  # fmt: skip
        storage.write_tensors(folder / "model.safetensors", tensors)
        storage.write_json(folder / "config.json", config | changes)
        return folder

    return make


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Texts with digits, contractions, other scripts and odd white space."""
    return CORPUS
