"""What a folder or file is, and whether hotcold wrote it: the one place that decides.

A folder that is written as a whole carries `hotcold.json`, which names its kind and lists every file in it
with size and sha256; a bundle carries its `manifest.json`, which does the same. A folder that grows in steps
carries a file with a `format` of hotcold's, the first one that is written there. Without such a mark a folder
is somebody else's, regardless of the names in it. `ownership` says what follows for one that is to be
written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotcold.digest import seal, sha256_file
from hotcold.errors import HotcoldError
from hotcold.files.json import read_json
from hotcold.progress import Progress

__all__ = ["FIRST", "GPU_INDEX", "REPORT", "Found", "digests", "entries", "identify", "mark", "mark_path"]

REPORT = {"format": "hotcold-report", "version": 1}  # what every report of measurements begins with

# The first file in each folder that grows in steps, which is its mark
FIRST = {"traces": "run.json", "training": "run.json", "partial": "training.json", "demo": "hotcold.json"}

_MARK, _FORMAT, _VERSION = "hotcold.json", "hotcold-folder", 1
_MARKED = ("predictors", "model-pt", "activation", "checkpoint", "demo")  # the others have marks of their own
# PowerInfer's scripts count the files in its activation folder, so the mark must not be one of them.
_MARK_PATHS = {"activation": f"hotcold/{_MARK}"}

# Marks with other names: file -> its `format` -> what the folder is
_FORMATS = {
    "manifest.json": {"hotcold-bundle": "bundle", "hotcold-state": "state"},
    "run.json": {"hotcold-traces": "traces", "hotcold-training": "training"},
    "training.json": {"hotcold-partial": "partial"},
    "config.json": {"hotcold-predictor": "predictors"},
}
# What a replaceable folder may contain if its mark lists no files
_NAMES = {
    "predictors": ("config.json", "model.safetensors", "README.md"),
    "state": ("manifest.json", "model.safetensors", "optimizer.safetensors"),
}
# What others also write is recognized by names only, and is not ours.
_OTHERS = {
    "model-pt": ("model_0.pt",),
    "activation": ("activation_0.pt",),
    "checkpoint": ("config.json", "*.safetensors"),
}
_FILE_FORMATS = {"hotcold-report": "report", "hotcold-placement": "placement"}
GPU_INDEX = "generic.gpu_index"  # the general.architecture of PowerInfer's .gpuidx
_JOURNALS = {"curve": ("run", "point")}  # the keys of every line
_MAX_JSON, _LONG = 1 << 28, 1 << 29


@dataclass(frozen=True, slots=True)
class Found:
    """What something is (None: nothing that is known), and whether it bears a mark that only hotcold writes.

    `files` are size and sha256 of what lies in a folder, by path; a sha256 of None is that of the mark, which
    is checked already. None if the mark lists no files.
    """

    kind: str | None = None
    ours: bool = False
    files: Mapping[str, tuple[int, str | None]] | None = None

    def lists(self, path: str) -> bool:
        """Whether hotcold wrote a file of this name there."""
        return path in (_NAMES.get(self.kind or "", ()) if self.files is None else self.files)


def identify(path: str | Path) -> Found:
    """What is at `path`. Raises FormatError if the file that would tell is broken."""
    path = Path(path)
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return _marked(path) or _by_format(path)
    return Found()


def mark_path(kind: str) -> str | None:
    """Where the mark of a folder of this kind is, if `mark` is what makes it."""
    return _MARK_PATHS.get(kind, _MARK) if kind in _MARKED else None


def mark(kind: str, folder: Path | None = None) -> dict[str, Any]:
    """The content of `hotcold.json`: with all files of `folder`, or none if the folder is to grow."""
    values: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "kind": kind}
    if folder is not None:
        names = [name for name, is_plain in entries(folder) if is_plain]
        values["files"] = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in digests(folder, names)
        }
    return values | {"sha256": seal(values)}


def digests(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The sha256 of each of these files; where they are large, with progress."""
    total, seen = sum((folder / name).stat().st_size for name in names), 0
    if total < _LONG:
        yield from ((name, sha256_file(folder / name)) for name in names)
        return
    with Progress("hash", total >> 20, "MB") as progress:

        def advance(n_bytes: int) -> None:
            nonlocal seen
            seen += n_bytes
            progress.advance((seen >> 20) - progress.done)

        yield from ((name, sha256_file(folder / name, advance)) for name in names)


