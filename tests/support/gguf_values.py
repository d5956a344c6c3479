"""Mutations that know GGUF: well-formed files with one value of the metadata, or one tensor, exchanged.

`one_value_each` tries all of them, `mutate` one by chance, as their namesakes in mutations.py do with JSON.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

from malformed_gguf import ARRAY, BOOL, F32, F64, I32, I64, STRING, U8, U32, U64, array, gguf, info, kv, text

_SIZES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)  # bytes by value type; of strings and arrays they vary
_FORMATS = {U8: "B", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
_NAN, _INF = float("nan"), float("inf")
# type -> values; arrays have as many elements as what they stand for, and one, and none
_ODD: dict[int, tuple[float | str, ...]] = {
    U8: (0, 255),
    U32: (0, 1, 2, 7, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
    I32: (-1, -(1 << 31)),
    F32: (0.0, -0.5, 0.5, 1e-45, 1e30, _NAN, _INF, -_INF),
    BOOL: (False, True),
    STRING: ("", "x", "../x", "é", "none", "relu", "fatrelu", "silu", "yarn", "linear", "llama", "opt"),
    U64: (1 << 40, (1 << 64) - 1),
    I64: (-(1 << 63),),
    F64: (5e-324, 1e308, _NAN),
}  # fmt: skip


class _Parts:
    """A file that hotcold would accept, taken apart: keys with their raw values, tensors, data."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 24
        self.magic = content[:4]
        n_tensors, n_kv = struct.unpack_from("<QQ", content, 8)
        self.values = [(self._text(), self._value()) for _ in range(n_kv)]
        self.tensors = [self._info() for _ in range(n_tensors)]
        self.data = content[self._at + -self._at % 32 :]

    def _number(self, form: str) -> int:
        self._at += struct.calcsize(form)
        return struct.unpack_from(f"<{form}", self._content, self._at - struct.calcsize(form))[0]

    def _text(self) -> bytes:
        length = self._number("Q")
        self._at += length
        return self._content[self._at - length : self._at]

    def _value(self) -> tuple[bytes, int]:
        """As it stands, with its type; and how many elements, where it is an array."""
        begin, kind, count = self._at, self._number("I"), 1
        if kind == ARRAY:
            kind, count = self._number("I"), self._number("Q")
        self._at += count * _SIZES[kind]
        for _ in range(count if kind == STRING else 0):
            self._text()
        return self._content[begin : self._at], count

    def _info(self) -> tuple[bytes, tuple[int, ...], int, int]:
        """Name, dimensions, type and offset."""
        name = self._text()
        dims = tuple(self._number("Q") for _ in range(self._number("I")))
        return name, dims, self._number("I"), self._number("Q")

    def with_value(self, i: int, odd: bytes) -> bytes:
        """The file with other bytes, or none, in place of key and value `i`."""
        kvs = [text(key) + value for key, (value, _) in self.values]
        infos = [info(*tensor) for tensor in self.tensors]
        return gguf(magic=self.magic, kvs=[*kvs[:i], odd, *kvs[i + 1 :]], infos=infos, data=self.data,
                    n_kv=len(kvs) - (not odd))  # fmt: skip

    def with_tensor(self, i: int, odd: bytes) -> bytes:
        """The file with other bytes in place of what describes tensor `i`."""
        kvs = [text(key) + value for key, (value, _) in self.values]
        infos = [info(*tensor) for tensor in self.tensors]
        return gguf(magic=self.magic, kvs=kvs, infos=[*infos[:i], odd, *infos[i + 1 :]], data=self.data)


def one_value_each(content: bytes) -> Iterator[bytes]:
    """`content` with each value removed, and in turn replaced by each odd one; with each tensor renamed,
    transposed, and of each other type."""
    parts = _Parts(content)
    for i, (key, (_, count)) in enumerate(parts.values):
        for odd in _odd_values(key, count):
            yield parts.with_value(i, odd)
    for i, tensor in enumerate(parts.tensors):
        for odd in _odd_tensors(*tensor):
            yield parts.with_tensor(i, odd)


def mutate(content: bytes, seed: int) -> bytes | None:
    """`content` with one of these changes; None where it is no well-formed file."""
    choose = random.Random(seed)
    try:
        parts = _Parts(content)
    except (struct.error, IndexError, OverflowError, MemoryError):
        return None
    if parts.tensors and choose.random() < 0.3:
        i = choose.randrange(len(parts.tensors))
        return parts.with_tensor(i, choose.choice(list(_odd_tensors(*parts.tensors[i]))))
    if not parts.values:
        return None
    i = choose.randrange(len(parts.values))
    key, (_, count) = parts.values[i]
    return parts.with_value(i, choose.choice(list(_odd_values(key, min(count, 1024)))))


def _odd_tensors(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> Iterator[bytes]:
    yield info("x", dims, kind, offset)
    yield info(name, dims[::-1], kind, offset)
    for other in range(42):
        if other != kind:
            yield info(name, dims, other, offset)


def _odd_values(key: bytes, count: int) -> Iterator[bytes]:
    """The key with each odd value; first nothing at all."""
    yield b""
    for kind, values in _ODD.items():
        for value in values:
            raw = text(str(value)) if kind == STRING else struct.pack(f"<{_FORMATS[kind]}", value)
            yield kv(key, kind, raw)
            for n in {0, 1, count}:
                yield array(key, kind, n, n * raw)
