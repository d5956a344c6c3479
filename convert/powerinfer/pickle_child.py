"""The one place in hotcold that unpickles: a process of its own, with little memory, little time, no way out.

`hotcold.convert.powerinfer.pickles` starts it as a script, so that it imports nothing of hotcold. It reads
PyTorch files and writes their tensors as float32 safetensors files. `weights_only=True` refuses everything
but tensors and plain containers; as that has been broken before (CVE-2025-32434, CVE-2026-24747) the limits
stand behind it: no file may be written that is greater than the tensors may be, no memory and no processor
time beyond what the size of the input explains.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__: list[str] = []

REFUSED = 3  # exit status: the reason is on stderr


def main(seconds: int, memory: int, folder: Path, paths: list[Path]) -> None:
    """Write the tensors of `paths[n]` as `folder/n.safetensors`; a bare tensor is named `tensor`."""
    import torch
    from safetensors.torch import save_file

    _limit(seconds, memory)
    for number, path in enumerate(paths):
        value = torch.load(path, map_location="cpu", weights_only=True)
        save_file(_floats(value), folder / f"{number}.safetensors")


def _limit(seconds: int, memory: int) -> None:
    """From here on; what Python and torch themselves have mapped by now does not count."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    mapped, used = pages * resource.getpagesize(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    for kind, limit in (
        (resource.RLIMIT_AS, mapped + memory),
        (resource.RLIMIT_CPU, int(used) + 1 + seconds),  # whole seconds: rounded down, none might be left
        (resource.RLIMIT_FSIZE, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def _floats(value: Any) -> dict[str, torch.Tensor]:
    import torch

    named = {"tensor": value} if isinstance(value, torch.Tensor) else value
    if not isinstance(named, dict) or not named:
        raise TypeError(f"holds neither a tensor nor a dictionary of tensors, but {type(value).__name__}")
    for name, tensor in named.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"the entry {name!r:.40} is not a tensor")
        if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
            raise TypeError(f"the tensor {name!r:.40} does not hold plain numbers")
    return {name: tensor.detach().float().contiguous().clone() for name, tensor in named.items()}


def _reason(error: Exception) -> str:
    """One line. Not PyTorch's own for pickles that it refuses: that recommends to load them unsafely."""
    if type(error).__name__ == "UnpicklingError":
        called = re.search(r"GLOBAL (\S+)", str(error))
        return f"it would run {called[1]}" if called else "it is no pickle of tensors alone"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), [Path(path) for path in sys.argv[4:]])
    except MemoryError:
        sys.exit("needs more memory than a file of its size should")
    except Exception as error:
        print(_reason(error), file=sys.stderr)
        sys.exit(REFUSED)
