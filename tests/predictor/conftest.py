"""A tiny seeded ReLU Llama on disk, a text for it, and traces of it: real parts, small enough for seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

D_MODEL, D_FF, N_LAYERS = 32, 44, 2
SALAD = "the a cold hot neuron fires when rain falls on seven old roofs and nobody counts them twice"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _write_text(path: Path, seed: int = 0, paragraphs: int = 400) -> Path:
    """Some 100 kB of word salad with blank lines, so that the reader finds many documents."""
    rng = random.Random(seed)
    path.write_text("\n\n".join(" ".join(rng.choices(SALAD.split(), k=60)) for _ in range(paragraphs)))
    return path


def _write_model(path: Path, seed: int = 0) -> Path:
    """Save a Llama of two layers with ReLU, and its byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    from hotcold.model import checkpoint

    vocabulary = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=D_MODEL, intermediate_size=D_FF, num_hidden_layers=N_LAYERS,
        num_attention_heads=2, num_key_value_heads=1, hidden_act="relu", max_position_embeddings=256,
        initializer_range=0.2,  # far from linear, so that tokens differ
    )  # fmt: skip
    checkpoint.save(LlamaForCausalLM(config), tokenizer, path)
    return path


def _collect_arguments(model: Path, text: Path, out: Path, tokens: int = 3000) -> list[str]:
    """A command line of many small shards."""
    names = {"--model": model, "--text": text, "--tokens": tokens, "--out": out, "--shard-tokens": 200}
    pairs = [str(item) for pair in {**names, "--window": 64, "-t": 1}.items() for item in pair]
    return ["collect-traces", *pairs]


def _snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_text(tmp_path_factory.mktemp("text") / "salad.txt")


@pytest.fixture(scope="session")
def traces(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete traces of 3,000 tokens in 15 shards; tests must not change them (copy first)."""
    from hotcold.cli import main

    out = tmp_path_factory.mktemp("traces") / "traces"
    assert main(_collect_arguments(model, text, out)) == 0
    return out


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """`write_model(path, seed=0)`: save another tiny model."""
    return _write_model


@pytest.fixture(scope="session")
def write_text() -> Callable[..., Path]:
    """`write_text(path, seed=0, paragraphs=400)`: save another text."""
    return _write_text


@pytest.fixture(scope="session")
def collect_arguments() -> Callable[..., list[str]]:
    """`collect_arguments(model, text, out, tokens=3000)`: a command line."""
    return _collect_arguments


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """`snapshot(folder)`: every file below it."""
    return _snapshot
