"""Whether the bytes of a tensor decode to finite numbers, told without decoding them.

Floats that are not finite have an exponent of all ones, and a block of a quantized type is finite where its
scales are. So a look at the bits is enough, in pieces that stay in the cache: loading a model hardly takes
longer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hotcold.finite import not_finite

__all__ = ["check_stored"]

_PIECE = 1 << 16  # numbers looked at at a time
_F16 = 0x7C00  # exponent bits
_FLOATS = {
    "F64": ("<u8", 0x7FF0000000000000), "F32": ("<u4", 0x7F800000), "F16": ("<u2", _F16),
    "BF16": ("<u2", 0x7F80),
}  # fmt: skip
# Bytes of a block, and where its scales stand, which are F16
_BLOCKS = {
    "Q4_0": (18, (0,)), "Q4_1": (20, (0, 2)), "Q5_0": (22, (0,)), "Q5_1": (24, (0, 2)), "Q8_0": (34, (0,)),
}  # fmt: skip


def check_stored(data: np.ndarray, type_name: str, name: str, where: str | Path | None) -> np.ndarray:
    """The same bytes, uint8 or a view of them; FormatError if a value of the tensor `name` is not finite.

    `type_name` is a ggml type that `hotcold export` writes.
    """
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if type_name in _FLOATS:
        kind, mask = _FLOATS[type_name]
        finite = _exponents_below(data.view(kind), mask)
    else:
        size, offsets = _BLOCKS[type_name]
        finite = all(_exponents_below(_strided(data, offset, size), _F16) for offset in offsets)
    if not finite:
        raise not_finite(name, where, type_name)
    return data


def _strided(data: np.ndarray, offset: int, step: int) -> np.ndarray:
    """One uint16 of each block."""
    return np.ndarray((len(data) // step,), "<u2", data, offset, (step,)) if len(data) else data


def _exponents_below(bits: np.ndarray, mask: int) -> bool:
    """Whether no element has all bits of `mask`."""
    room = np.empty(min(_PIECE, len(bits)), bits.dtype)
    for at in range(0, len(bits), _PIECE):
        piece = bits[at : at + _PIECE]
        if np.bitwise_and(piece, bits.dtype.type(mask), out=room[: len(piece)]).max() == mask:
            return False
    return True
