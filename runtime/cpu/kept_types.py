"""The types of weights that both engines have kernels for. Weights of any other type become F16."""

from __future__ import annotations

import math

from hotcold.files.gguf import GGUFFile, Tensor
from hotcold.model.weights import KEPT
from hotcold.progress import log

__all__ = ["kept_bytes", "log_converted"]


def kept_bytes(tensor: Tensor) -> int:
    """Bytes of memory that a tensor of a file takes once it is loaded. Vectors become float32."""
    if len(tensor.shape) == 1:
        return 4 * tensor.shape[0]
    return tensor.data.nbytes if tensor.type in KEPT else 2 * math.prod(tensor.shape)


def log_converted(file: GGUFFile, types: set[str]) -> None:
    """Log which types of a file were converted to F16."""
    if types:
        log(f"{file.path.name}: no kernels for {', '.join(sorted(types))}, converted to F16")
