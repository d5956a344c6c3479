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

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["build_tokenizer"]

_CONTROL, _USER_DEFINED = 3, 4  # GGUF `tokenizer.ggml.token_type`

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
    """Build the byte-level BPE tokenizer that the metadata of the GGUF file `path` describes.

    Raises UnsupportedError for a vocabulary type or pre-tokenizer that is not known here, FormatError where
    the file holds no vocabulary.
    """
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind is None:
        raise FormatError("no vocabulary in this file", where=path, field="tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedError("unknown vocabulary type", where=path, got=kind, expected="gpt2")
    if pre not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            "unknown pre-tokenizer", where=path, got=pre, expected=" | ".join(_PRE_TOKENIZERS)
        )

    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added_tokens(metadata, tokens))
    _add_bos(tokenizer, metadata, tokens)
    return tokenizer


def _added_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> list[AddedToken]:
    """Tokens that are matched as they stand, before any splitting; control tokens are the special ones."""
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type", [])
    return [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _add_bos(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    from tokenizers.processors import TemplateProcessing

    number = metadata.get("tokenizer.ggml.bos_token_id")
    if number is not None and metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = tokens[number]
        tokenizer.post_processor = TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, number)])
