"""A tiny seeded ReLU Llama on disk, a text for it, and traces of it: real parts, small enough for seconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

D_MODEL, D_FF, N_LAYERS = 32, 44, 2
SALAD = "the a cold hot neuron fires when rain falls on seven old roofs and nobody counts them twice"


def write_text(path: Path, seed: int = 0, paragraphs: int = 400) -> Path:
    """Some 100 kB of word salad with blank lines, so that the reader finds many documents."""
    words = SALAD.split()
    rng = random.Random(seed)
    lines = (" ".join(rng.choices(words, k=60)) for _ in range(paragraphs))
    path.write_text("\n\n".join(lines))
    return path


def write_model(path: Path, seed: int = 0) -> Path:
    """Save a Llama of two layers with ReLU, and its byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    from hotcold import checkpoint

    vocabulary = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=D_MODEL, intermediate_size=D_FF, num_hidden_layers=N_LAYERS,
        num_attention_heads=2, num_key_value_heads=1, hidden_act="relu", max_position_embeddings=256,
    )  # fmt: skip
    checkpoint.save(LlamaForCausalLM(config), tokenizer, path)
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "salad.txt")


@pytest.fixture(scope="session")
def traces(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete traces of 3,000 tokens; tests must not change them (copy first)."""
    from hotcold.cli import main

    out = tmp_path_factory.mktemp("traces") / "traces"
    arguments = ["--model", str(model), "--text", str(text), "--tokens", "3000", "--out", str(out), "-t", "1"]
    assert main(["collect-traces", *arguments, "--shard-tokens", "700", "--window", "64"]) == 0
    return out
