"""The machine that a figure was measured on: a speed without its machine means nothing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hotcold import __version__
from hotcold.cpuinfo import cpu_name, cpuinfo
from hotcold.cpus import available_cpus

__all__ = ["describe"]

# of the many flags a CPU lists, those that decide which kernels run
_ISA_FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "asimd")
_PACKAGES = ("torch", "transformers", "numpy", "gguf", "tokenizers", "llama-cpp-python")


def describe() -> dict[str, object]:
    """CPU name, cores, ISA flags, last-level cache, memory (GiB), kernel, Python and package versions."""
    cpu = cpuinfo()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    return {
        "cores": available_cpus(),
        "cpu": cpu_name(),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "l3": _l3(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "hotcold": __version__,
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _l3() -> str | None:
    """Size of the last-level cache as the kernel writes it, such as `32768K`."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return path.read_text().strip() if path.exists() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
