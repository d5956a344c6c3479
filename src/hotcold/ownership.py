"""What may be written where: hotcold never replaces, deletes, or appends to anything that it did not write.

Every command checks everything that it will write here, before any work; `storage.atomic_directory` checks
again before it swaps folders. `hotcold.identify` decides what a thing is, and whether hotcold wrote it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hotcold.errors import HotcoldError, StorageError
from hotcold.identify import FIRST, Found, digests, entries, identify

__all__ = ["beside", "check_file", "check_growing", "check_replaceable"]

_MOVE = "choose another folder, or move this one away"
_MOVE_FILE = "choose another name, or move this file away"
_MOVE_IT = "move it away, or choose another folder"
_SETTLED_NS = 10**9  # a file older than a clock tick cannot change without changing its times
_hashed: dict[
    tuple[int, ...], str
] = {}  # sha256 of files by their state, so that a second check costs nothing


def check_replaceable(path: str | Path, kind: str, inputs: Sequence[str | Path] = ()) -> None:
    """Raise StorageError unless a folder of this kind can be written as a whole to `path` without any loss.

    `path` must be nothing, an empty folder, or a folder of the same kind in which every file is still as
    hotcold wrote it, and none of `inputs` may be this folder or in it. The error names the first file that is
    not hotcold's. Large folders are read, which takes time.
    """
    with _place(path, inputs) as target:
        _check_parent(target)
        if not _is_folder(target) or not any(target.iterdir()):
            return
        found = _found(target)
        _check_kind(target, kind, found)
        _check_untouched(target, found)


def check_growing(path: str | Path, kind: str, inputs: Sequence[str | Path] = ()) -> None:
    """Raise StorageError unless a folder of this kind, which grows in steps, can be started or continued.

    `path` must be nothing, an empty folder, or one with the mark of this kind. Raises FormatError if the mark
    is damaged.
    """
    with _place(path, inputs) as target:
        _check_parent(target)
        if not _is_folder(target):
            return
        if not os.access(target, os.W_OK | os.X_OK):
            raise StorageError("no permission to write here", where=target)
        first = re.compile(rf"\.{re.escape(FIRST[kind])}\.[0-9a-f]{{8}}\.tmp")  # what a killed process leaves
        if all(first.fullmatch(entry.name) for entry in target.iterdir()):
            return
        _check_kind(target, kind, identify(target))
        for name, _ in entries(target):
            if (target / name).is_symlink():
                raise StorageError(
                    "hotcold did not create this symbolic link", where=target / name, fix=_MOVE
                )


def check_file(path: str | Path, kind: str, inputs: Sequence[str | Path] = ()) -> None:
    """Raise StorageError unless a file of this kind can be written to `path`.

    `path` must be nothing, an empty file, or a file of this kind that hotcold wrote. It must not be one of
    `inputs`, or inside a folder that was written as a whole.
    """
    with _place(path, inputs) as target:
        _check_parent(target)
        if not target.exists():
            return
        if not target.is_file():
            what = "a folder, not a file" if target.is_dir() else "not a plain file"
            raise StorageError(what, where=target, fix="give another name")
        if target.stat().st_size:
            _check_kind(target, kind, _found(target), _MOVE_FILE)


def beside(path: str | Path, suffix: str) -> Path:
    """`PATH` with a suffix, also for `.` and `..`, which have no name of their own."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow a link
    return path.with_name(f"{path.name}{suffix}")


@contextmanager
def _place(path: str | Path, inputs: Sequence[str | Path]) -> Iterator[Path]:
    """What `path` resolves to. Links are followed, because the ownership of their target counts."""
    try:
        target = Path(path).resolve()
        _check_special(target)
        for source in map(Path, inputs):
            if source.exists() and (source.resolve().is_relative_to(target) or _same(source, target)):
                raise StorageError(
                    "the output is, or contains, an input", where=target, got=source, fix="give another name"
                )
        yield target
    except RuntimeError as error:
        raise StorageError("a symbolic link that leads back to itself", where=path) from error
    except OSError as error:
        raise StorageError(error.strerror or str(error), where=path) from error


def _same(source: Path, target: Path) -> bool:
    """The same file under two names."""
    return target.exists() and source.samefile(target)


def _check_special(target: Path) -> None:
    for what, place in (("your home folder", os.path.expanduser("~")), ("the root folder", "/")):  # noqa: PTH111
        if target == Path(place).resolve():
            raise StorageError(f"is {what}", where=target, fix="name a folder in it")


def _check_parent(target: Path) -> None:
    """Check that `target` can be created or replaced, and is not inside a folder written as a whole."""
    for parent in target.parents:
        found = _found(parent)
        if found.ours and found.files is not None:
            what = f"inside a folder that hotcold writes as a whole ({found.kind})"
            raise StorageError(what, where=target, got=parent, fix="give another name")
    if os.path.ismount(target):
        raise StorageError("is a mount point", where=target, fix="name a folder in it")
    parent = next(parent for parent in target.parents if parent.exists())
    if not parent.is_dir():
        raise StorageError("a file, not a folder", where=parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError("no permission to write here", where=parent)


def _is_folder(target: Path) -> bool:
    """False if there is nothing; StorageError if there is something else."""
    if target.exists() and not target.is_dir():
        raise StorageError("a file, not a folder", where=target, fix="give another name")
    return target.is_dir()


def _found(target: Path) -> Found:
    try:
        return identify(target)
    except HotcoldError:  # a file with a name that hotcold uses, but which it did not write, or not like this
        return Found()


def _check_kind(target: Path, kind: str, found: Found, fix: str = _MOVE) -> None:
    if not found.ours:
        what = "not empty, and hotcold did not write it" if target.is_dir() else "hotcold did not write it"
        if found.kind == kind:
            what += f", or an older version ({kind} without hotcold's mark)"
        raise StorageError(what, where=target, fix=fix)
    if found.kind != kind:
        raise StorageError(
            "hotcold wrote something else here", where=target, got=found.kind, expected=kind, fix=fix
        )


def _check_untouched(folder: Path, found: Found) -> None:
    """Check names and sizes first, because hashing may take a while."""
    for name, is_plain in entries(folder):
        if not is_plain or not found.lists(name):
            raise StorageError(
                "hotcold did not write this, and replacing the folder would delete it",
                where=folder / name,
                fix=_MOVE_IT,
            )
    listed = {name: entry for name, entry in (found.files or {}).items() if (folder / name).is_file()}
    for name, (size, _) in listed.items():
        if (folder / name).stat().st_size != size:
            raise _changed(folder / name)
    doubtful = [
        name
        for name, (_, sha256) in listed.items()
        if sha256 and _hashed.get(_state(folder / name)) != sha256
    ]
    for name, sha256 in digests(folder, doubtful):
        state = _state(folder / name)
        if sha256 != listed[name][1]:
            raise _changed(folder / name)
        if time.time_ns() - state[-1] > _SETTLED_NS:
            _hashed[state] = sha256


def _state(path: Path) -> tuple[int, ...]:
    """What changes with a file's content. The last is when it, or its name, was changed."""
    found = path.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _changed(path: Path) -> StorageError:
    return StorageError(
        "changed since hotcold wrote it, and replacing the folder would delete it", where=path, fix=_MOVE_IT
    )
