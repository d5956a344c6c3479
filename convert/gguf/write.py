"""Write GGUF files, one tensor at a time, so that no more than one is in memory.

The types of metadata are those of the values: `np.uint32(3)`, `np.float32(1e-5)`, `True`, `"text"`, a
list of strings, or a numpy array. A plain int or float is refused, since GGUF's readers insist on exact
types.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hotcold import storage
from hotcold.errors import ShapeError
from hotcold.files.gguf import DEFAULT_ALIGNMENT, Tensor, row_bytes, type_ids
from hotcold.files.quantize import quantize
from hotcold.files.stored import check_stored
from hotcold.progress import Progress

__all__ = ["Metadata", "TensorPlan", "copied", "planned", "write_gguf"]

Metadata = Mapping[str, Any]

_VERSION = 3
_KINDS = {
    "u1": 0,
    "i1": 1,
    "u2": 2,
    "i2": 3,
    "u4": 4,
    "i4": 5,
    "f4": 6,
    "b1": 7,
    "u8": 10,
    "i8": 11,
    "f8": 12,
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to come: `load()` gives its ggml bytes (any dtype, contiguous), when its turn has come.

    `shape` is in numpy order, `type` a `gguf.GGMLQuantizationType` name.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    load: Callable[[], np.ndarray]

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor in the file, without padding."""
        rows = int(np.prod(self.shape[:-1], dtype=object))
        return rows * row_bytes(self.type, self.shape[-1])


def planned(name: str, shape: Sequence[int], type_name: str, load: Callable[[], np.ndarray]) -> TensorPlan:
    """Plan a tensor whose `load()` gives floats of `shape`, to be quantized to `type_name`.

    Writing it raises FormatError if one of them does not fit that type.
    """

    def quantized() -> np.ndarray:
        array = load()
        if array.shape != tuple(shape):
            raise ShapeError("wrong tensor shape", where=name, got=array.shape, expected=tuple(shape))
        return check_stored(quantize(array, type_name), type_name, name, None)

    return TensorPlan(name, tuple(shape), type_name, quantized)


def copied(tensor: Tensor, name: str | None = None, shape: Sequence[int] | None = None) -> TensorPlan:
    """Plan a tensor of another file byte for byte, optionally under a new name or shape."""
    return TensorPlan(name or tensor.name, tuple(shape or tensor.shape), tensor.type, lambda: tensor.data)


def write_gguf(
    path: str | Path, metadata: Metadata, plans: Sequence[TensorPlan], *, magic: str = "GGUF"
) -> None:
    """Write a GGUF v3 file atomically; `magic` is `GGUF`, or `PWRI` for PowerInfer's sparse models.

    Raises StorageError if the write fails; nothing is left behind then.
    """
    header = [magic.encode(), struct.pack("<IQQ", _VERSION, len(plans), len(metadata))]
    header += [_string(key) + _value(key, value) for key, value in metadata.items()]
    header += _tensor_infos(plans, type_ids(magic))
    total = sum(plan.n_bytes for plan in plans)
    with storage.atomic_file(path) as file, Progress(Path(path).name, total >> 20, "MB") as progress:
        _write_padded(file, b"".join(header))
        written = 0
        for plan in plans:
            _write_padded(file, _checked_bytes(plan))
            written += plan.n_bytes
            progress.advance((written >> 20) - progress.done)


def _tensor_infos(plans: Sequence[TensorPlan], ids: Mapping[str, int]) -> list[bytes]:
    infos, offset = [], 0
    for plan in plans:
        dims = struct.pack(f"<I{len(plan.shape)}Q", len(plan.shape), *reversed(plan.shape))
        infos.append(_string(plan.name) + dims + struct.pack("<IQ", ids[plan.type], offset))
        offset += plan.n_bytes + _padding(plan.n_bytes)
    return infos


def _checked_bytes(plan: TensorPlan) -> memoryview:
    data = np.ascontiguousarray(plan.load())
    if data.nbytes != plan.n_bytes:
        raise ShapeError("wrong tensor size", where=plan.name, got=data.nbytes, expected=plan.n_bytes)
    return data.reshape(-1).view(np.uint8).data


def _padding(n_bytes: int) -> int:
    return -n_bytes % DEFAULT_ALIGNMENT


def _write_padded(file: BinaryIO, data: bytes | memoryview) -> None:
    storage.fs.write(file, data)
    storage.fs.write(file, bytes(_padding(len(data))))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, bool):
        value = np.bool_(value)
    if not isinstance(value, np.generic | np.ndarray):
        raise TypeError(f"{key}: GGUF needs an exact type such as np.uint32, not {type(value).__name__}")
    kind = struct.pack("<I", _KINDS[value.dtype.str[1:]])
    if isinstance(value, np.ndarray):
        kind = struct.pack("<I", _ARRAY) + kind + struct.pack("<Q", value.size)
    return kind + value.astype(value.dtype.newbyteorder("<")).tobytes()
