"""`--mode auto`: the faster of exact and predicted decoding, measured once per bundle, machine and thread
count.

Which one wins depends on row length, sparsity and memory bandwidth: predictors pay for themselves on wide
models and cost more than they save on narrow ones. So it is measured, and the answer kept in the user's cache
folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path

import numpy as np

from hotcold.convert.gguf_read import GGUFFile
from hotcold.errors import StorageError
from hotcold.progress import log
from hotcold.storage import write_json

__all__ = ["choose_mode"]

_TOKENS = 48  # decoded per mode, after as many to warm up


def choose_mode(bundle: str | Path, n_threads: int | None) -> str:
    """`exact` or `predicted`, from the cache or from a measurement of a second or two.

    A file without rows by neuron has only `dense`, one without predictors only `exact`.
    """
    from hotcold.runtime.bundle_files import file_of_role

    path = Path(bundle) if Path(bundle).suffix == ".gguf" else file_of_role(bundle, "sparse")
    tensors = GGUFFile(path).tensors
    if "blk.0.fc1.weight" not in tensors:
        return "exact" if "blk.0.ffn_down_t.weight" in tensors else "dense"
    remembered = _cache_file(path, n_threads)
    try:
        return json.loads(remembered.read_text())["mode"]
    except (OSError, ValueError, KeyError):
        pass
    speeds = {mode: _tokens_per_second(path, mode, n_threads) for mode in ("exact", "predicted")}
    mode = max(speeds, key=speeds.__getitem__)
    log(
        "auto mode: "
        + ", ".join(f"{name} {speed:.1f} tok/s" for name, speed in speeds.items())
        + f" -> {mode}"
    )
    try:
        write_json(remembered, {"mode": mode, "tok_s": speeds, "file": path.name})
    except StorageError as error:
        log(f"auto mode: not remembered, {error}")
    return mode


def _cache_file(path: Path, n_threads: int | None) -> Path:
    """A key of all that the answer depends on; the file counts by size and time, as hashing it would take
    longer."""
    status = path.stat()
    isa = os.environ.get("HOTCOLD_CPU_ISA", "")
    parts = [str(path.resolve()), status.st_size, status.st_mtime_ns, n_threads, isa, platform.processor()]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "hotcold" / "auto-mode" / f"{name}.json"


def _tokens_per_second(path: Path, mode: str, n_threads: int | None) -> float:
    """Greedy decoding from a fixed start: what the model says itself is closer to real use than random
    tokens."""
    from hotcold.runtime.engine import Engine

    engine = Engine(path, mode, n_threads, n_ctx=2 * _TOKENS + 8)
    logits = engine.prefill(np.arange(4) % engine.n_vocab)
    for step in range(2 * _TOKENS):
        if step == _TOKENS:
            start = time.perf_counter()
        logits = engine.decode(int(logits.argmax()))
    return _TOKENS / (time.perf_counter() - start)
