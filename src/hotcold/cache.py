"""The user's cache: one folder, `$XDG_CACHE_HOME/hotcold`, for everything that hotcold can recreate.

    models/KEY/, models/KEY.json   bundles of checkpoints, and their records (runtime/model_cache.py)
    auto-mode/KEY.json             which mode is fastest (runtime/auto_mode.py)
    triton/GPU.json                tile sizes (runtime/triton/tuning.py)
    hashes/KEY.json                sha256 of files that have not changed since

Files are replaced as a whole, so that a reader sees either the old or the new one. What only one of several
processes may create is created under a lock (`KEY.lock` beside it), which ends with the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hotcold import storage
from hotcold.errors import InputError, StorageError
from hotcold.progress import Progress, log

__all__ = [
    "Entry",
    "digest",
    "entries",
    "exclusive",
    "folder",
    "hold",
    "read_record",
    "release",
    "remove",
    "sha256",
    "sweep",
]

_KEY = "[0-9a-f]" * 24
# What hotcold writes there, by folder; other files belong to others.
_RECORDS = {
    "models": f"{_KEY}.json",
    "auto-mode": f"{_KEY}.json",
    "triton": "*-triton-*.json",
    "hashes": f"{_KEY}.json",
}
_UNFINISHED = f".{_KEY}*.tmp"  # of a process that was killed; one at work has a lock on its own

_SMALL, _LARGE = 1 << 20, 1 << 28  # bytes that are hashed at once, and that take a second or two

_held: dict[Path, BinaryIO] = {}  # locks that last as long as this process


def folder(kind: str) -> Path:
    """The folder for one kind, which may not exist yet. Raises InputError if there is no home folder."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        root = named if named.is_absolute() else Path.home() / ".cache"  # as the XDG specification has it
    except RuntimeError as error:
        raise InputError("no home folder", fix="set XDG_CACHE_HOME") from error
    return root / "hotcold" / kind


def digest(*parts: object) -> str:
    """A key that depends only on the parts, which must be JSON."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object; empty if it is missing or damaged, since it can be recreated."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def sha256(path: Path) -> str:
    """Hex sha256 of a file; for a large one it is cached while size, times, and inode stay the same."""
    path = path.resolve()
    if path.stat().st_size < _SMALL:
        return storage.sha256_file(path)
    record = folder("hashes") / f"{digest(str(path))}.json"
    state, known = _state(path), read_record(record)
    if known.get("state") == state and isinstance(known.get("sha256"), str):
        return known["sha256"]
    found = _hashed(path, state[0])
    if _state(path) == state:
        with suppress(StorageError):
            storage.write_json(record, {"path": str(path), "state": state, "sha256": found})
    return found


def _hashed(path: Path, size: int) -> str:
    if size < _LARGE:
        return storage.sha256_file(path)
    with Progress(f"hash {path.name}", size >> 20, "MB") as progress:
        seen = 0

        def on_bytes(n: int) -> None:
            nonlocal seen
            seen += n
            progress.advance((seen >> 20) - progress.done)

        return storage.sha256_file(path, on_bytes)


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


@contextmanager
def exclusive(path: Path, waiting: str, *, needed: bool = True) -> Iterator[None]:
    """Be the only process that creates `path`; logs `waiting` if it has to wait for another.

    Raises StorageError if the cache cannot be written, unless the lock is not `needed`.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(path, fcntl.LOCK_EX, waiting))
        except StorageError:
            if needed:
                raise
        yield


def hold(path: Path, waiting: str) -> None:
    """Keep others from creating or removing `path` until this process ends or releases it."""
    if path not in _held and (file := _lock(path, fcntl.LOCK_SH, waiting)):
        _held[path] = file


def release(path: Path) -> None:
    """End a `hold`."""
    if file := _held.pop(path, None):
        file.close()


@contextmanager
def _locked(path: Path, how: int, waiting: str | None) -> Iterator[bool]:
    """Whether the lock was acquired; without `waiting`, this does not wait for another process."""
    try:
        file = _lock(path, how, waiting)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        if file is not None:
            file.close()


def _lock(path: Path, how: int, waiting: str | None) -> BinaryIO | None:
    """An open file whose lock is held; None on a file system without locks.

    Removing an entry also removes its lock file, so the lock may be on a deleted file: then try again.
    """
    lock = path.with_name(f"{path.name}.lock")
    while True:
        file = _opened(lock)
        try:
            fcntl.flock(file.fileno(), how | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                file.close()
                raise
            log(waiting)
            fcntl.flock(file.fileno(), how)
        except OSError:
            file.close()
            return None
        if _is_still(file, lock):
            return file
        file.close()


def _opened(lock: Path) -> BinaryIO:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock.open("ab")
    except OSError as error:
        fix = "set XDG_CACHE_HOME to a writable folder"
        raise StorageError(f"cannot use the cache: {error.strerror}", where=lock.parent, fix=fix) from error


def _is_still(file: BinaryIO, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the cache. `record` is the file that describes it, `source` what it was made from."""

    kind: str
    record: Path
    source: str
    bytes: int
    used: float  # seconds since 1970

    @property
    def name(self) -> str:
        """The name that `hotcold cache` shows."""
        return f"{self.kind}/{self.record.stem}"

    @property
    def subject(self) -> Path:
        """The bundle that a record of `models` tells of; the lock is beside it."""
        return self.record.with_suffix("")


def entries(*kinds: str) -> list[Entry]:
    """The entries of these kinds, or of all, the least recently used first."""
    found = []
    for kind in kinds or _RECORDS:
        for path in folder(kind).glob(_RECORDS[kind]):
            with suppress(OSError):  # removed in the meantime
                found.append(_entry(kind, path))
    return sorted(found, key=lambda entry: entry.used)


def _entry(kind: str, path: Path) -> Entry:
    record = read_record(path)
    source = str(record.get("source") or record.get("path") or path.stem)
    own = path.stat()
    return Entry(kind, path, source, own.st_size + sum(f.stat().st_size for f in _files(path)), own.st_mtime)


def _files(record: Path) -> list[Path]:
    """The files of a bundle that its record names, and the plans that were saved beside it."""
    named = read_record(record).get("files", [])
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    own = record.parent.resolve() / record.stem
    inside = [own / name for name in names if (own / name).resolve().is_relative_to(own)]
    plans = record.parent.glob(f"{record.stem}.*.placement*")
    return [path for path in (*inside, *plans) if path.is_file() and not path.is_symlink()]


def remove(entry: Entry) -> bool:
    """Remove what hotcold wrote for an entry; False if a process is using it. Raises StorageError."""
    with _locked(entry.subject, fcntl.LOCK_EX, None) as free:
        if not free:
            return False
        try:
            files = _files(entry.record)
            for path in (entry.record, *files):  # the record first: without it nothing is used
                path.unlink(missing_ok=True)
            _remove_empty(entry.subject)
            entry.subject.with_name(f"{entry.subject.name}.lock").unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove it: {error.strerror}", where=entry.record) from error
    return True


def _remove_empty(path: Path) -> None:
    """Remove a folder and its sub-folders, except those with files."""
    for directory, _, _ in os.walk(path, topdown=False):
        with suppress(OSError):
            Path(directory).rmdir()


def sweep() -> None:
    """Delete what killed conversions left behind."""
    for path in folder("models").glob(_UNFINISHED):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(descriptor)
