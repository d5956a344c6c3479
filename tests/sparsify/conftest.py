"""A tiny dense Llama with its own tokenizer and some text to train on."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM

from hotcold.model import checkpoint

SENTENCES = [
    "Alice opened the door and counted {n} lamps along the river.",
    "Bob never sold more than {n} loaves before the rain began.",
    "Carol wrote {n} letters, and each of them was lost at sea.",
    "When Derek climbed the tower he saw {n} ships under the moon.",
]


def make_model(seed: int = 0, n_vocab: int = 400) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=n_vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,  # so that the layers matter and there is something to distil
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def dense() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    lines = (SENTENCES[n % 4].format(n=n * 37 % 101) for n in range(3000))
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture(scope="session")
def tokenizer(text_file) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train([str(text_file)], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    checkpoint.save(make_model(n_vocab=tokenizer.get_vocab_size()), tokenizer, folder)
    return folder
