"""The tokenizer inside a GGUF file, as a `tokenizers.Tokenizer` that agrees with llama.cpp token for token.

transformers rebuilds such tokenizers too, but drops the pre-tokenizer that `tokenizer.ggml.pre` names and
falls back to GPT-2's, which splits digits and white space differently.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hotcold.errors import FormatError, UnsupportedError
from hotcold.model.tokenizer.gguf_sentencepiece import real_tokens, sentencepiece_tokenizer
from hotcold.model.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from hotcold.progress import log

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

    from hotcold.files.gguf import GGUFFile

__all__ = ["build_tokenizer", "token_of"]

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # GGUF `tokenizer.ggml.token_type`
# llama.cpp's defaults for SentencePiece files: which token, and that it is added.
_SENTENCEPIECE_BOS, _SENTENCEPIECE_EOS = (1, True), 2


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """Build the tokenizer that the metadata of a GGUF file describes: byte-level BPE or SentencePiece.

    Raises UnsupportedError for a vocabulary type or pre-tokenizer that is not known here, FormatError where
    the file holds no vocabulary.
    """
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    kind = file.find("tokenizer.ggml.model", str)
    if kind is None:
        raise FormatError("no vocabulary in this file", where=file.path, field="tokenizer.ggml.model")
    tokens = _strings(file, "tokens")
    if kind == "llama":
        tokenizer = sentencepiece_tokenizer(file, tokens)
        tokenizer.add_tokens(_added_tokens(file, tokens))
        _add_ends(tokenizer, file, tokens, _SENTENCEPIECE_BOS, _SENTENCEPIECE_EOS)
        return tokenizer
    if kind != "gpt2":
        raise UnsupportedError("unknown vocabulary type", where=file.path, got=kind, expected="gpt2 | llama")
    pre = _pre_tokenizer(file)
    if pre not in PRE_TOKENIZERS:
        expected = " | ".join(PRE_TOKENIZERS)
        raise UnsupportedError("unknown pre-tokenizer", where=file.path, got=pre, expected=expected)

    splitting = PRE_TOKENIZERS[pre]
    merges, vocabulary = _merges(file), real_tokens(tokens)
    if not merges:
        log(f"{file.path.name}: no tokenizer.ggml.merges; every byte becomes a token")
    try:
        model = BPE(vocabulary, merges, ignore_merges=splitting.whole_words)
    except Exception as error:  # tokenizers raises bare Exceptions, here of merges without a token
        raise FormatError(f"merges: {error}", where=file.path, field="tokenizer.ggml.merges") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitting.build(vocabulary)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added_tokens(file, tokens))
    _add_ends(tokenizer, file, tokens, (None, splitting.adds_bos), None)
    return tokenizer


def _pre_tokenizer(file: GGUFFile) -> str:
    """The name of the splitting rules; without one in the file, llama.cpp's default, with a warning."""
    if file.magic == "PWRI":  # from an old llama.cpp that had only one
        return file.find("tokenizer.ggml.pre", str, "gpt-2")
    pre = file.find("tokenizer.ggml.pre", str)
    if pre is None:
        log(f"{file.path.name}: no tokenizer.ggml.pre: text is split as llama.cpp does by default, which may "
            "not be the model's way; a newer conversion of the model has it")  # fmt: skip
    return "default" if pre is None else pre


def _strings(file: GGUFFile, name: str) -> list[str]:
    """An array of strings, empty if the file has none."""
    return file.find(f"tokenizer.ggml.{name}", list, [])


def _merges(file: GGUFFile) -> list[tuple[str, str]]:
    merges = [merge.split(" ", 1) for merge in _strings(file, "merges")]
    if odd := [merge for merge in merges if len(merge) != 2]:
        field = "tokenizer.ggml.merges"
        raise FormatError("a merge must have two pieces", where=file.path, field=field, got=repr(odd[0][0]))
    return [(left, right) for left, right in merges]


def _added_tokens(file: GGUFFile, tokens: list[str]) -> list[AddedToken]:
    """Tokens that are matched as they stand, before any splitting; control tokens are the special ones."""
    from tokenizers import AddedToken

    types = file.find("tokenizer.ggml.token_type", np.ndarray, np.empty(0))
    if len(types) not in (0, len(tokens)):
        field = "tokenizer.ggml.token_type"
        raise FormatError("wrong number of token types", where=file.path, field=field, expected=len(tokens))
    return [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _add_ends(
    tokenizer: Tokenizer, file: GGUFFile, tokens: list[str], bos: tuple[int | None, bool], eos: int | None
) -> None:
    """Have every text begin and end with the tokens that the file says; `bos` (and whether it is added) and
    `eos` are for what it does not say."""
    from tokenizers.processors import TemplateProcessing

    before = _end(file, tokens, "bos", *bos)
    after = _end(file, tokens, "eos", eos, False)
    if before or after:
        template = [*(token for token, _ in before), "$A", *(token for token, _ in after)]
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=before + after)


def _end(
    file: GGUFFile, tokens: list[str], name: str, number: int | None, added: bool
) -> list[tuple[str, int]]:
    """The token that is added at one end of a text, if any."""
    field = f"tokenizer.ggml.{name}_token_id"
    number = file.find(field, int, number)
    if number is None or not file.find(f"tokenizer.ggml.add_{name}_token", bool, added):
        return []
    return [(token_of(number, tokens, file.path, field), number)]


def token_of(number: object, tokens: list[str], path: Path, field: str) -> str:
    """The token of a number that metadata gives; FormatError if there is none."""
    if type(number) is not int or not 0 <= number < len(tokens):
        expected = f"below {len(tokens)}"
        raise FormatError("no such token", where=path, field=field, got=number, expected=expected)
    return tokens[number]
