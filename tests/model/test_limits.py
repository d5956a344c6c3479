"""Ids and positions that a model has no rows for are errors with names, wherever they meet a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from hotcold import cli
from hotcold.errors import InputError
from hotcold.model.ffn_modules import MODEL_TYPES, learned_positions
from hotcold.model.limits import check_ids, check_tokenizer, check_window

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "ffn_dim": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 24,
    "word_embed_proj_dim": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
KNOWN = [name for name in MODEL_TYPES if name not in ("minicpm", "bamboo")]  # these are others by then


def make(model_type: str, **changes: object):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", KNOWN)
def test_learned_positions_are_where_transformers_ends(model_type):
    model = make(model_type)
    most = learned_positions(model)
    with torch.no_grad():
        model(torch.zeros(1, most or 60, dtype=torch.long))
        if most is not None:
            with pytest.raises(IndexError):
                model(torch.zeros(1, most + 1, dtype=torch.long))
            check_window(model, most)
            with pytest.raises(
                InputError,
                match=r"longer than the positions that the model has learned \(got 25, expected at most 24",
            ):
                check_window(model, most + 1)
    assert (most is not None) == (model_type == "opt")


@pytest.mark.parametrize("worst", [-1, 40])
def test_ids(worst):
    check_ids(np.array([0, 39]), 40)
    check_ids(np.array([], np.int64), 40)
    with pytest.raises(
        InputError, match=rf"token id outside of the vocabulary \(got {worst}, expected 0 to 39"
    ):
        check_ids(np.array([3, worst, 4]), 40)


def words(n: int) -> Tokenizer:
    """A token for each of `n` words, w0, w1, …"""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_tokenizers():
    check_tokenizer(words(40), make("llama"))
    with pytest.raises(InputError, match=r"more tokens than the model has embeddings \(got 41, expected 40"):
        check_tokenizer(words(41), make("llama"))


@pytest.fixture
def folder(tmp_path):
    """folder(tokens, model_type) -> an HF directory, and a text of all its words beside it."""

    def write(n_tokens, model_type="llama", **changes):
        make(model_type, **changes).save_pretrained(tmp_path / "m")
        words(n_tokens).save(str(tmp_path / "m" / "tokenizer.json"))
        lines = [
            " ".join(f"w{i}" for i in np.random.default_rng(n).permutation(n_tokens)) for n in range(4000)
        ]
        (tmp_path / "t.txt").write_text("\n\n".join(lines))
        return tmp_path / "m"

    return write


COMMANDS = {
    "collect-traces": ("--tokens", "400"),
    "sparsify": ("--tokens", "2048",),
    "shift-thresholds": ("--tokens", "256", "--window", "16"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_a_tokenizer_with_more_tokens(folder, tmp_path, capsys, command):
    model = folder(60, hidden_act="relu")
    arguments = ["--model", str(model), "--text", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out")]
    assert cli.main([command, *arguments, *COMMANDS[command]]) == 2
    assert "outside of the vocabulary" in (err := capsys.readouterr().err) or "more tokens than" in err


def test_the_card_refuses_it_too(folder, tmp_path, capsys):
    arguments = [
        "--dense",
        str(folder(60)),
        "--text",
        str(tmp_path / "t.txt"),
        "--tokens",
        "256",
        "--window",
        "16",
    ]
    assert cli.main(["sparsity-card", *arguments]) == 2
    assert "outside of the vocabulary" in capsys.readouterr().err


def test_traces_of_more_positions_than_there_are(folder, tmp_path, capsys):
    model = folder(30, "opt")
    arguments = ["--model", str(model), "--text", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out")]
    assert cli.main(["collect-traces", *arguments, "--tokens", "400"]) == 2
    assert "the window is longer than the positions that the model has learned" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(["collect-traces", *arguments, "--tokens", "400", "--window", "24"]) == 0
