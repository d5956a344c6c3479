"""The types of weights that both engines have kernels for. Weights of any other type become F16."""

from __future__ import annotations

import math

from hotcold.files.gguf import GGUFFile, Tensor
from hotcold.progress import log

__all__ = ["KEPT", "kept_bytes", "log_converted"]

KEPT = ("F32", "F16", "BF16", "Q8_0", "Q4_0")  # numbered as in csrc/layout.h


def kept_bytes(tensor: Tensor) -> int:
    """Bytes of memory that a tensor of a file takes once it is loaded. Vectors become float32."""
    if len(tensor.shape) == 1:
        return 4 * tensor.shape[0]
    return tensor.data.nbytes if tensor.type in KEPT else 2 * math.prod(tensor.shape)


def log_converted(file: GGUFFile, types: set[str]) -> None:
    """Log which types of a file were converted to F16."""
    if types:
        log(f"{file.path.name}: no kernels for {', '.join(sorted(types))}, converted to F16")
