"""`tokenizer.json` as the `tokenizer.ggml.*` metadata of GGUF, so that llama.cpp splits text the same way.

llama.cpp identifies pre-tokenizers by name (`tokenizer.ggml.pre`) and has their rules in its code. Here
the name is found from the structure of the pre-tokenizer; one that llama.cpp does not have is refused,
not guessed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hotcold.errors import FormatError, InputError, UnsupportedError
from hotcold.files.json import read_json
from hotcold.model.tokenizer.pre_tokenizers import PRE_TOKENIZERS, name_of
from hotcold.model.tokenizer.sentencepiece import is_sentencepiece, sentencepiece_metadata
from hotcold.model.tokenizer.special_tokens import hf_settings, special_metadata, template_files
from hotcold.model.tokenizer.tokenizer_json import added_ids, read_tokenizer
from hotcold.progress import log

__all__ = ["tokenizer_files", "tokenizer_metadata"]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp: enum llama_token_type
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of an HF directory that belong to its tokenizer."""
    return [path for name in _FILES if (path := folder / name).is_file()] + template_files(folder)


def tokenizer_metadata(folder: Path, n_vocab: int, config: dict[str, Any]) -> dict[str, Any]:
    """The `tokenizer.*` metadata for a model of `n_vocab` embeddings, whose `config.json` is `config`.

    Raises InputError or FormatError for missing or broken files, UnsupportedError for a tokenizer that is
    not a BPE that llama.cpp also has.
    """
    path = folder / "tokenizer.json"
    tokenizer = _load(path)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= n_vocab:
        got = largest + 1
        raise FormatError("more tokens than embeddings", where=path, field="vocab", got=got, expected=n_vocab)
    data = json.loads(tokenizer.to_str())  # checked, complete, and in today's spelling
    tokens, types = _vocabulary(data, n_vocab, path)
    settings = hf_settings(folder)
    convert = sentencepiece_metadata if is_sentencepiece(data) else _byte_level_metadata
    metadata = convert(data, tokens, types, path)
    metadata |= special_metadata(settings, config, _generation(folder), tokens)
    return metadata | _added_ends(tokenizer, path)


def _load(path: Path) -> Tokenizer:
    if not path.is_file():
        raise InputError("no such file", where=path)
    return read_tokenizer(path)


def _byte_level_metadata(
    data: dict[str, Any], tokens: list[str], types: list[int], path: Path
) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(data, path),
        "tokenizer.ggml.tokens": tokens,
        # PowerInfer insists on scores; a byte-level BPE has none
        "tokenizer.ggml.scores": np.zeros(len(tokens), np.float32),
        "tokenizer.ggml.token_type": np.asarray(types, np.int32),
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]],
        "tokenizer.ggml.add_space_prefix": False,
    }


def _vocabulary(data: dict[str, Any], n_vocab: int, path: Path) -> tuple[list[str], list[int]]:
    model = data["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError("unknown tokenizer model", where=path, got=model.get("type"), expected="BPE")
    added = {entry["id"]: entry for entry in data.get("added_tokens", [])}
    names = {i: token for token, i in model["vocab"].items()}
    names |= {i: entry["content"] for i, entry in added.items()}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(n_vocab)]
    return tokens, [_type(i, names, added) for i in range(n_vocab)]


def _type(i: int, names: dict[int, str], added: dict[int, dict[str, Any]]) -> int:
    if i in added:
        return _CONTROL if added[i].get("special") else _USER_DEFINED
    return _NORMAL if i in names else _UNUSED


def _pre_tokenizer(data: dict[str, Any], path: Path) -> str:
    if data.get("normalizer"):
        got = data["normalizer"].get("type")
        if got not in ("NFC", None):  # llama.cpp leaves NFC out for Qwen, and so do we
            raise UnsupportedError("normalizer", where=path, got=got, expected="none")
    model, pre = data["model"], data.get("pre_tokenizer") or {}
    whole_words = model.get("ignore_merges", False)
    name = name_of(pre, model["vocab"], whole_words=whole_words)
    if name and PRE_TOKENIZERS[name].whole_words != whole_words:
        log(f"{path.name}: llama.cpp's {name} sets ignore_merges differently, so words may split differently")
    if name is None:
        expected = " | ".join(PRE_TOKENIZERS)
        raise UnsupportedError("llama.cpp has no such pre-tokenizer", where=path, got=pre, expected=expected)
    return name


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _added_ends(tokenizer: Tokenizer, path: Path) -> dict[str, bool]:
    """Whether encoding puts a token before the text or after it."""
    try:
        before, after = added_ids(tokenizer)
    except UnsupportedError as error:
        raise UnsupportedError(error.what, where=path) from error
    except Exception as error:  # tokenizers raises bare Exceptions
        raise FormatError(f"the tokenizer cannot encode: {error}", where=path) from error
    return {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}
