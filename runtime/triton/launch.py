"""How kernels are launched: through torch's `wrap_triton`, early where the GPU can (see early.py).

With TRITON_INTERPRET=1 in the environment before Triton is imported, kernels run on the CPU, slowly, in
numpy: the tests without a GPU.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton import knobs

__all__ = ["interpreted", "launch"]

_HOPPER = (9, 0)


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *others: Any, **constants: Any) -> None:
    """Run `kernel` on its arguments `first`, `others` and `constants`, on the device of `first`."""
    if interpreted():  # wrap_triton knows compiled kernels only
        kernel[grid](first, *others, EARLY=False, **constants)
        return
    # torch.compile, whose tensors are of types of its own here, knows no such launches.
    early = type(first) is Tensor and _starts_early(first.device)
    how = {"launch_pdl": True} if early else {}
    torch.library.wrap_triton(kernel)[grid](first, *others, EARLY=early, **constants, **how)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(knobs.runtime.interpret)


@lru_cache
def _starts_early(device: torch.device) -> bool:
    """Whether the device can; HOTCOLD_EARLY=0 in the environment says that it must not."""
    able = torch.cuda.get_device_capability(device) >= _HOPPER
    return able and os.environ.get("HOTCOLD_EARLY") != "0"
