"""Read GGUF files that may be broken or hostile: every number is checked before it is used.

The only way that GGUF enters hotcold. The `gguf` package's reader makes a Python object of every array
element, accepts overlapping, unaligned, and wrapping tensors, and 160 bytes can make it allocate
gigabytes. Here the file is mapped, sizes are Python integers (nothing wraps), and each count is bounded
by the bytes that are left before anything is allocated for it. Every problem is a FormatError
with offset and field.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
PowerInfer's files are the same with the magic `PWRI` and the type ids of November 2023.

A mapped file must not shrink while it is in use: the operating system answers that with SIGBUS.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hotcold.errors import FormatError, InputError

__all__ = ["GGUFFile", "Tensor"]

DEFAULT_ALIGNMENT = 32
MAGICS = {b"GGUF": "GGUF", b"PWRI": "PWRI"}
VERSIONS = (2, 3)

_MAX_STRING = 1 << 30
_MAX_ARRAY = 1 << 30
_MAX_KEY = (1 << 16) - 1
_MAX_NAME = 63  # ggml keeps 64 bytes, the last of them a zero
_MAX_DIMS = 4
_MAX_BYTES = (1 << 63) - 1
_MIN_KV = 8 + 1 + 4 + 1  # length and one byte of key, type, one byte of value
_MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # length and one byte of name, n_dims, one dimension, type, offset

_NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_NAME = re.compile(r"[A-Za-z0-9_.:+-]+")

_TYPE_NAMES = {int(kind): kind.name for kind in GGMLQuantizationType}
# Ids from 16 on were reassigned after PowerInfer forked (its ggml.h, enum ggml_type).
_PWRI_TYPE_NAMES = {i: name for i, name in _TYPE_NAMES.items() if i < 16} | {16: "I8", 17: "I16", 18: "I32"}
# PowerInfer has no bfloat16; only hotcold reads a file that uses it.
_PWRI_TYPE_NAMES[int(GGMLQuantizationType.BF16)] = "BF16"


def type_ids(magic: str) -> dict[str, int]:
    """ggml type -> its number in files with this magic; PowerInfer's I8, I16 and I32 have old ones."""
    return {name: number for number, name in (_PWRI_TYPE_NAMES if magic == "PWRI" else _TYPE_NAMES).items()}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a mapped file.

    `shape` is in numpy order (rows first), `type` a `gguf.GGMLQuantizationType` name such as `"Q4_0"`,
    `data` the raw bytes, a read-only uint8 view of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: np.ndarray


