"""A matrix of neuron rows on a device, in the form that the kernels read.

Float types stay as they are. GGUF's blocks of 18 or 34 bytes cannot be loaded in aligned vectors, so
quantized rows are taken apart: all quants of a row side by side, the scales in a matrix of their own. Q4_0
nibbles are paired with their neighbors (weights 2i and 2i+1 share byte i), so that a byte is decoded where
it is loaded; GGUF pairs weight i with i+16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from hotcold.errors import ShapeError, UnsupportedError

__all__ = ["FLOAT", "Q4_0", "Q8_0", "Rows", "joined"]

FLOAT, Q8_0, Q4_0 = 0, 1, 2  # what `kind` may be; the kernels know the same numbers

_BLOCK = 32  # weights that share a scale, as in GGUF
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTS = {"Q8_0": (Q8_0, _BLOCK), "Q4_0": (Q4_0, _BLOCK // 2)}  # kind, bytes of quants per block


@dataclass(frozen=True, slots=True)
class Rows:
    """`n` rows of `width` weights.

    `data` is [n, width] of a float type, int8 [n, width] for Q8_0, or uint8 [n, width / 2] for Q4_0; `scales`
    is float16 [n, width / 32], or empty for floats.
    """

    data: Tensor
    scales: Tensor
    kind: int
    width: int

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all rows take."""
        return self.data.nbytes + self.scales.nbytes

    @property
    def row_bytes(self) -> int:
        """Bytes that reading one row moves."""
        return self.nbytes // max(self.n, 1)

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Rows of a float tensor [n, width], shared with it."""
        if values.ndim != 2 or values.dtype not in _FLOATS.values():
            got = f"{values.dtype} {list(values.shape)}"
            raise ShapeError("rows must form a float matrix", got=got, expected="[n, width]")
        return cls(values.contiguous(), values.new_empty((0, 0), dtype=torch.float16), FLOAT, values.shape[1])

    @classmethod
    def from_gguf(
        cls, type_name: str, data: np.ndarray, width: int, device: torch.device | str = "cpu"
    ) -> Self:
        """Rows of a GGUF tensor of `type_name` (F32, F16, BF16, Q8_0, Q4_0), its bytes in `data`.

        Raises UnsupportedError for another type, ShapeError if the bytes are not whole rows.
        """
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if type_name in _FLOATS:
            return cls._from_floats(_FLOATS[type_name], data, width, device)
        if type_name not in _QUANTS:
            known = ", ".join([*_FLOATS, *_QUANTS])
            raise UnsupportedError("the GPU kernels do not support this type", got=type_name, expected=known)
        kind, quant_bytes = _QUANTS[type_name]
        blocks = _whole_rows(data, width // _BLOCK * (2 + quant_bytes), width % _BLOCK == 0)
        blocks = blocks.reshape(len(blocks), width // _BLOCK, 2 + quant_bytes)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        quants = _quants(kind, blocks[..., 2:]).reshape(len(blocks), -1)
        return cls(torch.from_numpy(quants).to(device), torch.from_numpy(scales).to(device), kind, width)

    @classmethod
    def _from_floats(
        cls, dtype: torch.dtype, data: np.ndarray, width: int, device: torch.device | str
    ) -> Self:
        rows = _whole_rows(data, width * dtype.itemsize, True)
        values = torch.from_numpy(rows.copy()).view(dtype)
        return cls.of(values.to(device))

    def take(self, index: Tensor) -> Self:
        """Rows `index` (int64), copied."""
        scales = self.scales if self.kind == FLOAT else self.scales[index]
        return type(self)(self.data[index].contiguous(), scales, self.kind, self.width)

    def first(self, n: int) -> Self:
        """The first n rows, shared with these."""
        return type(self)(self.data[:n], self.scales[:n], self.kind, self.width)

    def to(self, device: torch.device | str) -> Self:
        """The same rows in another memory."""
        return type(self)(self.data.to(device), self.scales.to(device), self.kind, self.width)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All weights, [n, width]; exact in float32, for Q8_0 and Q4_0 scale · quant as ggml defines them."""
        if self.kind == FLOAT:
            return self.data.to(dtype)
        quants = self.data
        if self.kind == Q4_0:
            quants = torch.stack([self.data & 15, self.data >> 4], -1).flatten(1).to(torch.int8) - 8
        blocks = quants.float().unflatten(1, (-1, _BLOCK)) * self.scales.float()[..., None]
        return blocks.flatten(1).to(dtype)


def joined(parts: Sequence[Rows]) -> list[Rows]:
    """One matrix of the rows of all, for one kernel to read; where types differ, `parts` as they are."""
    first = parts[0]
    if any(
        (part.kind, part.data.dtype, part.width) != (first.kind, first.data.dtype, first.width)
        for part in parts
    ):
        return list(parts)
    data, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("data", "scales"))
    return [Rows(data, scales, first.kind, first.width)]


def _whole_rows(data: np.ndarray, row_bytes: int, width_fits: bool) -> np.ndarray:
    if not width_fits or row_bytes == 0 or data.size % row_bytes:
        raise ShapeError(
            "tensor data is not a whole number of rows",
            got=f"{data.size} bytes",
            expected=f"rows of {row_bytes}",
        )
    return data.reshape(-1, row_bytes)


def _quants(kind: int, blocks: np.ndarray) -> np.ndarray:
    """Quants [rows, blocks, bytes] as GGUF has them, in the order that `Rows` keeps."""
    if kind == Q8_0:
        return np.ascontiguousarray(blocks).view(np.int8)
    in_order = np.concatenate([blocks & 15, blocks >> 4], -1)  # [rows, blocks, 32]
    return in_order[..., 0::2] | in_order[..., 1::2] << 4
