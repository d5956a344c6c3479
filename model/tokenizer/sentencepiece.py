"""Byte-fallback BPE (Llama 2, Mistral) as the scored pieces of SentencePiece, which llama.cpp calls `llama`.

`tokenizer.json` orders merges by rank; llama.cpp joins the neighbors whose union has the highest
score. So a piece's score is minus the rank of the first merge that makes it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from hotcold.errors import UnsupportedError

__all__ = ["is_sentencepiece", "sentencepiece_metadata"]

_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6  # llama.cpp: enum llama_token_type
_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def is_sentencepiece(data: dict[str, Any]) -> bool:
    """Whether this `tokenizer.json` is a BPE that falls back to byte tokens."""
    model = data.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def sentencepiece_metadata(
    data: dict[str, Any], tokens: list[str], types: list[int], path: Path
) -> dict[str, Any]:
    """The metadata that differs from a byte-level BPE's: model, scores, types, and the space in front."""
    model = data["model"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": _scores(model["merges"], tokens, types),
        "tokenizer.ggml.token_type": np.asarray(_types(tokens, types, model.get("unk_token")), np.int32),
        "tokenizer.ggml.add_space_prefix": _space_prefix(data, path),
    }


def _scores(merges: list[Any], tokens: list[str], types: list[int]) -> np.ndarray:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    last = len(merges)
    return np.array(
        [
            -float(ranks.get(t, last)) if kind == _NORMAL else 0.0
            for t, kind in zip(tokens, types, strict=True)
        ],
        np.float32,
    )


def _types(tokens: list[str], types: list[int], unknown: str | None) -> list[int]:
    special = {token: _BYTE for token in tokens if _BYTE_TOKEN.fullmatch(token)}
    if unknown is not None:
        special[unknown] = _UNKNOWN
    return [special.get(token, kind) for token, kind in zip(tokens, types, strict=True)]


def _space_prefix(data: dict[str, Any], path: Path) -> bool:
    """Whether a space is put in front of the text. Old files have a normalizer for it, new ones Metaspace.

    Metaspace puts none if the text begins with one, llama.cpp does: such texts differ by one token.
    """
    normalizer, pre = data.get("normalizer") or {}, data.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step.get("type") for step in steps]
    if pre.get("type") == "Metaspace" and not kinds and not pre.get("split", True):
        return pre.get("prepend_scheme", "always") != "never"
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if not pre and kinds in (["Prepend", "Replace"], ["Replace"]) and steps[-1] == replaced:
        return kinds[0] == "Prepend"
    got = [*kinds, pre.get("type")]
    raise UnsupportedError(
        "unknown kind of byte-fallback tokenizer", where=path, got=got, expected="Llama 2's"
    )
