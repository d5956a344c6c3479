"""Typed access to a model's `config.json`: every value is checked, every error names file and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hotcold.errors import FormatError, UnsupportedError

__all__ = ["LARGEST", "SMALLEST", "Fields"]

_MOST = (1 << 31) - 1
# Positive numbers that float32 can hold, in which GGUF has them all.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class Fields:
    """The keys of `config.json`; `renamed` maps ours, which are Llama's, to those of another family."""

    def __init__(
        self, config: dict[str, Any], where: str | Path, renamed: dict[str, str] | None = None
    ) -> None:
        self.config, self.where, self._renamed = config, where, renamed or {}

    def __contains__(self, key: str) -> bool:
        return self.config.get(self.name(key)) is not None

    def name(self, key: str) -> str:
        """What this family calls a key."""
        return self._renamed.get(key, key)

    def get(self, key: str, default: Any = None) -> Any:
        """A value, or `default` where it is missing or null; FormatError where there is none either."""
        value = self.config.get(self.name(key))
        value = default if value is None else value
        if value is None:
            raise FormatError("missing key", where=self.where, field=self.name(key))
        return value

    def count(self, key: str, default: int | None = None, most: int = _MOST) -> int:
        """A positive integer, at most `most`."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            limit = "" if most == _MOST else f", at most {most}"
            raise self.bad(key, value, f"a positive integer{limit}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number that float32 can hold."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST:
            raise self.bad(key, value, "a finite number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0 that float32 can hold."""
        value = self.number(key, default)
        if value < SMALLEST:
            raise self.bad(key, value, "a number above 0")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, value, "true or false")
        return value

    def choice(self, key: str, known: tuple[str, ...]) -> str:
        """One of the known names, else UnsupportedError."""
        value = self.get(key)
        if value not in known:
            name = self.name(key)
            raise UnsupportedError(f"unknown {name}", where=self.where, got=value, expected=" | ".join(known))
        return value

    def bad(self, key: str, value: object, expected: str) -> FormatError:
        """The error for a value of the wrong kind."""
        return FormatError("bad value", where=self.where, field=self.name(key), got=value, expected=expected)
