"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

from hotcold.errors import InputError

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str) -> int:
    """`6G`, `512M`, `6.5GiB` or a plain number of bytes; units are powers of 1024. Raises InputError."""
    number = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = number[-1:] if number[-1:] in _UNITS else ""
    try:
        value = float(number.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError("not a size in bytes", got=text, expected="such as 6G, 512M, or auto")
    return int(value)


def format_bytes(n: float) -> str:
    """`6.00 GiB`, `512.0 MiB`: for people."""
    return f"{n / (1 << 30):.2f} GiB" if n >= 1 << 30 else f"{n / (1 << 20):.1f} MiB"