def entries(folder: Path) -> Iterator[tuple[str, bool]]:
    """The files, links and empty folders below `folder`: path, and whether it is a plain file."""
    for directory, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        place = Path(directory)
        links = [name for name in folders if (place / name).is_symlink()]
        if not folders and not files and place != folder:
            yield str(place.relative_to(folder)), False
        for name in sorted([*files, *links]):
            path = place / name
            yield str(path.relative_to(folder)), path.is_file() and not path.is_symlink()


def _raise(error: OSError) -> None:
    """Ignore a folder that has vanished in the meantime; one that cannot be read may contain anything."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _marked(folder: Path) -> Found | None:
    for name in (_MARK, *_MARK_PATHS.values()):
        try:
            values = read_json(folder / name)
        except HotcoldError:
            continue
        given = values.pop("sha256", None)
        head = (values.get("format"), values.get("version"))
        if head != (_FORMAT, _VERSION) or given != seal(values) or mark_path(str(values.get("kind"))) != name:
            continue
        files = _listed(values["files"], folder / name, name) if "files" in values else None
        return Found(values["kind"], True, files)
    return None


def _by_format(folder: Path) -> Found:
    """By the files with a format, else by names. A broken file only counts if nothing else identifies it."""
    broken: HotcoldError | None = None
    for name, kinds in _FORMATS.items():
        path = folder / name
        try:
            values = read_json(path) if path.is_file() else {}
        except HotcoldError as error:
            broken = broken or error
            continue
        kind = kinds.get(str(values.get("format")))
        if kind == "bundle":
            given = values.pop("sha256", None)
            files = _listed(values.get("files"), path, name)
            return Found(kind, given == seal(values), files)
        if kind:
            return Found(kind, True)
    found = _by_names(folder)
    if broken and found.kind is None:
        raise broken
    return found


def _listed(files: object, path: Path, name: str) -> dict[str, tuple[int, str | None]]:
    """The files that a mark lists, itself among them; what is not one of hotcold's entries lists nothing."""
    listed: dict[str, tuple[int, str | None]] = {name: (path.stat().st_size, None)}
    for file, entry in files.items() if isinstance(files, dict) else ():
        if isinstance(entry, dict):
            listed[file] = (entry.get("bytes", -1), str(entry.get("sha256")))
    return listed


def _by_names(folder: Path) -> Found:
    for kind, patterns in _OTHERS.items():
        if all(any(folder.glob(pattern)) for pattern in patterns):
            return Found(kind)
    return Found()


def _file(path: Path) -> Found:
    with path.open("rb") as file:
        start = file.read(1)
    if start == b"{":
        return _json_file(path)
    from hotcold.files.gguf_split import open_gguf

    gguf = open_gguf(path)
    kind = "powerinfer" if gguf.magic == "PWRI" else "gguf"
    if gguf.find("general.architecture", str) == GPU_INDEX:
        kind = "gpuidx"
    return Found(kind, "hotcold.version" in gguf.metadata)


def _json_file(path: Path) -> Found:
    """A report, a plan, or a journal."""
    if path.stat().st_size > _MAX_JSON:
        return Found()
    data = path.read_bytes()
    for kind, keys in _JOURNALS.items():
        if _is_journal(data, keys):
            return Found(kind, True)
    kind = _FILE_FORMATS.get(str(read_json(path).get("format")))
    return Found(kind, kind is not None)


def _is_journal(data: bytes, keys: tuple[str, ...]) -> bool:
    """Whether every line is an object with these keys. A kill may have torn the last one."""
    *lines, torn = data.split(b"\n")
    begin = f'{{"{keys[0]}": '.encode()
    if torn and (not (torn.startswith(begin) or begin.startswith(torn)) or _keys(torn)):
        return False
    return all(_keys(line) == keys for line in lines)


def _keys(line: bytes) -> tuple[str, ...]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return ()
    return tuple(values) if isinstance(values, dict) else ()
