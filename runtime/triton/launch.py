"""How kernels are launched: through torch's `wrap_triton`, or as they are under Triton's interpreter.

With TRITON_INTERPRET=1 in the environment before Triton is imported, kernels run on the CPU, slowly, in
numpy: the tests without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from triton import knobs

__all__ = ["interpreted", "wrap_triton"]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(knobs.runtime.interpret)


def wrap_triton(kernel: Any) -> Any:
    """torch.library.wrap_triton, which knows compiled kernels only."""
    return kernel if interpreted() else torch.library.wrap_triton(kernel)
