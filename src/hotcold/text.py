"""Text sources: files, globs, Hugging Face data sets and Python's own text, as documents and as tokens.

Everything that learns from text or is measured on it reads it here, so that all agree on what a document is
and on which of three parts it belongs to: `train` is for training, `calibrate` for choices (an epoch, a
threshold), and `test` for reported figures. `_part_at` is the only rule. A document belongs to a part as a
whole, by the hash of its id; a long plain file, whose pieces are neighbors, is three runs instead, in the
order of the parts.
"""

from __future__ import annotations

import glob
import hashlib
import os.path
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from hotcold.errors import InputError
from hotcold.stdlib_text import stdlib_documents
from hotcold.text_records import file_records, record_text

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

__all__ = ["PARTS", "Document", "Part", "documents", "part_of", "split", "token_stream"]

Part = Literal["train", "calibrate", "test"]
PARTS: tuple[Part, ...] = get_args(Part)

_TEST, _CALIBRATE = 0.05, 0.10  # below the first is test, below the second calibrate: a twentieth each
_CHUNK_CHARS = 4000  # a longer plain file is cut at the first blank line after so many characters
_LONGEST_CHUNK = 4 * _CHUNK_CHARS  # and at the end of any line, or within one, after so many
_DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")
_FILE_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".ndjson", ".json", ".gz", ".zip", ".raw")
_RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, slots=True)
class Document:
    """One text that is never divided between parts; `id` is stable across machines.

    A piece of a long file also has `left`: the share of the file from the start of the piece on, 1 for the
    first.
    """

    id: str
    text: str
    left: float | None = None


def documents(source: str, part: Part | None = None) -> Iterator[Document]:
    """Yield the non-empty documents of `source`, or of one part of it, in a fixed order.

    `source` is a file (`.jsonl` and `.json`: a document per record, see `text_records`; else plain text, if
    long in pieces of about 4,000 characters that end at a blank line), a glob of such files, `stdlib`, a
    Hugging Face data set id `NAME[:CONFIG[:SPLIT]]`, or a folder with the Parquet files of a data set.
    Raises InputError if there is no such source, no text in it or in the part, or a record that is not
    understood, FormatError for broken JSON.
    """
    found = 0
    every = (document for document in _open(source) if document.text.strip())
    for document in every if part is None else split(every, part):
        found += 1
        yield document
    if not found:
        what = "contains no text" if part is None else f"too small to be divided: no text in its {part} part"
        raise InputError(what, where=source, fix="use a file, a glob, or a data set with more text")


def split(documents: Iterable[Document], part: Part) -> Iterator[Document]:
    """Yield the documents of one part. Every document is in exactly one."""
    if part not in PARTS:
        raise InputError("unknown part of the text", got=part, expected=" | ".join(PARTS))
    return (document for document in documents if part_of(document) == part)


def part_of(document: Document) -> Part:
    """The part that a document belongs to, independent of other documents."""
    return _part_at(_hashed(document.id) if document.left is None else document.left)


def _part_at(place: float) -> Part:
    """The part of a place in 0 to 1: a hash of an id, or what is left of a long file, which test ends."""
    if place < _TEST:
        return "test"
    return "calibrate" if place < _CALIBRATE else "train"


def _hashed(document_id: str) -> float:
    digest = hashlib.sha256(document_id.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def token_stream(documents: Iterable[Document], tokenizer: Tokenizer, n_tokens: int) -> list[np.ndarray]:
    """Token ids per document, each int32 [length], `n_tokens` in all: the last document is cut to fit.

    The tokenizer adds its special tokens, so a model that expects BOS sees one per document. Raises
    InputError if the documents have fewer tokens.
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
        fix="provide more text, or ask for fewer tokens",
    )


def _open(source: str) -> Iterator[Document]:
    if source == "stdlib":
        yield from (Document(*pair) for pair in stdlib_documents())
    elif any(Path(source).glob("**/*.parquet")):
        yield from _dataset(source)
    elif paths := _paths(source):
        for path, name in _named(paths):
            yield from (
                _read_records(path, name) if path.suffix in _RECORD_SUFFIXES else _read_plain(path, name)
            )
    elif _DATASET_ID.fullmatch(source) and not source.endswith(_FILE_SUFFIXES):
        yield from _dataset(source)
    else:
        raise InputError(
            "no such file", where=source, fix="give a file, a glob, a Hugging Face data set id, or stdlib"
        )


def _paths(source: str) -> list[Path]:
    """The files that `source` names; an existing name takes precedence over its meaning as a glob."""
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


def _named(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Each file with its name below the common folder, so that `a/x.txt` and `b/x.txt` are two documents."""
    folder = os.path.commonpath([path.parent for path in paths]) or "."
    for path in paths:
        yield path, Path(os.path.relpath(path, folder)).as_posix()


def _read(path: Path) -> str:
    """The text of a file, line ends as newlines, without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8 text", where=path, got=f"a bad byte at {error.start}") from error
    except OSError as error:
        raise InputError(error.strerror or str(error), where=path) from error


def _read_plain(path: Path, name: str) -> Iterator[Document]:
    """A short file as it is, a long one in pieces, each of which is in one part."""
    text = _read(path)
    if len(text) <= _CHUNK_CHARS:
        yield Document(f"{name}#0", text)
        return
    for index, (begin, end) in enumerate(_pieces(text)):
        yield Document(f"{name}#{index}", text[begin:end], _left(text, begin))


def _left(text: str, position: int) -> float:
    return (len(text) - position) / len(text)


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Cut between lines: at a blank one, at any one if a piece has grown large, and where a part ends."""
    begin = end = 0
    for line in _lines(text):
        end += len(line)
        size = end - begin
        full = size >= _CHUNK_CHARS and (not line.strip() or size >= _LONGEST_CHUNK)
        if full or _part_at(_left(text, begin)) != _part_at(_left(text, end)):
            yield begin, end
            begin = end
    if begin < end:
        yield begin, end


def _lines(text: str) -> Iterator[str]:
    """Lines with their ends; one that is longer than a piece may be is cut after a space, if it has any."""
    for line in text.splitlines(keepends=True):
        begin = 0
        while len(line) - begin > (_CHUNK_CHARS if begin else _LONGEST_CHUNK):
            cut = line.rfind(" ", begin, begin + _CHUNK_CHARS) + 1 or begin + _CHUNK_CHARS
            yield line[begin:cut]
            begin = cut
        yield line[begin:]


def _read_records(path: Path, name: str) -> Iterator[Document]:
    for number, record, where in file_records(_read(path), path):
        yield Document(f"{name}#{number}", record_text(record, where))


def _dataset(source: str) -> Iterator[Document]:
    """Stream a data set of the Hugging Face hub, with the optional `datasets` library."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        fix = "if it is a Hugging Face data set, run `pip install datasets`"
        raise InputError("no such file", where=source, fix=fix) from error
    name, config, part = (*source.split(":"), None, None)[:3]
    try:
        records = load_dataset(name, config, split=part or "train", streaming=True)
    except Exception as error:  # the hub, the network, and the data set's files raise errors of many classes
        raise InputError(
            "cannot load this data set", where=source, got=f"{type(error).__name__}: {error}"
        ) from error
    for number, record in enumerate(records):
        yield Document(f"{source}#{number}", record_text(record, f"{source}, record {number}"))
