"""All measurements of docs/performance-gpu.md, one process each, within a time limit.

A GPU may be available for minutes only, and one illegal access ends a process and loses its results. So each
part is a separate `hotcold` command. Its output is saved as soon as it is done, and a part that fails or
would not finish in time does not affect the others.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hotcold import storage
from hotcold.eval.demo.pipeline import child_command, child_environment
from hotcold.identify import REPORT
from hotcold.ownership import check_file
from hotcold.progress import log

__all__ = ["PARTS", "Part", "parts", "run_parts"]

_TOLD = 4000  # characters of a failed part's last words
_FEW = ("--layers", "8")


@dataclass(frozen=True, slots=True)
class Part:
    """A command line behind `hotcold`, and its expected duration; it is not started with less time left."""

    name: str
    seconds: float
    arguments: tuple[str, ...]


def _decode(shape: str, backend: str, *more: str) -> tuple[str, ...]:
    return ("bench-gpu", "--synthetic", shape, "--quant", "bf16", "--backends", backend, *more)


# In order of importance. Seconds are guesses for 16 CPUs and an H100, generating all weights.
PARTS = (
    Part("check", 60, ("bench-kernels", "--d-model", "544", "--d-ff", "1000", "--check")),
    Part("kernels-7b", 90, ("bench-kernels", "--shape", "llama-2-7b")),
    Part("kernels-13b", 60, ("bench-kernels", "--shape", "llama-2-13b")),
    Part("tokens", 120, (
        "bench-gpu", "--synthetic", "smollm2-135m", "--quant", "f16", "--backends", "gpu,hybrid",
        "--budgets", "90", "--check", "-n", "64",
    )),
    Part("gpu-7b-8l", 180, _decode("llama-2-7b", "gpu", *_FEW)),
    Part("hybrid-7b", 150, _decode("llama-2-7b", "hybrid", *_FEW, "-m", "dense,predicted", "-r", "3")),
    Part("hybrid-13b", 240, _decode("llama-2-13b", "hybrid", *_FEW, "-m", "dense,predicted", "-r", "3")),
    # Each token of these moves gigabytes over the bus, so they generate few, in parts of their own.
    Part("accelerate-7b", 150, _decode("llama-2-7b", "accelerate", *_FEW, "-n", "8", "-r", "3")),
    Part("accelerate-13b", 240, _decode("llama-2-13b", "accelerate", *_FEW, "-n", "8", "-r", "3")),
    Part("gpu-7b", 420, _decode("llama-2-7b", "gpu", "-r", "3")),
)  # fmt: skip


def parts(names: Sequence[str], device: str, cache: str | None) -> list[Part]:
    """The parts of these names, in the order of PARTS, on `device`, with synthetic files kept in `cache`."""
    common = ("--device", device, "-o", "json")
    kept = ("--cache", cache) if cache else ()
    return [
        replace(part, arguments=part.arguments + common + (kept if "--synthetic" in part.arguments else ()))
        for part in PARTS
        if part.name in names
    ]


def run_parts(todo: Sequence[Part], save: str | Path, seconds: float) -> list[dict[str, Any]]:
    """Run the parts within `seconds`; returns the outcome of each, which is saved to `save` after each part.

    Keys: `part`, `command`, `status` (done, failed, timed out, skipped), `seconds`, `result` (what it
    printed, or None) and `error` (its last words, if it failed). StorageError if `save` cannot be written.
    """
    check_file(save, "report")
    end, found = time.monotonic() + seconds, []
    for part in todo:
        log(f"{part.name}: hotcold {' '.join(part.arguments)}")
        became = _run(part, end - time.monotonic())
        found.append({"part": part.name, "command": ["hotcold", *part.arguments]} | became)
        log(f"{part.name}: {became['status']} after {became['seconds']:.0f} s {became['error'][-300:]}")
        storage.write_json(save, REPORT | {"parts": found})
    return found


def _run(part: Part, left: float) -> dict[str, Any]:
    start = time.monotonic()
    if left < part.seconds:
        return _became("skipped", start, f"{left:.0f} s left, {part.seconds:.0f} s needed")
    try:
        done = subprocess.run(
            child_command(part.arguments), env=child_environment(), capture_output=True, encoding="utf-8",
            errors="replace", timeout=left, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        return _became("timed out", start, (late.stderr or b"").decode(errors="replace"))
    try:
        result = None if done.returncode else json.loads(done.stdout)
    except ValueError:
        result = None
    return _became("failed", start, done.stderr) if result is None else _became("done", start, "", result)


def _became(status: str, start: float, error: str, result: object = None) -> dict[str, Any]:
    seconds = time.monotonic() - start
    return {"status": status, "seconds": seconds, "result": result, "error": error[-_TOLD:]}
