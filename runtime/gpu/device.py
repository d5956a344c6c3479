"""Open a device, or raise an error that says what is missing and what works instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType

import torch

from hotcold.cpuinfo import available_memory
from hotcold.errors import InputError, UnsupportedError
from hotcold.runtime.sizes import format_bytes, parse_bytes

__all__ = ["free_bytes", "memory_or_error", "on", "open_device", "open_devices", "operators", "parse_budgets"]

_INSTEAD = "use --backend cpu"
_MARGIN = 256 << 20  # left for the driver, and for what grows while a kernel is compiled
_TRITON = (3, 5)  # with a working griddepcontrol, which 3.4 has but cannot compile
_OLDEST = (8, 0)  # bfloat16 and asynchronous copies: Ampere and later


def open_device(name: str = "cuda") -> torch.device:
    """`cuda`, `cuda:1` or `cpu`; a GPU becomes the current one, where Triton, events and graphs run.

    Raises InputError for another name, UnsupportedError for what is missing.
    """
    device = _named(name)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def open_devices(names: str = "cuda") -> list[torch.device]:
    """`cuda`, all GPUs that can be used; or some in order: `cuda:1`, `cuda:0,cuda:1`, `cpu`, `cpu,cpu`.

    Raises InputError for other names and for a GPU named twice, UnsupportedError for what is missing.
    """
    devices = [_named(name) for name in names.split(",")]
    if names == "cuda":
        gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        return [gpu for gpu in gpus if torch.cuda.get_device_capability(gpu) >= _OLDEST]
    if len({device.type for device in devices}) > 1 or torch.device("cuda") in devices:
        raise InputError("not a list of devices", got=names, expected="such as cuda:0,cuda:1")
    gpus = [device for device in devices if device.type == "cuda"]
    if len(set(gpus)) < len(gpus):
        raise InputError("a GPU is listed twice", got=names)
    return devices


def on(device: torch.device) -> AbstractContextManager[None]:
    """Make a GPU the current one for a while: Triton, events and graphs go there, wherever tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _named(name: str) -> torch.device:
    try:
        device = torch.device(name.strip())
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cuda", "cpu"):
        raise InputError("unknown device", got=name, expected="cuda, cuda:N, or cpu")
    if device.type == "cuda":
        _check_cuda(device)
    return device


def _check_cuda(device: torch.device) -> None:
    if torch.version.cuda is None:
        fix = f"install a CUDA build of torch, or {_INSTEAD}"
        raise UnsupportedError("this torch was built without CUDA", got=torch.__version__, fix=fix)
    if not torch.cuda.is_available():
        what = "torch finds no NVIDIA GPU, or the driver is older than its CUDA"
        raise UnsupportedError(what, expected=f"CUDA {torch.version.cuda}", fix=_INSTEAD)
    n = torch.cuda.device_count()
    if (device.index or 0) >= n:
        raise InputError("no such GPU", got=str(device), expected=f"cuda:0 to cuda:{n - 1}")
    _check_triton()
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        got = f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}"
        raise UnsupportedError("this GPU is too old for the kernels", got=got, expected="8.0", fix=_INSTEAD)


def _check_triton() -> None:
    least = ".".join(map(str, _TRITON))
    fix = f"`pip install 'triton>={least}'`, or {_INSTEAD}"
    try:
        from triton import __version__ as found  # nightly builds have another name for pip
    except ImportError:
        raise UnsupportedError("Triton is not installed", fix=fix) from None
    if tuple(int(part) for part in found.split(".")[:2]) < _TRITON:
        raise UnsupportedError("this Triton is too old for the kernels", got=found, expected=least, fix=fix)


def operators(device: torch.device) -> ModuleType:
    """The operators for a device: Triton's on a GPU, plain torch elsewhere. Both have the same functions."""
    if device.type == "cuda":
        from hotcold.runtime.triton import ops

        return ops
    from hotcold.runtime.triton import reference

    return reference


def free_bytes(device: torch.device) -> int:
    """Memory that a model may use: what is free on a GPU, minus a margin, or what is available on a CPU."""
    if device.type == "cuda":
        return max(0, torch.cuda.mem_get_info(device)[0] - _MARGIN)
    return available_memory()


def parse_budgets(text: str, devices: Sequence[torch.device]) -> list[int]:
    """Bytes of `--vram-budget` for each device: a size for all, or one for each; `auto` is all that is free.

    Raises InputError for an invalid size or number of sizes, UnsupportedError for more than is free.
    """
    sizes = text.split(",")
    if len(sizes) not in (1, len(devices)):
        expected = f"one size, or {len(devices)}"
        raise InputError("--vram-budget does not match the number of devices", got=text, expected=expected)
    sizes *= len(devices) if len(sizes) == 1 else 1
    return [_budget(size.strip(), device) for size, device in zip(sizes, devices, strict=True)]


def _budget(text: str, device: torch.device) -> int:
    free = free_bytes(device)
    if text == "auto":
        return free
    budget = parse_bytes(text)
    if budget > free:
        got, there = format_bytes(budget), f"at most {format_bytes(free)}"
        what = "--vram-budget exceeds the free memory"
        raise UnsupportedError(what, where=str(device), got=got, expected=there, fix="use --vram-budget auto")
    return budget


@contextmanager
def memory_or_error(device: torch.device) -> Iterator[None]:
    """Turn running out of GPU memory into one line, and release what was loaded so far."""
    short = False
    try:
        yield
    except torch.OutOfMemoryError:
        short = True
    if not short:
        return
    # Outside of the handler, so that no traceback keeps tensors alive.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise UnsupportedError(
        "out of GPU memory",
        where=str(device),
        fix="lower --vram-budget or -c, or use --backend cpu",
    )
