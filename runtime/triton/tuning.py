"""Tile sizes of each kernel: measured once per GPU, shape and type, remembered in the user's cache folder.

Operators only look a size up, so that they can run inside a CUDA graph or torch.compile; `tune` is called
when an engine is loaded. A GPU, or a shape, that was never tuned gets the first candidate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from triton import next_power_of_2

from hotcold import cache
from hotcold.errors import StorageError
from hotcold.progress import log
from hotcold.storage import write_json

__all__ = ["CANDIDATES", "Tiles", "tiles_for", "tune", "whole_rows"]

Tiles = dict[str, int]

_CALLS, _REPLAYS = 16, 8


def _weights(weights: int, each: int) -> Tiles:
    return {"WEIGHTS": weights, "EACH": each}


def _rows(rows: int, each: int, **more: int) -> Tiles:
    return {"ROWS": rows, "EACH": each, **more}


def _blocks(rows: int, num_warps: int, **more: int) -> Tiles:
    """A block is as wide as its warps load at once, so that a thread has its columns of all rows."""
    return {"ROWS": rows, "BLOCK": 256 * num_warps, "num_warps": num_warps, **more}


# ROWS are read together. Programs of `dot`, `listed` and `s2` hold whole rows, EACH weights per thread,
# and of `dot` as many rows as make WEIGHTS. Those of `down` and `s3` hold BLOCK columns. GROUP neurons are
# searched by one program (s2, s3); PROGRAMS walk a list (listed), SPLITS of it are summed apart (down).
CANDIDATES: dict[str, list[Tiles]] = {
    "dot": [
        _weights(8192, 64),
        _weights(4096, 128),
        _weights(4096, 64),
        _weights(4096, 32),
        _weights(8192, 128),
        _weights(16384, 64),
        _weights(16384, 128),
        _weights(32768, 64),
    ],
    "listed": [
        _rows(1, 64, PROGRAMS=1056),
        _rows(1, 128, PROGRAMS=2112),
        _rows(1, 64, PROGRAMS=2112),
        _rows(1, 32, PROGRAMS=1056),
        _rows(2, 64, PROGRAMS=1056),
    ],
    "down": [
        _blocks(16, 1, SPLITS=32),
        _blocks(16, 1, SPLITS=64),
        _blocks(8, 1, SPLITS=64),
        _blocks(32, 1, SPLITS=32),
        _blocks(16, 2, SPLITS=64),
        _blocks(16, 4, SPLITS=64),
        _blocks(8, 4, SPLITS=128),
    ],
    "s2": [
        _rows(1, 64, GROUP=8),
        _rows(1, 128, GROUP=8),
        _rows(2, 64, GROUP=16),
        _rows(2, 128, GROUP=16),
        _rows(2, 64, GROUP=32),
        _rows(4, 64, GROUP=32),
        _rows(4, 32, GROUP=32),
    ],
    "s3": [  # few registers first: it is what is used for several tokens
        _blocks(16, 4, GROUP=128),
        _blocks(16, 1, GROUP=128),
        _blocks(8, 1, GROUP=128),
        _blocks(16, 1, GROUP=256),
        _blocks(16, 2, GROUP=128),
        _blocks(32, 2, GROUP=256),
        _blocks(32, 4, GROUP=256),
    ],
}
_WIDEST = 16384  # columns that a program holds of a row; wider rows are read in several rounds


def whole_rows(tiles: Tiles, width: int, device: torch.device) -> Tiles:
    """WEIGHTS and EACH in terms of a kernel's own sizes: BLOCK columns, which is all of a row, and warps."""
    block = min(max(next_power_of_2(width), 32), _WIDEST if device.type == "cuda" else 32)
    rows = tiles["ROWS"] if "ROWS" in tiles else max(tiles["WEIGHTS"] // block, 1)
    warps = min(max(rows * block // (32 * tiles["EACH"]), 1), 16)
    others = {name: size for name, size in tiles.items() if name not in ("WEIGHTS", "EACH")}
    return others | {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def tiles_for(kernel: str, device: torch.device, shape: str) -> Tiles:
    """The measured tile sizes of `kernel` at `shape` (a text that names sizes and types), or the default."""
    if device.type != "cuda":
        return _small(CANDIDATES[kernel][0])
    return _remembered(_gpu(device)).get(f"{kernel} {shape}", CANDIDATES[kernel][0])


def tune(kernel: str, device: torch.device, shape: str, run: Callable[[], object]) -> Tiles:
    """Time `run` (which launches `kernel` through its operator) with every candidate, keep the fastest.

    Does nothing if it was done before, or off a GPU.
    """
    if device.type != "cuda":
        return tiles_for(kernel, device, shape)
    known, key = _remembered(_gpu(device)), f"{kernel} {shape}"
    if key not in known:
        times = [_milliseconds(known, key, tiles, run) for tiles in CANDIDATES[kernel]]
        known[key] = CANDIDATES[kernel][min(range(len(times)), key=times.__getitem__)]
        _save(_gpu(device), known, key, times)
    return known[key]


def _save(gpu: str, known: dict[str, Tiles], key: str, times: list[float]) -> None:
    """The choices; and beside them all times, microseconds in the order of CANDIDATES."""
    path = _file(gpu)
    all_times = path.with_suffix(".times.json")
    us = [1e3 * ms / _CALLS if math.isfinite(ms) else None for ms in times]
    try:
        write_json(path, known)
        write_json(all_times, cache.read_record(all_times) | {key: us})
    except StorageError as error:
        log(f"could not save tile sizes: {error}")


def _milliseconds(known: dict[str, Tiles], key: str, tiles: Tiles, run: Callable[[], object]) -> float:
    """Median time of `run` with these tiles, which it will look up; infinite where they do not compile.

    Several calls are one CUDA graph, as a launch takes longer than a small kernel. `triton.testing.do_bench`
    would take a buffer to empty the cache with, which a memory budget has no room for.
    """
    from triton.runtime.errors import OutOfResources

    known[key] = tiles
    try:
        run()  # compiles
        times = _replay_milliseconds(run)
    except OutOfResources:
        return float("inf")
    finally:
        del known[key]
    return statistics.median(times[1:])


def _replay_milliseconds(run: Callable[[], object]) -> list[float]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            run()
    times = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def _small(tiles: Tiles) -> Tiles:
    """For the interpreter: several programs and loop rounds even on a tiny matrix."""
    limits = {"ROWS": 4, "WEIGHTS": 128, "BLOCK": 32, "GROUP": 16, "PROGRAMS": 3, "SPLITS": 3}
    return {name: min(size, limits.get(name, size)) for name, size in tiles.items()}


@lru_cache
def _gpu(device: torch.device) -> str:
    import triton

    return f"{torch.cuda.get_device_name(device)} triton {triton.__version__}"


@lru_cache
def _remembered(gpu: str) -> dict[str, Tiles]:
    """What the cache file of this GPU says; entries of other kernels' shape are dropped."""
    found = cache.read_record(_file(gpu))
    return {key: tiles for key, tiles in found.items() if tiles in CANDIDATES.get(key.partition(" ")[0], ())}


def _file(gpu: str) -> Path:
    return cache.folder("triton") / f"{gpu.replace(' ', '-').replace('/', '-')}.json"
