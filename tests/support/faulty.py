"""A file system whose n-th operation fails, and what lies in a folder after that."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hotcold import storage

FAULTS = ["EIO", "ENOSPC", "short write", "interrupt"]


class FaultyFileSystem(storage.FileSystem):
    """Fails at operation number `n`; a short write leaves half of the data behind first."""

    def __init__(self, n: int, fault: str) -> None:
        self.left, self.fault, self.struck = n, fault, False

    def _fail(self) -> None:
        self.left -= 1
        if self.left != 0:
            return
        self.struck = True
        if self.fault == "interrupt":
            raise KeyboardInterrupt
        number = errno.EIO if self.fault == "EIO" else errno.ENOSPC
        raise OSError(number, os.strerror(number))

    def open(self, path, mode):
        self._fail()
        return super().open(path, mode)

    def write(self, file, data):
        if self.fault == "short write" and self.left == 1:
            super().write(file, data[: len(data) // 2])
            file.flush()
        self._fail()
        super().write(file, data)

    def fsync(self, file):
        self._fail()
        super().fsync(file)

    def replace(self, source, target):
        self._fail()
        super().replace(source, target)

    def exchange(self, first, second):
        self._fail()
        super().exchange(first, second)

    def fsync_directory(self, path):
        self._fail()
        super().fsync_directory(path)


class WithoutExchange(FaultyFileSystem):
    """A file system that cannot swap two paths, such as NFS."""

    def exchange(self, first, second):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
