"""Rows as GGUF stores them, and the measures that tests of the engine share."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, quants

TYPES = {"F32": 0, "F16": 1, "BF16": 2, "Q8_0": 3, "Q4_0": 4}  # the engine's numbers
ACTIVITY = {"none": 0.0, "one": -1.0, "1%": 0.01, "10%": 0.1, "50%": 0.5, "all": 1.0}  # shares; below 0: one


def stored(kind: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GGUF bytes uint8 [n, row] of `rows` [n, columns], and the values they stand for, float64."""
    tensor_type = GGMLQuantizationType[kind]
    data = quants.quantize(rows.astype(np.float32), tensor_type)
    values = quants.dequantize(data, tensor_type).reshape(rows.shape)
    return np.ascontiguousarray(data).view(np.uint8).reshape(len(rows), -1).copy(), values.astype(np.float64)


def poison(kind: str, data: np.ndarray, rows: np.ndarray) -> None:
    """Overwrite rows of `data` with NaN: floats themselves, or the f16 scale of every block."""
    if kind in ("Q8_0", "Q4_0"):
        block = 34 if kind == "Q8_0" else 18
        scales = data[rows].reshape(len(rows), data.shape[1] // block, block)
        scales[:, :, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
        data[rows] = scales.reshape(len(rows), data.shape[1])
    else:
        data[rows] = 0xFF  # NaN in all float formats


def interleave(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of q or k in the order of llama.cpp's `llama` architecture: pairs to be rotated side by side."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, 2, rows // n_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Root of the mean square of the error, over that of what is expected."""
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(np.square(expected))))
