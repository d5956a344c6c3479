"""The SentencePiece vocabulary inside a GGUF file as a `tokenizers.Tokenizer`.

Llama 2's, Mistral's and all of PowerInfer's files have one (`tokenizer.ggml.model` = `llama`): pieces with
scores. llama.cpp joins the two neighbors whose union has the highest score, until none is left; a
byte-fallback BPE does the same if its merges are all pairs that make a piece, in the order of falling
scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotcold.errors import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from hotcold.files.gguf import GGUFFile

__all__ = ["real_tokens", "sentencepiece_tokenizer"]

_NORMAL, _UNKNOWN = 1, 2  # llama.cpp: enum llama_token_type
_LONGEST = 512  # longest piece, in characters, to search merges for: the work grows with the square
_SPACE = "▁"


def sentencepiece_tokenizer(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    """Without added tokens and post-processor. FormatError if scores or types do not fit the tokens."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    scores, types = (_per_token(file, name, tokens) for name in ("scores", "token_type"))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    vocabulary = real_tokens(tokens)
    merges = _merges(tokens, scores, types, vocabulary)
    model = BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = file.find("tokenizer.ggml.add_space_prefix", bool, True)
    prepend = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    plain = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*plain, *strip])
    return tokenizer


def real_tokens(tokens: list[str]) -> dict[str, int]:
    """Tokens and their numbers, without the fillers that GGUF has if there are more embeddings than
    tokens."""
    return {token: number for number, token in enumerate(tokens) if token != f"[PAD{number}]"}


def _per_token(file: GGUFFile, name: str, tokens: list[str]) -> list[float]:
    field = f"tokenizer.ggml.{name}"
    values = file.find(field, np.ndarray, np.empty(0))
    if len(values) != len(tokens):
        raise FormatError("not one number per token", where=file.path, field=field, expected=len(tokens))
    return values.tolist()


def _merges(
    tokens: list[str], scores: list[float], types: list[float], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, best pieces first; of equal ones the lower number."""
    pieces = [n for n, kind in enumerate(types) if kind == _NORMAL and len(tokens[n]) <= _LONGEST]
    pieces.sort(key=lambda number: -scores[number])
    splits = (
        (tokens[number][:i], tokens[number][i:]) for number in pieces for i in range(1, len(tokens[number]))
    )
    return [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
