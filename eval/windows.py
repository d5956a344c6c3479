"""The tokens that every engine is measured on: one text, cut once, the same ids for all.

A text becomes one stream of token ids, and the stream is cut into windows of a fixed length; what is left
over is dropped. Each window starts from an empty context, and every position after its first is scored. No
BOS token is put in unless the tokenizer itself adds one; then each window begins with it, unscored.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hotcold import text
from hotcold.errors import InputError
from hotcold.tokenizer_file import added_ids, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["load_tokenizer", "text_ids", "windows"]

_CHARS_PER_TOKEN = 16  # more than any tokenizer packs into a token on average


def load_tokenizer(bundle: str | Path) -> Tokenizer:
    """The tokenizer of a bundle. Raises InputError or FormatError where there is none or it is broken."""
    path = Path(bundle) / "tokenizer.json"
    if not path.is_file():
        raise InputError("no such file", where=path, fix="give a folder that `hotcold export` wrote")
    return read_tokenizer(path)


def text_ids(source: str, tokenizer: Tokenizer, n_tokens: int) -> np.ndarray:
    """The first `n_tokens` ids of `source`, int32, without special tokens.

    `stdlib` means its held-out part, which no predictor was trained on; anything else is taken whole.
    Raises InputError where the text is too short.
    """
    if n_tokens < 1:
        raise InputError("the number of tokens must be positive", got=n_tokens)
    documents = text.documents(source)
    if source == "stdlib":
        documents = text.split(documents, "heldout")
    prose = _join((document.text for document in documents), n_tokens * _CHARS_PER_TOKEN)
    ids = tokenizer.encode(prose, add_special_tokens=False).ids[:n_tokens]
    if len(ids) < n_tokens:
        fix = "give more text, or ask for fewer tokens"
        raise InputError("the text is too short", where=source, got=len(ids), expected=n_tokens, fix=fix)
    return np.array(ids, dtype=np.int32)


def _join(texts: Iterable[str], n_chars: int) -> str:
    """Chunks of one file end in a newline and are put together again; other documents get a blank line."""
    parts: list[str] = []
    for part in texts:
        if n_chars <= 0:
            break
        parts.append(part if part.endswith("\n") else part + "\n\n")
        n_chars -= len(part)
    return "".join(parts)


def windows(ids: np.ndarray, window: int, tokenizer: Tokenizer | None = None) -> list[np.ndarray]:
    """Cut `ids` into windows of `window` ids, int32 each, the BOS that `tokenizer` adds included."""
    if window < 2:
        raise InputError("a window must hold at least 2 tokens", where="--window", got=window)
    bos = np.array(added_ids(tokenizer)[0] if tokenizer else [], dtype=np.int32)
    length = window - len(bos)
    cut = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    if not cut:
        fix = "ask for more tokens, or for a shorter window"
        raise InputError("fewer tokens than one window", got=len(ids), expected=length, fix=fix)
    return [np.concatenate([bos, part]) for part in cut]
