"""All durable writes of hotcold: a kill or a full disk leaves either the old state or the new one.

The recipe is the usual one: write a temporary file in the same folder, fsync it, rename it over the target,
fsync the folder. Folders are swapped with `renameat2`, the only way that never shows half of one.

`FileSystem` has the system calls for this; tests replace it with one that makes the n-th call fail.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from hotcold.digest import sha256_file
from hotcold.errors import StorageError
from hotcold.identify import mark, mark_path
from hotcold.ownership import check_replaceable
from hotcold.progress import log

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "FileSystem",
    "append_line",
    "atomic_directory",
    "atomic_file",
    "remove_files",
    "sha256_file",
    "write_bytes",
    "write_json",
    "write_tensors",
]

_CHUNK = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL)
_FULL = (errno.ENOSPC, errno.EDQUOT)
# numpy's names and safetensors', in the order of the library's `Dtype`
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16",
    "int32": "I32", "uint32": "U32", "float32": "F32", "float64": "F64", "int64": "I64", "uint64": "U64",
}  # fmt: skip


class FileSystem:
    """The system calls behind a durable write. Tests replace the only instance, `fs`, with a failing one."""

    def open(self, path: Path, mode: Literal["rb", "ab", "xb"]) -> BinaryIO:
        return open(path, mode)  # noqa: PTH123 - the one place where files are opened for writing

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        file.write(data)

    def fsync(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)  # noqa: PTH105

    def exchange(self, first: Path, second: Path) -> None:
        """Swap two paths in one step; OSError with ENOSYS or EINVAL if the file system cannot."""
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        paths = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
        if renameat2(*paths, _RENAME_EXCHANGE):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def fsync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)


fs = FileSystem()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path` only when the block ends without an exception.

    Raises StorageError if the write fails; `path` is then as it was before. `ownership.check_file` says
    whether it may be replaced.
    """
    path = Path(path).resolve()
    with _as_storage_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        temporary, file = _new_file(path)
        try:
            with file:
                yield file
                fs.fsync(file)
                fs.replace(temporary, path)
            fs.fsync_directory(path.parent)
        except BaseException:
            _discard(temporary)
            raise


@contextmanager
def atomic_directory(path: str | Path, kind: str) -> Iterator[Path]:
    """Yield an empty sibling folder that replaces `path` when the block ends without an exception.

    It then has the mark of its kind, which lists everything that was written (see `identify`). Raises
    StorageError if the write fails and, both first and last, if `path` is anything but such a folder as
    hotcold wrote it; `path` is then as it was before.
    """
    check_replaceable(path, kind)
    path = Path(path).resolve()
    with _as_storage_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        temporary, descriptor = _new_folder(path)
        try:
            yield temporary
            if place := mark_path(kind):
                write_json(temporary / place, mark(kind, temporary))
            _sync_tree(temporary)
            check_replaceable(path, kind)
            _put_in_place(temporary, path)
            fs.fsync_directory(path.parent)
        finally:
            os.close(descriptor)
            _discard(temporary)  # by now it is gone, or has the old state, or the remains of a failure


def remove_files(folder: Path, names: Sequence[str]) -> None:
    """Delete these files of a folder in this order, then the folder if nothing else is in it.

    What hotcold did not write stays, and a log line says so. Raises StorageError if a file cannot be deleted.
    """
    with _as_storage_error(folder):
        for name in names:
            _sweep(folder / name)
            fs.unlink(folder / name)
    try:
        folder.rmdir()
    except OSError as error:
        log(f"{folder}: folder not removed, as it contains more than hotcold wrote ({error.strerror})")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _is_temporary(name: str, path: Path) -> bool:
    """Whether `_temporary(path)` gives such names."""
    return re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp", name) is not None


def _new_file(path: Path) -> tuple[Path, BinaryIO]:
    """Create a temporary file, open and locked."""
    while True:
        temporary = _temporary(path)
        file = fs.open(temporary, "xb")
        if _is_held(file.fileno(), temporary):
            return temporary, file
        file.close()


