"""The tokenizer inside a GGUF file, as a `tokenizers.Tokenizer` that agrees with llama.cpp token for token.

transformers rebuilds such tokenizers too, but drops the pre-tokenizer that `tokenizer.ggml.pre` names and
falls back to GPT-2's, which splits digits and white space otherwise. The patterns are those of llama.cpp's
`llama-vocab.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotcold.errors import FormatError, UnsupportedError
from hotcold.gguf_sentencepiece import real_tokens, sentencepiece_tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["build_tokenizer", "token_of"]

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # GGUF `tokenizer.ggml.token_type`
# What llama.cpp takes where a SentencePiece file does not say, as old ones do not.
_SENTENCEPIECE_DEFAULTS = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True}

_LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2() -> PreTokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> PreTokenizer:
    from tokenizers.pre_tokenizers import Digits, Sequence

    return Sequence([Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> PreTokenizer:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": lambda: _split(_LLAMA3),
    "llama3": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}
# llama.cpp takes a whole word that is in the vocabulary before it tries merges.
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3"}


def build_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """Build the tokenizer that the metadata of the GGUF file `path` describes: byte-level BPE or
    SentencePiece.

    Raises UnsupportedError for a vocabulary type or pre-tokenizer that is not known here, FormatError where
    the file holds no vocabulary.
    """
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind is None:
        raise FormatError("no vocabulary in this file", where=path, field="tokenizer.ggml.model")
    if kind == "llama":
        tokens = _strings(metadata, "tokens", path)
        tokenizer = sentencepiece_tokenizer(metadata, tokens, path)
        tokenizer.add_tokens(_added_tokens(metadata, tokens, path))
        _add_bos(tokenizer, _SENTENCEPIECE_DEFAULTS | dict(metadata), tokens, path)
        return tokenizer
    if kind != "gpt2":
        raise UnsupportedError("unknown vocabulary type", where=path, got=kind, expected="gpt2 | llama")
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            "unknown pre-tokenizer", where=path, got=pre, expected=" | ".join(_PRE_TOKENIZERS)
        )

    tokens, merges = _strings(metadata, "tokens", path), _merges(metadata, path)
    vocabulary = real_tokens(tokens)
    try:
        model = BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    except Exception as error:  # tokenizers raises bare Exceptions, here of merges without a token
        raise FormatError(f"merges: {error}", where=path, field="tokenizer.ggml.merges") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added_tokens(metadata, tokens, path))
    _add_bos(tokenizer, metadata, tokens, path)
    return tokenizer


def _strings(metadata: Mapping[str, Any], name: str, path: Path) -> list[str]:
    """An array of strings, empty where the file has none. An empty array has no type to hold against it."""
    values = metadata.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(values, list):
        got = type(values).__name__
        raise FormatError(
            "not an array of strings", where=path, field=f"tokenizer.ggml.{name}", got=got, expected="list"
        )
    return values


def _merges(metadata: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    merges = [merge.split(" ", 1) for merge in _strings(metadata, "merges", path)]
    if odd := [merge for merge in merges if len(merge) != 2]:
        field = "tokenizer.ggml.merges"
        raise FormatError("a merge is two pieces", where=path, field=field, got=repr(odd[0][0]))
    return [(left, right) for left, right in merges]


def _added_tokens(metadata: Mapping[str, Any], tokens: list[str], path: Path) -> list[AddedToken]:
    """Tokens that are matched as they stand, before any splitting; control tokens are the special ones."""
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type", [])
    if isinstance(types, str) or not hasattr(types, "__len__") or len(types) not in (0, len(tokens)):
        field = "tokenizer.ggml.token_type"
        raise FormatError("not one type per token", where=path, field=field, expected=len(tokens))
    return [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _add_bos(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str], path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    number = metadata.get("tokenizer.ggml.bos_token_id")
    if number is not None and metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = token_of(number, tokens, path, "tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, number)])


def token_of(number: object, tokens: list[str], path: Path, field: str) -> str:
    """The token of a number that metadata gives; FormatError where there is none."""
    if type(number) is not int or not 0 <= number < len(tokens):
        expected = f"below {len(tokens)}"
        raise FormatError("no such token", where=path, field=field, got=number, expected=expected)
    return tokens[number]
