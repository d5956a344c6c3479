"""Tensors to and from ggml's types.

`gguf.quants` gives the bytes of ggml's reference quantizers (the tests compare the two), so what is written
here is what llama.cpp's own tools would have written.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hotcold.cpus import available_cpus
from hotcold.errors import UnsupportedError
from hotcold.files.gguf import Tensor, row_bytes

__all__ = ["FLOATS", "QUANTS", "as_f16", "dequantize", "quantize", "row_type", "type_of"]

# what --quant takes -> ggml's type
QUANTS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1",
          "q5_0": "Q5_0", "q5_1": "Q5_1"}  # fmt: skip

FLOATS = ("F64", "F32", "F16", "BF16")  # types whose values are not rounded to blocks

_CHUNK = 1 << 22  # elements that a thread quantizes at a time: numpy's temporaries are several times as big
_THREADS = 8


def type_of(quant: str) -> str:
    """The ggml type of a --quant name; UnsupportedError lists the known ones."""
    if quant not in QUANTS:
        raise UnsupportedError("unknown quantization", got=quant, expected=" | ".join(QUANTS))
    return QUANTS[quant]


def row_type(type_name: str, n: int) -> str:
    """`type_name`, or F16 if rows of `n` elements are not whole blocks of it."""
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return "F16" if n % block else type_name


def quantize(array: np.ndarray, type_name: str) -> np.ndarray:
    """float [..., n] -> the ggml bytes of its rows, uint8 [..., bytes]; `n` a multiple of the block."""
    kind = GGMLQuantizationType[type_name]
    width = array.shape[-1]
    shape = (*array.shape[:-1], row_bytes(type_name, width))
    if array.size == 0:
        return np.empty(shape, np.uint8)
    rows = array.reshape(-1, width)
    step = max(1, _CHUNK // width)
    starts = range(0, len(rows), step)
    # numpy releases the GIL while it computes.
    with ThreadPoolExecutor(min(_THREADS, len(starts), available_cpus())) as pool:
        parts = list(pool.map(lambda i: _quantize_rows(rows[i : i + step], kind), starts))
    return np.concatenate(parts).reshape(shape)


def _quantize_rows(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    # Blocks of zeros have scale 0; what does not fit becomes infinite, which is checked afterwards.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return quants.quantize(rows, kind).view(np.uint8)


def as_f16(values: np.ndarray) -> np.ndarray:
    """float32 values as float16; those beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype(np.float16))


def dequantize(tensor: Tensor) -> np.ndarray:
    """A tensor's values, float32 of its shape. UnsupportedError for types that gguf cannot decode."""
    if tensor.data.size == 0:
        return np.empty(tensor.shape, np.float32)
    if native := {"F64": "<f8", "F32": "<f4", "F16": "<f2"}.get(tensor.type):
        with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite
            return tensor.data.view(native).astype(np.float32, copy=False).reshape(tensor.shape)
    rows = tensor.data.reshape(-1, row_bytes(tensor.type, tensor.shape[-1]))
    try:
        with np.errstate(all="ignore"):  # scales may be infinite or not a number
            values = quants.dequantize(rows, GGMLQuantizationType[tensor.type])
    except NotImplementedError as error:
        raise UnsupportedError(
            "cannot decode this tensor type", where=tensor.name, got=tensor.type
        ) from error
    return values.astype(np.float32, copy=False).reshape(tensor.shape)
