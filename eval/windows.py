"""The tokens that every engine is measured on: one text, cut once, the same ids for all.

A text becomes one stream of token ids, and the stream is cut into windows of a fixed length; what is left
over is dropped. Each window starts from an empty context, and every position after its first is scored. BOS
is only added if the tokenizer adds it; each window then begins with it, unscored.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hotcold import text
from hotcold.errors import InputError
from hotcold.files.gguf_split import open_gguf
from hotcold.model.tokenizer.gguf import build_tokenizer
from hotcold.model.tokenizer.tokenizer_json import added_ids, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["load_tokenizer", "text_ids", "windows"]

_CHARS_PER_TOKEN = 16  # more than any tokenizer packs into a token on average


def load_tokenizer(bundle: str | Path) -> Tokenizer:
    """The tokenizer of a bundle or GGUF file. InputError or FormatError if it is missing or broken."""
    if Path(bundle).is_file():
        return build_tokenizer(open_gguf(bundle))
    path = Path(bundle) / "tokenizer.json"
    if not path.is_file():
        raise InputError("no such file", where=path, fix="give a bundle from `hotcold export`")
    return read_tokenizer(path)


def text_ids(source: str, tokenizer: Tokenizer, n_tokens: int) -> np.ndarray:
    """The first `n_tokens` ids of `source`, int32, without special tokens.

    `stdlib` means its test part, which no training or tuning uses. Any other source was named to be measured,
    and is used as a whole. Raises InputError if the text is too short.
    """
    if n_tokens < 1:
        raise InputError("the number of tokens must be positive", got=n_tokens)
    documents = text.documents(source, "test" if source == "stdlib" else None)
    prose = _join(documents, n_tokens * _CHARS_PER_TOKEN)
    ids = tokenizer.encode(prose, add_special_tokens=False).ids[:n_tokens]
    if len(ids) < n_tokens:
        fix = "give more text, or ask for fewer tokens"
        raise InputError("the text is too short", where=source, got=len(ids), expected=n_tokens, fix=fix)
    return np.array(ids, dtype=np.int32)


def _join(documents: Iterable[text.Document], n_chars: int) -> str:
    """Pieces of one file are put together again as they were; between other documents stands a blank line."""
    parts: list[str] = []
    before = text.Document("", "\n")
    for document in documents:
        if n_chars <= 0:
            break
        if not (before.text.endswith("\n") or _follows(document, before)):
            parts.append("\n\n")
        parts.append(document.text)
        n_chars -= len(document.text)
        before = document
    return "".join(parts)


def _follows(document: text.Document, before: text.Document) -> bool:
    """Whether both are pieces of one file, of which less is left each time."""
    return document.left is not None and before.left is not None and document.left < before.left


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
