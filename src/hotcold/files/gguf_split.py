"""The only way to open a model's GGUF file: whole, or split as by llama.cpp's `gguf-split`.

A split model is `X-00001-of-00003.gguf` and so on. Each part is a GGUF file; the first has the model's
metadata. All parts must agree on the number of parts, and together they must contain as many tensors as they
say.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Callable
from pathlib import Path

from hotcold.errors import FormatError, InputError
from hotcold.files.gguf import GGUFFile
from hotcold.storage import sha256_file

__all__ = ["forget_pages", "gguf_sha256", "open_gguf"]

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def open_gguf(path: str | Path) -> GGUFFile:
    """Read a GGUF file or, given its first part, a split model, whose tensors are then all in one dictionary.

    Raises InputError if a part is missing or `path` is not the first, FormatError if parts disagree.
    """
    first = GGUFFile(path)
    if first.find("split.count", int, 1) == 1:
        return first
    match = _NAME.fullmatch(first.path.name)
    count = first.require("split.count", int)
    if match is None or int(match[3]) != count:
        expected = f"NAME-00001-of-{count:05d}.gguf"
        raise InputError(
            "not a valid name for a part of a split model",
            where=first.path,
            got=first.path.name,
            expected=expected,
        )
    _check_first(first, int(match[2]))
    for number in range(1, count):
        _add(first, GGUFFile(first.path.with_name(f"{match[1]}-{number + 1:05d}-of-{match[3]}.gguf")), number)
    total = first.require("split.tensors.count", int)
    if len(first.tensors) != total:
        got = len(first.tensors)
        raise FormatError(
            "wrong number of tensors in all parts",
            where=path,
            field="split.tensors.count",
            got=got,
            expected=total,
        )
    return first


def gguf_sha256(file: GGUFFile, sha256: Callable[[Path], str] = sha256_file) -> str:
    """Hex digits over all bytes of a model: the sha256 of its file, or over `SHA256\\n` of each part."""
    hashes = [sha256(path) for path in file.paths]
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in hashes).encode()).hexdigest()


def _check_first(file: GGUFFile, named: int) -> None:
    number = file.require("split.no", int)
    if named != 1:
        fix = "use the file whose name ends in -00001-of-N"
        raise InputError("not the first part of the model", where=file.path, fix=fix)
    if number != 0:
        what, got = "named like the first part of the model, but its metadata disagrees", f"split.no {number}"
        raise InputError(what, where=file.path, got=got, expected=0, fix="restore the names of the parts")


def _add(first: GGUFFile, part: GGUFFile, number: int) -> None:
    count = first.metadata["split.count"]
    for key, expected in (("split.no", number), ("split.count", count)):
        if part.require(key, int) != expected:
            got = part.metadata[key]
            raise FormatError(
                "this part belongs to another model", where=part.path, field=key, got=got, expected=expected
            )
    if twice := sorted(first.tensors.keys() & part.tensors.keys()):
        raise FormatError("this tensor is also in another part", where=part.path, field=twice[0])
    first.tensors.update(part.tensors)
    first.paths += part.paths
    first.buffers += part.buffers


def forget_pages(file: GGUFFile) -> None:
    """Release the pages that were read, so that a model need not fit in memory twice, or at all."""
    for buffer in file.buffers:
        if isinstance(buffer, mmap.mmap):
            buffer.madvise(mmap.MADV_DONTNEED)
