"""Read JSON objects that others wrote: every problem becomes a FormatError with file and field.

Also the JSON that hotcold prints, which never contains NaN, since JSON has none.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hotcold.errors import FormatError, InputError
from hotcold.progress import log

__all__ = ["json_text", "parse_json", "read_json", "read_json_lines"]


def json_text(value: Any, *, ensure_ascii: bool = True) -> str:
    """`value` as one line of JSON; NaN, such as a figure that was not measured, becomes null."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), ensure_ascii=ensure_ascii, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError if there is no file, FormatError if it is not JSON."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", where=path) from error
    return parse_json(data, path)


def read_json_lines(path: Path, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The JSON objects in a file with one per line; none if there is no file.

    A last line without a newline was cut by a kill, and is ignored. Raises FormatError for any other damaged
    line, unless `skip_damaged`, for files that only save work: then it is logged and ignored.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", where=path) from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse_json(line, path, f"line {number}"))
        except FormatError as error:
            if not skip_damaged:
                raise
            log(f"ignored: {error}")
    return found


def parse_json(data: bytes, path: Path, field: str = "content") -> dict[str, Any]:
    """Parse a JSON object in UTF-8. A duplicate key is refused, because readers would differ."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique)
    except _Duplicate as error:
        raise FormatError("duplicate key", where=path, field=field, got=repr(error.args[0])) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5,000 digits, too deep
        raise FormatError(f"is not JSON: {error}", where=path, field=field) from error
    if not isinstance(value, dict):
        got = type(value).__name__
        raise FormatError("is not a JSON object", where=path, field=field, got=got, expected="object")
    return value


class _Duplicate(Exception):
    """A duplicate key."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Duplicate(next(name for name in names if names.count(name) > 1)[:60])
    return unique
