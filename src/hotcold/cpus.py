"""How many CPUs this process may use, by its affinity mask and the quota of its cgroup.

A container with a limit of one CPU sees all CPUs of the host. Threads beyond the limit add no speed: they
wait for each other while the kernel holds one of them back. joblib also respects both limits, but rounds a
quota up and only looks at the root of a cgroup file system.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TypeVar

from hotcold.errors import InputError
from hotcold.progress import log

__all__ = ["available_cpus", "cgroups", "in_threads", "thread_count", "torch_threads"]

_MOST_THREADS = 256  # of a native team
_SPINS = "10000"  # a tenth to half of a millisecond
T = TypeVar("T")
R = TypeVar("R")
_said: set[tuple[int, int]] = set()


def thread_count(asked: int | None = None) -> int:
    """The number of threads to run: one per available CPU, or fewer if fewer are `asked` for.

    More threads than CPUs are capped, and a log line says so. Raises InputError for fewer than one.
    """
    cpus = available_cpus()
    if asked is None:
        return cpus
    if asked < 1:
        raise InputError("must be at least 1", where="--threads", got=asked)
    if asked > cpus and (asked, cpus) not in _said:
        _said.add((asked, cpus))
        noun = "CPU" if cpus == 1 else "CPUs"
        log(f"-t {asked}: this process has {cpus} {noun}; running {cpus} thread{'s' if cpus > 1 else ''}")
    return min(asked, cpus)


def torch_threads(asked: int | None = None) -> int:
    """Set torch's threads to `thread_count(asked)` and return their number.

    Call it before anything imports torch, so that waiting OpenMP threads sleep early. By default they spin
    for milliseconds, which wastes most of the time next to another busy program. Do not use it in a process
    that measures llama.cpp, whose barriers would sleep too.
    """
    n_threads = thread_count(asked)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    import torch

    torch.set_num_threads(n_threads)
    return n_threads


def in_threads(
    work: Callable[[T], R], items: Iterable[T], n_threads: int, stopped: Event | None = None
) -> Iterator[R]:
    """Yield `work(item)` in the order of the items, `n_threads` of them at a time, each on one CPU.

    torch and numpy run single-threaded in it. So no thread waits at a barrier for one whose CPU another
    program occupies, and the results do not depend on `n_threads`. The first exception, including Ctrl-C,
    ends it: items that have not started are skipped, and `stopped` is set for running ones, which are waited
    for.
    """
    import torch
    from threadpoolctl import threadpool_limits

    pool = ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with threadpool_limits(1, user_api="blas"):
            yield from pool.map(work, items)
    finally:
        if stopped is not None:
            stopped.set()
        pool.shutdown(cancel_futures=True)


def available_cpus() -> int:
    """CPUs by affinity and cgroup quota (v1 and v2), rounded down; at least 1."""
    quota = min(_quotas(Path("/proc/self")), default=math.inf)
    return max(1, int(min(len(os.sched_getaffinity(0)), quota, _MOST_THREADS)))


def _quotas(process: Path) -> Iterator[float]:
    """The limits, in CPUs, that a process's cgroup and its parents set; `process` is its folder in /proc."""
    for folder, mount in cgroups(process):
        for place in (folder, *folder.parents):
            yield from _limit(place)
            if place == mount:
                break


def cgroups(process: Path = Path("/proc/self")) -> Iterator[tuple[Path, Path]]:
    """The folders of a process's cgroups that limit CPUs, and the mount points above them."""
    try:
        groups = dict(_groups((process / "cgroup").read_text()))
        mounts = list(_mounts((process / "mountinfo").read_text()))
    except OSError:  # without /proc, no limit can be known
        return
    for controller, root, mount in mounts:
        if (group := groups.get(controller)) is not None:
            # A container may see its own cgroup as the root of the mount, under its outside path.
            inside = group.removeprefix(root) if root != "/" else group
            yield mount / inside.lstrip("/"), mount


def _groups(text: str) -> Iterator[tuple[str, str]]:
    """`/proc/PID/cgroup`: (`cpu` for version 1, `` for version 2, path of the process's group)."""
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            yield "", path
        elif "cpu" in controllers.split(","):
            yield "cpu", path


def _mounts(text: str) -> Iterator[tuple[str, str, Path]]:
    """`/proc/PID/mountinfo` (man 5 proc): (controller as above, root of the mount, mount point)."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        mount = Path(mount.encode().decode("unicode_escape"))  # spaces are written as \\040
        if kind == "cgroup2":
            yield "", root, mount
        elif kind == "cgroup" and "cpu" in options.split(","):
            yield "cpu", root, mount


def _limit(folder: Path) -> Iterator[float]:
    """CPUs that a cgroup may use at a time; empty if it has no limit."""
    try:
        if (folder / "cpu.max").is_file():  # version 2: "QUOTA PERIOD" or "max PERIOD"
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if quota != "max" and int(quota) > 0 and int(period) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError):
        return
