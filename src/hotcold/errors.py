"""Named errors: each says what is wrong, where, what was found, what was expected, and what to do.

The command line prints `str(error)` as one line and exits with 2; a traceback appears only with `--debug`.
"""

from __future__ import annotations

from os import PathLike

__all__ = [
    "FormatError",
    "HotcoldError",
    "InputError",
    "MismatchError",
    "ShapeError",
    "StorageError",
    "UnsupportedError",
]


_LONGEST = 300  # characters of a value in a message


class HotcoldError(Exception):
    """Base of every error that a user can cause or fix.

    `what` is a short sentence; the others are optional: `where` a path, key or offset, `got` and `expected`
    the two sides of a failed check, `fix` the next step.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | PathLike[str] | None = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        super().__init__(self._line())

    def _line(self) -> str:
        line = self.what if self.where is None else f"{self.where}: {self.what}"
        sides = [
            f"{name} {_short(value)}"
            for name, value in (("got", self.got), ("expected", self.expected))
            if value is not None
        ]
        if sides:
            line += f" ({', '.join(sides)})"
        if self.fix:
            line += f"; {self.fix}"
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(line.split()))


def _short(value: object) -> str:
    """Shorten a value: what a file says may be megabytes long."""
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class InputError(HotcoldError):
    """An argument or an input file that cannot be used: missing, empty, too short, unknown name."""


class FormatError(HotcoldError):
    """A file that breaks its format: at byte `offset`, in the part called `field`."""

    def __init__(
        self,
        what: str,
        *,
        where: str | PathLike[str] | None = None,
        offset: int | None = None,
        field: str | None = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.offset, self.field = offset, field
        place = str(where) if where is not None else "file"
        place += f" at byte {offset}" if offset is not None else ""
        place += f", {field}" if field is not None else ""
        super().__init__(what, where=place, got=got, expected=expected, fix=fix)


class ShapeError(HotcoldError):
    """A tensor whose shape or dtype does not fit the model it is meant for."""


class MismatchError(HotcoldError):
    """Two artifacts that do not belong together, such as predictors of another model."""


class UnsupportedError(HotcoldError):
    """A model, activation, type or machine that hotcold does not handle."""


class StorageError(HotcoldError):
    """A durable write that failed: full disk, no permission, I/O error. Nothing half-written is left."""
