"""Every durable write of hotcold, so that a kill or a full disk leaves the old state or the new one.

The recipe is the usual one: write a temporary file in the same folder, fsync it, rename it over the target,
fsync the folder. `FileSystem` holds the six system calls that this takes; tests replace it to make the n-th
one fail.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hotcold.errors import StorageError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "FileSystem",
    "append_line",
    "atomic_directory",
    "atomic_file",
    "sha256_file",
    "write_bytes",
    "write_json",
    "write_tensors",
]

_CHUNK = 1 << 20


class FileSystem:
    """The system calls behind a durable write. One instance, `fs`, is used; tests put a failing one in its place."""

    def open(self, path: Path, mode: str) -> BinaryIO:
        return open(path, mode)  # noqa: PTH123 - the one place where files are opened for writing

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        file.write(data)

    def fsync(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)  # noqa: PTH105

    def fsync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)


fs = FileSystem()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def _as_storage_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "free some space and run again" if error.errno == 28 else None
        raise StorageError(error.strerror or str(error), where=path, fix=fix) from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path` only when the block ends without an exception.

    Raises StorageError where the disk does not take it; `path` then still holds what it held before.
    """
    path = Path(path)
    temporary = _temporary(path)
    with _as_storage_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = fs.open(temporary, "wb")
            with file:
                yield file
                fs.fsync(file)
            fs.replace(temporary, path)
            fs.fsync_directory(path.parent)
        except BaseException:
            fs.unlink(temporary)
            raise


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty sibling folder that takes the place of `path` when the block ends without an exception."""
    path = Path(path)
    temporary = _temporary(path)
    with _as_storage_error(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            if path.exists():
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                fs.replace(path, old)
                fs.replace(temporary, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                fs.replace(temporary, path)
            fs.fsync_directory(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Write `data` to `path`, durably and all at once."""
    with atomic_file(path) as file:
        fs.write(file, data)


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON with a final newline."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write numpy arrays as one safetensors file. The bytes depend on the arguments alone."""
    from safetensors.numpy import save

    write_bytes(path, save(dict(tensors), metadata=dict(metadata) if metadata else None))


def append_line(path: str | Path, line: str) -> None:
    """Append one line to a journal and fsync it. A reader must ignore a last line without newline."""
    path = Path(path)
    with _as_storage_error(path), fs.open(path, "ab") as file:
        fs.write(file, line.encode() + b"\n")
        fs.fsync(file)


def sha256_file(path: str | Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex sha256 of a file; `on_bytes` is told the size of each chunk read, for progress bars."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if on_bytes:
                on_bytes(len(chunk))
    return digest.hexdigest()
