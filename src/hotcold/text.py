"""Text sources: files, globs, Hugging Face data sets and Python's own text, as documents and as tokens.

Everything that learns from text or is measured on it reads it here, so that all agree on what a document is
and on which documents are held out.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hotcold.errors import FormatError, InputError
from hotcold.stdlib_text import stdlib_documents

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

__all__ = ["Document", "documents", "split", "token_stream"]

_CHUNK_CHARS = 4000  # a plain text file is cut at the first blank line after so many characters
_TEXT_FIELDS = ("text", "content", "document", "article", "passage", "body")
_DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")
_FILE_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".json", ".gz", ".zip", ".raw")


@dataclass(frozen=True, slots=True)
class Document:
    """One text that is never divided between train and held-out; `id` is stable across machines."""

    id: str
    text: str


def documents(source: str) -> Iterator[Document]:
    """Yield the non-empty documents of `source`, in a fixed order.

    `source` is a file (`.jsonl`: one document per line, its text-like field; else: chunks of about 4,000
    characters that end at a blank line), a glob of such files, `stdlib`, a Hugging Face data set id
    `NAME[:CONFIG[:SPLIT]]`, or a folder with the Parquet files of a data set. InputError where there is no
    such source or nothing in it, FormatError for a broken `.jsonl` line.
    """
    found = 0
    for document in _open(source):
        if document.text.strip():
            found += 1
            yield document
    if not found:
        raise InputError(
            "no text in it", where=source, fix="give a file, a glob or a data set that holds text"
        )


def split(
    documents: Iterable[Document], part: Literal["train", "heldout"], heldout_share: float = 0.05
) -> Iterator[Document]:
    """Yield the documents of one part. The id's hash alone decides, so the parts never overlap."""
    if part not in ("train", "heldout"):
        raise InputError("unknown part of the text", got=part, expected="train or heldout")
    for document in documents:
        if _is_heldout(document.id, heldout_share) == (part == "heldout"):
            yield document


def token_stream(documents: Iterable[Document], tokenizer: Tokenizer, n_tokens: int) -> list[np.ndarray]:
    """Token ids per document, each int32 [length], `n_tokens` in all: the last document is cut to fit.

    Special tokens are added as the tokenizer says, so that a model that wants a BOS token sees one per
    document. InputError if the documents hold fewer tokens.
    """
    import numpy as np

    if n_tokens < 1:
        raise InputError("the number of tokens must be positive", got=n_tokens)
    stream: list[np.ndarray] = []
    missing = n_tokens
    for document in documents:
        ids = np.asarray(tokenizer.encode(document.text).ids[:missing], dtype=np.int32)
        if ids.size:
            stream.append(ids)
            missing -= ids.size
        if not missing:
            return stream
    raise InputError(
        "the text is too short",
        got=f"{n_tokens - missing} tokens",
        expected=n_tokens,
        fix="give more text or ask for fewer tokens",
    )


def _is_heldout(document_id: str, share: float) -> bool:
    digest = hashlib.sha256(document_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _open(source: str) -> Iterator[Document]:
    if source == "stdlib":
        yield from (Document(*pair) for pair in stdlib_documents())
    elif any(Path(source).glob("**/*.parquet")):
        yield from _dataset(source)
    elif paths := _paths(source):
        for path in paths:
            yield from _read_jsonl(path) if path.suffix == ".jsonl" else _read_plain(path)
    elif _DATASET_ID.fullmatch(source) and not source.endswith(_FILE_SUFFIXES):
        yield from _dataset(source)
    else:
        raise InputError(
            "no such file", where=source, fix="give a file, a glob, a Hugging Face data set id, or stdlib"
        )


def _paths(source: str) -> list[Path]:
    """The files that `source` names; the name itself goes before its meaning as a glob."""
    if not source:
        raise InputError(
            "the text source is empty", fix="give a file, a glob, a Hugging Face data set id, or stdlib"
        )
    if Path(source).is_dir():
        raise InputError(
            "is a folder", where=source, fix=f"give its files as a glob, such as '{source}/*.txt'"
        )
    if Path(source).exists():
        return [Path(source)]
    return sorted(path for path in map(Path, glob.glob(source, recursive=True)) if path.is_file())  # noqa: PTH207 - absolute too


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8 text", where=path, got=f"a bad byte at {error.start}") from error
    except OSError as error:
        raise InputError(error.strerror or str(error), where=path) from error


def _read_plain(path: Path) -> Iterator[Document]:
    """Cut between lines: at a blank one, or at any one if a chunk has grown to several times its size."""
    chunk: list[str] = []
    index = size = 0
    for line in _read(path).splitlines(keepends=True):
        chunk.append(line)
        size += len(line)
        if size >= _CHUNK_CHARS and (not line.strip() or size >= 4 * _CHUNK_CHARS):
            yield Document(f"{path.name}#{index}", "".join(chunk))
            chunk, size, index = [], 0, index + 1
    yield Document(f"{path.name}#{index}", "".join(chunk))


def _read_jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise FormatError(
                    "is not JSON", where=path, field=f"line {number}", got=str(error)
                ) from error
            yield Document(f"{path.name}#{number}", _text_of(record, f"{path}, line {number}"))


def _text_of(record: object, where: str) -> str:
    """The text of a record: the field with a usual name, else all strings (a question and its answer)."""
    if isinstance(record, str):
        return record
    fields = record if isinstance(record, dict) else {}
    named = [fields[name] for name in _TEXT_FIELDS if isinstance(fields.get(name), str)]
    strings = named[:1] or [value for value in fields.values() if isinstance(value, str)]
    if not strings:
        raise InputError(
            "no text field", where=where, expected=f"a string, or an object with {', '.join(_TEXT_FIELDS)}"
        )
    return "\n".join(strings)


def _dataset(source: str) -> Iterator[Document]:
    """Stream a data set of the Hugging Face hub, with the optional `datasets` library."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        fix = "if it is a Hugging Face data set, run `pip install datasets`"
        raise InputError("no such file", where=source, fix=fix) from error
    name, config, part = (*source.split(":"), None, None)[:3]
    try:
        records = load_dataset(name, config, split=part or "train", streaming=True)
    except Exception as error:  # the hub, the network and the data set's own files fail in many classes
        raise InputError(
            "cannot load this data set", where=source, got=f"{type(error).__name__}: {error}"
        ) from error
    for number, record in enumerate(records):
        yield Document(f"{source}#{number}", _text_of(record, f"{source}, record {number}"))
