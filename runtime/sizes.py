"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from hotcold.errors import InputError

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_UNIT = re.compile(r"(?:([KMGT])(?:I?B)?|(B))?\Z")


def parse_bytes(text: str) -> int:
    """`6G`, `512M`, `6.5GiB`, `1000B`, or a number of GiB as PowerInfer takes it: `6`. Units are powers of
    1024. Raises InputError."""
    number, unit, byte, _ = _UNIT.split(text.strip().upper(), maxsplit=1)
    try:
        value = float(number) * _UNITS[unit or byte or "G"]
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError("not a size in bytes", got=text, expected="such as 6G, 512M, or auto")
    if not (unit or byte) and value >= _UNITS["T"] << 10:  # a number of bytes, as was meant before
        fix = f"write {text.strip()}B to mean bytes"
        raise InputError("a number without a unit is GiB", got=text, fix=fix)
    return int(value)


def format_bytes(n: float) -> str:
    """`6.00 GiB`, `512.0 MiB`: for people."""
    return f"{n / (1 << 30):.2f} GiB" if n >= 1 << 30 else f"{n / (1 << 20):.1f} MiB"