def _new_folder(path: Path) -> tuple[Path, int]:
    """Create a temporary folder; returns it with the descriptor that holds its lock."""
    while True:
        temporary = _temporary(path)
        temporary.mkdir()
        with suppress(FileNotFoundError):  # swept away by another process
            descriptor = os.open(temporary, os.O_RDONLY)
            if _is_held(descriptor, temporary):
                return temporary, descriptor
            os.close(descriptor)


def _is_held(descriptor: int, path: Path) -> bool:
    """Lock a new file or folder; False if another process was faster and sweeps it away as abandoned."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks, where nobody sweeps
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sweep(path: Path) -> None:
    """Delete what killed processes left of their attempts at `path`. Running ones hold a lock."""
    with suppress(OSError):
        for stale in path.parent.iterdir():
            if _is_temporary(stale.name, path) and not stale.is_symlink():
                with suppress(OSError), _locked(stale) as is_abandoned:
                    if is_abandoned:
                        _discard(stale)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Lock a file or folder for the block; False if another process has the lock, or there are no locks."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _discard(path: Path) -> None:
    """Delete a temporary file or folder; a failure must not hide the original error."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            fs.unlink(path)


def _sync_tree(folder: Path) -> None:
    """Sync what others wrote to `folder` without fsync."""
    for directory, _, files in os.walk(folder):
        for name in files:
            with fs.open(Path(directory, name), "rb") as file:
                fs.fsync(file)
        fs.fsync_directory(Path(directory))


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; if there is a folder with something in it, that becomes `temporary`."""
    if not path.exists() or not any(path.iterdir()):  # which a rename replaces only as long as it is empty
        fs.replace(temporary, path)
        return
    try:
        fs.exchange(temporary, path)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        _exchange_in_steps(temporary, path)


def _exchange_in_steps(temporary: Path, path: Path) -> None:
    """Safe against errors, but a power cut between the steps leaves the old state beside `path`."""
    old = _temporary(path)
    with _locked(path):  # otherwise another process would consider it abandoned
        fs.replace(path, old)
        try:
            fs.replace(temporary, path)
        except BaseException:
            fs.replace(old, path)
            raise
    _discard(old)


@contextmanager
def _as_storage_error(path: Path) -> Iterator[None]:
    """Turn OSErrors about `path` into StorageErrors; those about other files, from the block's body, pass."""
    try:
        yield
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else path
        below = place.relative_to(path.parent).parts if place.is_relative_to(path.parent) else ()
        if not (path.is_relative_to(place) or (below and _is_temporary(below[0], path))):
            raise
        fix = "free some space and run again" if error.errno in _FULL else None
        raise StorageError(error.strerror or str(error), where=path, fix=fix) from error


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Write `data` to `path`, durably and atomically."""
    with atomic_file(path) as file:
        fs.write(file, data)


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON with a final newline."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write numpy arrays as one safetensors file, one at a time. The bytes depend on the arguments alone.

    They are the same as from the `safetensors` library, which would hold a copy of all arrays at once.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-list(_DTYPES).index(item[1].dtype.name), item[0]))
    with atomic_file(path) as file:
        fs.write(file, _tensors_header(ordered, metadata))
        for _, array in ordered:
            fs.write(file, array.tobytes())


def _tensors_header(ordered: list[tuple[str, np.ndarray]], metadata: Mapping[str, str] | None) -> bytes:
    """Length and JSON of a safetensors file; `ordered` is by falling alignment, then by name."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        shape = list(array.shape)
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def append_line(path: str | Path, line: str) -> None:
    """Append one line to a journal and fsync it; StorageError leaves the journal as it was.

    A kill may leave a last line without a newline: readers must ignore it, and the next append removes it.
    """
    path = Path(path).resolve()
    with _as_storage_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        end = 0 if is_new else _end_of_last_line(path)
        try:
            with fs.open(path, "ab") as file:
                file.truncate(end)
                fs.write(file, line.encode() + b"\n")
                fs.fsync(file)
            if is_new:
                fs.fsync_directory(path.parent)
        except BaseException:
            with suppress(OSError):
                path.unlink() if is_new else os.truncate(path, end)
            raise


def _end_of_last_line(path: Path) -> int:
    """Bytes up to and including the last newline, searched from the end."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - _CHUNK)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            position = start
    return 0
