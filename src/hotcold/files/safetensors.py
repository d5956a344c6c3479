"""Read safetensors files tensor by tensor as numpy arrays, bfloat16 included, without torch.

The `safetensors` library checks the header; the bytes are then taken from a map of the file, since
numpy, and with it the library's numpy side, knows no bfloat16.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hotcold.errors import FormatError, InputError, UnsupportedError
from hotcold.files.tensor_check import missing_tensor

__all__ = ["SafetensorsFile"]

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_GLANCE = 4096  # values


class SafetensorsFile:
    """A checked and mapped safetensors file. Raises InputError or FormatError when it cannot be read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError("no such file", where=self.path)
        try:
            with self.path.open("rb") as file:
                self._check()
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:  # no right to read it, too many open files, a broken disk
            raise InputError(f"cannot read the file: {error.strerror or error}", where=self.path) from error
        (n_header,) = struct.unpack_from("<Q", self._map)
        header = json.loads(self._map[8 : 8 + n_header])
        self._metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries: dict[str, dict[str, Any]] = header
        self._begin = 8 + n_header

    def _check(self) -> None:
        try:
            with safe_open(self.path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise FormatError(f"not a safetensors file: {error}", where=self.path) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def metadata(self) -> dict[str, str]:
        """The strings that a writer put beside the tensors."""
        return self._metadata

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; FormatError if the file has none of this name."""
        return tuple(self._entry(name)["shape"])

    def check_floats(self, name: str) -> None:
        """UnsupportedError if a tensor's values are not floating point of 16 bits or more."""
        dtype = self._entry(name)["dtype"]
        if dtype not in _DTYPES:
            expected = " | ".join(_DTYPES)
            raise UnsupportedError(f"dtype of {name}", where=self.path, got=dtype, expected=expected)

    def same(self, name: str, other: SafetensorsFile, other_name: str) -> bool:
        """Whether two tensors are the same, byte for byte."""
        one, two = self._entry(name), other._entry(other_name)
        if (one["dtype"], one["shape"]) != (two["dtype"], two["shape"]):
            return False
        ours, theirs = (f._mapped(entry).reshape(-1) for f, entry in ((self, one), (other, two)))
        bits = f"u{ours.itemsize}"
        # Two matrices differ from the first values on, so that hundreds of megabytes need not be read.
        return all(np.array_equal(ours[:n].view(bits), theirs[:n].view(bits)) for n in (_GLANCE, ours.size))

    def load(self, name: str) -> np.ndarray:
        """A tensor's values as float32, in memory; UnsupportedError if they are not floating point."""
        self.check_floats(name)
        entry = self._entry(name)
        array = self._mapped(entry)
        if entry["dtype"] == "BF16":
            values = (array.astype(np.uint32) << 16).view(np.float32)
        else:
            with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite
                values = array.astype(np.float32)
        self._forget(entry)
        return values

    def floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 tensor of this shape as a read-only view of the file, which takes no memory until read.

        FormatError if it is missing or has another shape or dtype.
        """
        entry = self._entry(name)
        if (entry["dtype"], tuple(entry["shape"])) != ("F32", shape):
            got, expected = f"{entry['dtype']} {entry['shape']}", f"F32 {list(shape)}"
            raise FormatError("wrong shape or dtype", where=self.path, field=name, got=got, expected=expected)
        return self._mapped(entry)

    def _mapped(self, entry: dict[str, Any]) -> np.ndarray:
        begin, end = entry["data_offsets"]
        data = np.frombuffer(self._map, np.uint8, end - begin, self._begin + begin)
        return data.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def _forget(self, entry: dict[str, Any]) -> None:
        """Let go of the pages of a tensor that has been copied: a checkpoint need not fit into memory."""
        begin, end = (self._begin + offset for offset in entry["data_offsets"])
        aligned = begin - begin % mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, aligned, end - aligned)

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._entries:
            raise missing_tensor(name, self.path)
        return self._entries[name]
