"""Writing traces so that a kill at any moment costs at most one shard, and the rest comes out byte for byte.

Shards are committed in one fixed order, shard-major, and each depends only on its own tokens. So the manifest
of an interrupted run is a prefix of the finished one, and resuming means writing what is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Self

import numpy as np

from hotcold import storage
from hotcold.errors import FormatError, MismatchError
from hotcold.ownership import check_growing
from hotcold.predictor.traces.reader import TraceRun, TraceShard, read_manifest
from hotcold.predictor.training.exclusive import exclusive
from hotcold.progress import log

__all__ = ["TraceWriter"]

_NOT_COMPARED = ("model", "text", "threads")
_OTHER = {
    "model_fingerprint": "another model",
    "n_tokens": "another number of tokens",
    "text_sha256": "another text or tokenizer",
}


class TraceWriter:
    """Starts or resumes a trace folder. `run` is the one on disk, `shards` what is committed so far."""

    def __init__(self, folder: Path, run: TraceRun, shards: list[TraceShard]) -> None:
        self.folder, self.run, self.shards = folder, run, shards

    @classmethod
    @contextmanager
    def open(cls, folder: str | Path, run: TraceRun, tokens: Mapping[str, np.ndarray]) -> Iterator[Self]:
        """Open `folder` for `run`, exclusively.

        InputError if another process writes there, MismatchError if it holds traces of something else,
        StorageError if it is a folder of other things.
        """
        folder = Path(folder)
        with exclusive(folder):
            run = _begin(folder, run, tokens)
            yield cls(folder, run, _committed(folder, run))

    @property
    def next_shard(self) -> int:
        """The first shard that some layer misses."""
        return len(self.shards) // self.run.n_layers

    def write(
        self, layer: int, shard: int, x: np.ndarray, active: np.ndarray, *, fired: int, clipped: int
    ) -> None:
        """Commit one shard; one that is committed already is left alone. StorageError if the disk fails."""
        position = shard * self.run.n_layers + layer
        if position < len(self.shards):
            return
        from safetensors.numpy import save

        data = save({"active": active, "x": x})
        entry = TraceShard(layer, shard, len(data), hashlib.sha256(data).hexdigest(), fired, clipped)
        storage.write_bytes(self.folder / entry.file, data)
        storage.append_line(self.folder / "manifest.jsonl", entry.line())
        self.shards.append(entry)


def _begin(folder: Path, run: TraceRun, tokens: Mapping[str, np.ndarray]) -> TraceRun:
    """Write what the shards depend on, or check that it is the same on disk; returns the run on disk."""
    check_growing(folder, "traces")
    if not (folder / "run.json").exists():
        storage.write_json(folder / "run.json", run.to_json())  # first, as it is the mark of the folder
    old = TraceRun.read(folder)
    # in the order of what a user is likely to have changed
    names = sorted((f.name for f in fields(TraceRun)), key=lambda name: (name not in _OTHER, name))
    for name in names:
        mine, theirs = getattr(run, name), getattr(old, name)
        if name not in _NOT_COMPARED and mine != theirs:
            raise _mismatch(folder, name, old, run)
    if not (folder / "tokens.safetensors").exists():
        storage.write_tensors(folder / "tokens.safetensors", tokens)
    return old


def _mismatch(folder: Path, name: str, old: TraceRun, new: TraceRun) -> MismatchError:
    def side(run: TraceRun) -> str:
        value = str(getattr(run, name))
        label = {"model_fingerprint": run.model, "text_sha256": run.text}.get(name)
        return f"{label!r} ({value[:12]})" if label else value

    return MismatchError(
        f"holds traces of {_OTHER.get(name, 'another ' + name)}",
        where=folder, got=side(new), expected=side(old),
        fix="choose another --out, or delete this folder",
    )  # fmt: skip


def _committed(folder: Path, run: TraceRun) -> list[TraceShard]:
    """The longest prefix of the manifest whose shards are whole; the manifest is cut to it."""
    path = folder / "manifest.jsonl"
    listed = read_manifest(folder, run)
    whole: list[TraceShard] = []
    for entry in listed:
        try:
            entry.read(folder)
        except FormatError as error:
            log(f"{error}; collecting again from here")
            break
        whole.append(entry)
    text = "".join(entry.line() + "\n" for entry in whole).encode()
    if path.exists() and path.read_bytes() != text:
        storage.write_bytes(path, text)
    return whole
