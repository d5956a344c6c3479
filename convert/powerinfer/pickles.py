"""Tensors out of PyTorch's pickles, which PowerInfer's predictors come as, without trusting them.

A pickle is a program. It runs, if the user says so, in a process that may do nothing but give tensors back
(`pickle_child`): those come as safetensors files, which are checked like any others.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hotcold.convert.powerinfer import pickle_child
from hotcold.errors import FormatError, InputError
from hotcold.files.safetensors import SafetensorsFile

__all__ = ["Limits", "read_pickles"]

_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR")  # no tokens, no keys
_START_S = 120  # to import torch, from a slow disk


@dataclass(frozen=True, slots=True)
class Limits:
    """What reading may cost, besides what Python and torch take to start.

    Processor seconds and bytes of memory: a fixed part, and one in proportion to the files. A float16
    tensor is held as it is, as float32, and once more while it is written.
    """

    seconds: int = 20
    bytes_per_second: int = 20_000_000
    memory: int = 512 << 20
    times_the_file: int = 8

    def for_files(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Seconds for all files and bytes for the largest of them."""
        seconds = self.seconds + sum(sizes) // self.bytes_per_second
        return seconds, self.memory + self.times_the_file * max(sizes, default=0)


def read_pickles(
    paths: Sequence[Path], *, allowed: bool, limits: Limits | None = None
) -> list[SafetensorsFile]:
    """The tensors of each file, float32 by name; one that is a bare tensor has it under `tensor`.

    Raises InputError unless `allowed`, and for files that cannot be opened; FormatError for those that hold
    anything but tensors, or need more time or memory than files of their size should.
    """
    if not allowed:
        fix = "pass --allow-pickle to read it in a sandbox"
        raise InputError("a pickle, which can run code", where=paths[0], fix=fix)
    for path in paths:
        if not path.is_file():
            raise InputError("no such file", where=path)
    seconds, memory = (limits or Limits()).for_files([path.stat().st_size for path in paths])
    with tempfile.TemporaryDirectory(prefix="hotcold-pickles-") as folder:
        _run(paths, Path(folder), seconds, memory)
        # Mapped files stay readable after they have been deleted.
        return [SafetensorsFile(Path(folder) / f"{number}.safetensors") for number in range(len(paths))]


def _run(paths: Sequence[Path], folder: Path, seconds: int, memory: int) -> None:
    arguments = [str(seconds), str(memory), str(folder), *(str(path.resolve()) for path in paths)]
    command = [sys.executable, "-I", pickle_child.__file__, *arguments]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment["OMP_NUM_THREADS"] = "1"  # threads would need memory of their own, and are not allowed
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, timeout=_START_S + 2 * seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise _refused(paths, folder, "does not finish") from error
    if done.returncode:
        raise _refused(paths, folder, _reason(done, seconds))


def _reason(done: subprocess.CompletedProcess[bytes], seconds: int) -> str:
    last = done.stderr[-2000:].decode(errors="replace").strip().splitlines()[-1:]
    if done.returncode < 0:
        return f"needs more than {seconds} s, or more memory than a file of its size should"
    return ascii("".join(last)[:300])[1:-1] or f"exit status {done.returncode}"


def _refused(paths: Sequence[Path], folder: Path, reason: str) -> FormatError:
    finished = len(list(folder.glob("*.safetensors")))
    path = paths[min(finished, len(paths) - 1)]
    return FormatError(f"not a file of tensors: {reason}", where=path, field="pickle")
