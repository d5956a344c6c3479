"""Tile sizes of each kernel: measured once per GPU, shape and type, remembered in the user's cache folder.

Operators only look a size up, so that they can run inside a CUDA graph or torch.compile; `tune` is called
when an engine is loaded. A GPU, or a shape, that was never tuned gets the first candidate.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from hotcold.errors import StorageError
from hotcold.progress import log
from hotcold.storage import write_json

__all__ = ["CANDIDATES", "Tiles", "tiles_for", "tune"]

Tiles = dict[str, int]

_CALLS, _REPLAYS = 16, 8


def _tiles(rows: int, block: int, num_warps: int, **more: int) -> Tiles:
    return {"ROWS": rows, "BLOCK": block, "num_warps": num_warps, **more}


# ROWS are read together, BLOCK columns at a time; GROUP neurons are searched by one program (s2, s3);
# PROGRAMS walk a list (listed), SPLITS of it are summed apart (down).
CANDIDATES: dict[str, list[Tiles]] = {
    "dot": [
        _tiles(4, 1024, 4),
        _tiles(2, 2048, 4),
        _tiles(8, 512, 4),
        _tiles(1, 4096, 4),
        _tiles(16, 256, 4),
        _tiles(4, 1024, 8),
    ],
    "listed": [
        _tiles(4, 1024, 4, PROGRAMS=528),
        _tiles(2, 2048, 4, PROGRAMS=1056),
        _tiles(1, 4096, 4, PROGRAMS=1056),
        _tiles(8, 512, 4, PROGRAMS=264),
        _tiles(4, 1024, 8, PROGRAMS=264),
    ],
    "down": [
        _tiles(32, 128, 4, SPLITS=16),
        _tiles(64, 64, 4, SPLITS=8),
        _tiles(16, 256, 4, SPLITS=32),
        _tiles(16, 512, 4, SPLITS=64),
        _tiles(64, 32, 8, SPLITS=1),
        _tiles(128, 32, 8, SPLITS=4),
    ],
    "s2": [
        _tiles(4, 1024, 4, GROUP=32),
        _tiles(2, 2048, 4, GROUP=16),
        _tiles(4, 2048, 8, GROUP=32),
        _tiles(1, 4096, 4, GROUP=8),
        _tiles(8, 512, 4, GROUP=64),
    ],
    "s3": [
        _tiles(16, 128, 4, GROUP=256),
        _tiles(16, 256, 4, GROUP=128),
        _tiles(32, 64, 4, GROUP=256),
        _tiles(32, 128, 4, GROUP=512),
        _tiles(8, 512, 4, GROUP=128),
    ],
}


def tiles_for(kernel: str, device: torch.device, shape: str) -> Tiles:
    """The measured tile sizes of `kernel` at `shape` (a text that names sizes and types), or the default."""
    if device.type != "cuda":
        return _small(CANDIDATES[kernel][0])
    return _remembered(_gpu(device)).get(f"{kernel} {shape}", CANDIDATES[kernel][0])


def tune(kernel: str, device: torch.device, shape: str, run: Callable[[], object]) -> Tiles:
    """Time `run` (which launches `kernel` through its operator) with every candidate, keep the fastest.

    Does nothing where it was done before, or off a GPU.
    """
    if device.type != "cuda":
        return tiles_for(kernel, device, shape)
    known, key = _remembered(_gpu(device)), f"{kernel} {shape}"
    if key not in known:
        known[key] = min(CANDIDATES[kernel], key=lambda tiles: _milliseconds(known, key, tiles, run))
        try:
            write_json(_file(_gpu(device)), known)
        except StorageError as error:
            log(f"tile sizes are not remembered: {error}")
    return known[key]


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
    limits = {"ROWS": 4, "BLOCK": 32, "GROUP": 16, "PROGRAMS": 3, "SPLITS": 3}
    return {name: min(size, limits.get(name, size)) for name, size in tiles.items()}


@lru_cache
def _gpu(device: torch.device) -> str:
    import triton

    return f"{torch.cuda.get_device_name(device)} triton {triton.__version__}"


@lru_cache
def _remembered(gpu: str) -> dict[str, Tiles]:
    """What the cache file of this GPU says; entries of other kernels' shape are dropped."""
    try:
        found = json.loads(_file(gpu).read_text())
        return {key: tiles for key, tiles in found.items() if tiles in CANDIDATES[key.split()[0]]}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def _file(gpu: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "hotcold" / "triton" / f"{gpu.replace(' ', '-').replace('/', '-')}.json"
