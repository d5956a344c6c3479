"""What Linux says about the machine, since measured figures and choices only hold for it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["available_memory", "cpu_name", "cpuinfo"]


def cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty if there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def cpu_name() -> str:
    """The model name of the CPU, or the closest thing to it."""
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def available_memory() -> int:
    """The kernel's estimate of the bytes that can be allocated without swapping."""
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
