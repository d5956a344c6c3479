"""Bundles of Hugging Face checkpoints, created when a checkpoint is run, and kept in the user's cache.

The key of an entry is the content of the checkpoint, the quantization, and hotcold's version, so it is
created again when one of them changes. An entry counts once its record exists, which is written last. A
process that runs a bundle holds a lock on it; the least recently used of the others are removed when the
cache is full.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from hotcold import __version__, cache, storage
from hotcold.progress import log
from hotcold.runtime.sizes import format_bytes, parse_bytes

__all__ = ["cached_bundle", "limit", "make_room"]

_READ = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # what may go into a bundle
_MOST, _SHARE = 50 << 30, 10
_LIMIT = "HOTCOLD_CACHE_LIMIT"


def cached_bundle(checkpoint: Path, source: str, quant: str) -> Path:
    """The bundle of an HF directory, with matrices of type `quant`; created now if it does not exist.

    `source` is the user's name for the model. Raises what `export_bundle` raises.
    """
    key = cache.digest(_content(checkpoint), quant, __version__)
    bundle = cache.folder("models") / key
    waiting = f"waiting for another process to convert {source}"
    while True:
        cache.hold(bundle, waiting)
        if _is_whole(bundle):
            os.utime(_record(bundle))
            return bundle
        cache.release(bundle)
        with cache.exclusive(bundle, waiting):
            if not _is_whole(bundle):
                _make(bundle, checkpoint, source, quant)


def _content(checkpoint: Path) -> list[tuple[str, str]]:
    """Names and hashes of the files of a checkpoint."""
    files = sorted(path for pattern in _READ for path in checkpoint.glob(pattern) if path.is_file())
    return [(path.name, cache.sha256(path)) for path in files]


def _record(bundle: Path) -> Path:
    return bundle.with_name(f"{bundle.name}.json")


def _is_whole(bundle: Path) -> bool:
    """Whether the record exists, and each file has the size that the manifest says."""
    from hotcold.convert.bundle.manifest import Manifest
    from hotcold.errors import HotcoldError

    if not cache.read_record(_record(bundle)):
        return False
    try:
        files = Manifest.read(bundle).files
        return all((bundle / name).stat().st_size == file.bytes for name, file in files.items())
    except (HotcoldError, OSError):
        return False


def _make(bundle: Path, checkpoint: Path, source: str, quant: str) -> None:
    from hotcold.convert.bundle.export import ExportOptions, export_bundle
    from hotcold.convert.bundle.manifest import MANIFEST
    from hotcold.model.checkpoint import fingerprint
    from hotcold.model.huggingface import HFCheckpoint

    log(f"converting {source} to {quant}; the result is kept in the cache (see `hotcold cache`)")
    cache.sweep()
    if bundle.is_dir() and not bundle.is_symlink():  # damaged, or killed before its record was written
        shutil.rmtree(bundle)  # in the cache, under its key, everything can be recreated
    manifest = export_bundle(
        HFCheckpoint(checkpoint),
        bundle,
        name=_plain_name(source),
        fingerprint=fingerprint(str(checkpoint)),
        folder=checkpoint,
        options=ExportOptions(quant),
    )
    files = [*manifest["files"], MANIFEST]
    storage.write_json(_record(bundle), {"source": source, "quant": quant, "files": files})
    make_room(but=bundle)


def _plain_name(source: str) -> str:
    """The model's name as the base name of files."""
    return re.sub(r"[^\w.+-]", "_", Path(source).resolve().name).lstrip("._+-") or "model"


def limit() -> int:
    """Bytes that bundles may take: HOTCOLD_CACHE_LIMIT, or 50 GiB, or a tenth of the free disk if that is
    less. Raises InputError if it is not a size."""
    if text := os.environ.get(_LIMIT):
        return parse_bytes(text)
    folder = cache.folder("models")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    # What the cache occupies would be free without it.
    return min(_MOST, (shutil.disk_usage(there).free + _taken()) // _SHARE)


def _taken() -> int:
    return sum(entry.bytes for entry in cache.entries("models"))


def make_room(but: Path | None = None) -> None:
    """Remove bundles, the least recently used first and none in use, until the rest is within the limit."""
    most, taken = limit(), _taken()
    for entry in cache.entries("models"):
        if taken <= most:
            return
        if entry.subject != but and cache.remove(entry):
            log(f"cache: removed {entry.source}, the least recently used model")
            taken -= entry.bytes
    if taken > most:
        what = f"the models in use take {format_bytes(taken)}, more than the limit of {format_bytes(most)}"
        log(f"cache: {what}; set {_LIMIT} to raise it")