def row_bytes(type_name: str, n: int) -> int:
    """Bytes of a row of `n` elements in a ggml type; ValueError unless `n` is a multiple of its block."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    if n % block:
        raise ValueError(f"{n} is not a multiple of {type_name}'s block of {block}")
    return n // block * size


class GGUFFile:
    """A validated GGUF file.

    `metadata` holds Python numbers, strings, lists of strings, and read-only numpy views of numeric arrays.

    Raises InputError if the file cannot be opened, FormatError if it breaks the format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.paths, self.buffers = [self.path], [_map(self.path)]  # of a split model: those of all parts
        reader = _Reader(self.path, self.buffers[0])
        self.magic: str = reader.magic()
        self.version: int = reader.version()
        n_tensors = reader.count("n_tensors", _MIN_TENSOR)
        n_kv = reader.count("n_kv", _MIN_KV)
        self.metadata: dict[str, Any] = reader.metadata(n_kv)
        self.alignment: int = reader.alignment
        self.tensors: dict[str, Tensor] = reader.tensors(n_tensors, sparse=self.magic == "PWRI")

    def find(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """As `require`, but `default` if there is no such key."""
        return self.require(key, kind) if key in self.metadata else default

    def require(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value of `key`, which must be of the Python type `kind`; FormatError otherwise.

        Always read keys through it: a file may have an array where a string belongs, and comparing the two is
        an error in numpy.
        """
        if key not in self.metadata:
            raise FormatError("missing metadata key", where=self.path, field=key)
        value = self.metadata[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
            got = type(value).__name__
            raise FormatError("wrong type of metadata", where=self.path, field=key, got=got, expected=wanted)
        return value

    def count(self, key: str, default: int | None = None, most: int = (1 << 31) - 1) -> int:
        """The positive integer under `key`, which sizes memory: at most `most`, FormatError otherwise."""
        value = self.require(key, int) if default is None else self.find(key, int, default)
        if not 0 < value <= most:
            expected = f"1 to {most}"
            raise FormatError("bad value", where=self.path, field=key, got=value, expected=expected)
        return value


def _map(path: Path) -> mmap.mmap | bytes:
    if path.exists() and not path.is_file():  # opening a pipe would wait forever
        raise InputError("not a regular file", where=path)
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"cannot open the file: {error.strerror}", where=path) from error


class _Reader:
    """A cursor over the mapped bytes; its methods follow the order of the format."""

    def __init__(self, path: Path, buffer: mmap.mmap | bytes) -> None:
        self.path, self.buffer, self.size = path, buffer, len(buffer)
        self.position = 0
        self.alignment = DEFAULT_ALIGNMENT

    # --- errors and primitive values

    def fail(
        self, what: str, field: str, *, at: int, got: object = None, expected: object = None
    ) -> FormatError:
        return FormatError(what, where=self.path, offset=at, field=field, got=got, expected=expected)

    def need(self, n_bytes: int, field: str) -> None:
        left = self.size - self.position
        if n_bytes > left:
            raise self.fail(
                "the file ends too early", field, at=self.position, got=f"{left} bytes", expected=n_bytes
            )

    def u32(self, field: str) -> int:
        self.need(4, field)
        (value,) = _U32.unpack_from(self.buffer, self.position)
        self.position += 4
        return value

    def u64(self, field: str) -> int:
        self.need(8, field)
        (value,) = _U64.unpack_from(self.buffer, self.position)
        self.position += 8
        return value

    def string(self, field: str, longest: int = _MAX_STRING) -> str:
        start = self.position
        length = self.u64(f"{field}.length")
        limit = min(longest, self.size - self.position)
        if length > limit:
            raise self.fail(
                "string too long", f"{field}.length", at=start, got=length, expected=f"at most {limit}"
            )
        raw = self.buffer[self.position : self.position + length]
        self.position += length
        return self.decode(raw, field, start + 8)

    def decode(self, raw: bytes, field: str, at: int) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail("not UTF-8", field, at=at + error.start) from error

    # --- header

    def magic(self) -> str:
        magic = bytes(self.buffer[:4])
        if magic not in MAGICS:
            raise self.fail("not a GGUF file", "magic", at=0, got=magic, expected="GGUF or PWRI")
        self.position = 4
        return MAGICS[magic]

    def version(self) -> int:
        version = self.u32("version")
        if version and not version & 0xFFFF:
            raise self.fail("a big-endian file", "version", at=4, got=version, expected="little endian")
        if version not in VERSIONS:
            raise self.fail("unknown version", "version", at=4, got=version, expected="2 or 3")
        return version

    def count(self, field: str, each: int) -> int:
        start = self.position
        count = self.u64(field)
        limit = (self.size - self.position) // each
        if count > limit:
            raise self.fail(
                "more entries than the file can hold", field, at=start, got=count, expected=f"at most {limit}"
            )
        return count

    # --- metadata

    def metadata(self, n_kv: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(n_kv):
            at = self.position
            key = self.string(f"kv[{i}].key", _MAX_KEY)
            if not key or not key.isprintable():
                raise self.fail("a key must be printable text", f"kv[{i}].key", at=at, got=ascii(key))
            if key in metadata:
                raise self.fail("duplicate key", f"kv[{i}].key", at=at, got=key)
            metadata[key] = self.value(key)
        return metadata

    def value(self, key: str) -> Any:
        at = self.position
        kind = self.u32(f"{key}.type")
        if key == "general.alignment":
            return self.read_alignment(key, kind, at)
        if kind == _ARRAY:
            return self.array(key)
        if kind == _STRING:
            return self.string(key)
        return self.numbers(key, kind, 1, at)[0].item()

    def read_alignment(self, key: str, kind: int, at: int) -> int:
        if kind != _UINT32:
            raise self.fail("wrong type", f"{key}.type", at=at, got=kind, expected=f"{_UINT32} (uint32)")
        value = self.u32(key)
        if value == 0 or value & (value - 1):
            raise self.fail("not a power of two", key, at=at + 4, got=value)
        self.alignment = value
        return value

    def array(self, key: str) -> list[str] | np.ndarray:
        at = self.position
        kind = self.u32(f"{key}.element_type")
        if kind == _ARRAY:
            raise self.fail("nested arrays are not allowed", f"{key}.element_type", at=at, got=kind)
        start = self.position
        count = self.u64(f"{key}.length")
        if count > _MAX_ARRAY:
            raise self.fail(
                "array too long", f"{key}.length", at=start, got=count, expected=f"at most {_MAX_ARRAY}"
            )
        return (
            self.strings(key, count, start) if kind == _STRING else self.numbers(key, kind, count, at, start)
        )

    def strings(self, key: str, count: int, start: int) -> list[str]:
        limit = (self.size - self.position) // 8
        if count > limit:
            raise self.fail(
                "array too long", f"{key}.length", at=start, got=count, expected=f"at most {limit}"
            )
        return [self.element(key, i) for i in range(count)]

    def element(self, key: str, i: int) -> str:
        # As `string`, without building the field's name: vocabularies have a hundred thousand elements.
        begin = self.position + 8
        if begin <= self.size:
            end = begin + _U64.unpack_from(self.buffer, self.position)[0]
            if end <= self.size:
                self.position = end
                raw = self.buffer[begin:end]
                return raw.decode() if raw.isascii() else self.decode(raw, f"{key}[{i}]", begin)
        return self.string(f"{key}[{i}]")  # names what is wrong

    def numbers(self, key: str, kind: int, count: int, at: int, start: int | None = None) -> np.ndarray:
        if kind != _BOOL and kind not in _NUMBERS:
            field = f"{key}.type" if start is None else f"{key}.element_type"
            raise self.fail("unknown value type", field, at=at, got=kind, expected="0 to 12")
        dtype = np.dtype(_NUMBERS.get(kind, "u1"))
        limit = (self.size - self.position) // dtype.itemsize
        if count > limit:
            field, place = (key, self.position) if start is None else (f"{key}.length", start)
            raise self.fail(
                "the file ends too early", field, at=place, got=count, expected=f"at most {limit}"
            )
        array = np.frombuffer(self.buffer, dtype, count, self.position)
        if kind == _BOOL:
            if count and array.max() > 1:
                raise self.fail("a bool must be 0 or 1", key, at=self.position, got=int(array.max()))
            array = array.view(bool)
        self.position += count * dtype.itemsize
        return array

    # --- tensors

    def tensors(self, n_tensors: int, *, sparse: bool) -> dict[str, Tensor]:
        types = _PWRI_TYPE_NAMES if sparse else _TYPE_NAMES
        infos: dict[str, tuple[tuple[int, ...], str, int, int, int]] = {}
        for i in range(n_tensors):
            at = self.position
            name = self.tensor_name(i)
            if name in infos:
                raise self.fail("duplicate tensor name", f"tensor[{i}].name", at=at, got=name)
            infos[name] = self.tensor_info(name, types)
        begin = self.padded(self.position)
        expected = 0
        tensors: dict[str, Tensor] = {}
        for name, (shape, kind, n_bytes, offset, at) in infos.items():
            if offset != expected:
                what = "tensors must follow each other, aligned and without gaps"
                raise self.fail(what, f"{name}.offset", at=at, got=offset, expected=expected)
            tensors[name] = Tensor(name, shape, kind, self.tensor_data(name, begin + offset, n_bytes))
            expected = self.padded(offset + n_bytes)
        return tensors

    def tensor_name(self, i: int) -> str:
        at = self.position
        name = self.string(f"tensor[{i}].name", _MAX_NAME)
        if not _NAME.fullmatch(name) or ".." in name:
            raise self.fail(
                "a tensor name may only contain letters, digits, and _.:+-",
                f"tensor[{i}].name",
                at=at,
                got=ascii(name),
            )
        return name

    def tensor_info(self, name: str, types: dict[int, str]) -> tuple[tuple[int, ...], str, int, int, int]:
        """Shape, type, bytes, offset, and where the offset stands."""
        at = self.position
        n_dims = self.u32(f"{name}.n_dims")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self.fail(
                "wrong number of dimensions", f"{name}.n_dims", at=at, got=n_dims, expected="1 to 4"
            )
        dims_at = self.position
        dims = [self.u64(f"{name}.dims[{axis}]") for axis in range(n_dims)]
        type_at = self.position
        kind = self.u32(f"{name}.type")
        if kind not in types:
            raise self.fail("unknown or removed tensor type", f"{name}.type", at=type_at, got=kind)
        n_bytes = self.tensor_bytes(name, dims, types[kind], dims_at)
        offset_at = self.position
        return tuple(reversed(dims)), types[kind], n_bytes, self.u64(f"{name}.offset"), offset_at

    def tensor_bytes(self, name: str, dims: list[int], type_name: str, at: int) -> int:
        if max(dims) > _MAX_BYTES:
            raise self.fail(
                "negative dimension", f"{name}.dims", at=at, got=max(dims), expected=f"at most {_MAX_BYTES}"
            )
        block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
        if dims[0] % block:
            expected = f"a multiple of {type_name}'s block of {block}"
            raise self.fail(
                "a row is not a whole number of blocks", f"{name}.dims", at=at, got=dims[0], expected=expected
            )
        n_bytes = row_bytes(type_name, dims[0]) * prod(dims[1:])
        # A zero dimension must not hide that the others are more than any program can index. Whatever the
        # type, values are decoded to floats: a number is taken as eight bytes.
        if 8 * prod(max(size, 1) for size in dims) > _MAX_BYTES:
            raise self.fail("tensor too large", f"{name}.dims", at=at, got="×".join(map(str, dims)))
        return n_bytes

    def padded(self, n: int) -> int:
        return -(-n // self.alignment) * self.alignment

    def tensor_data(self, name: str, begin: int, n_bytes: int) -> np.ndarray:
        if n_bytes == 0:
            return np.frombuffer(b"", np.uint8)
        if begin + n_bytes > self.size:
            left = max(0, self.size - begin)
            what = "the file ends inside the tensor"
            raise self.fail(
                what, f"{name}.data", at=min(begin, self.size), got=f"{left} bytes", expected=n_bytes
            )
        return np.frombuffer(self.buffer, np.uint8, n_bytes, begin)
