"""Mutations that know JSON: where random bytes would only ever break the syntax, values are exchanged.

JSON objects, JSON lines and the header of safetensors files are taken apart, changed in one place and put
together again. Everything else is left to libFuzzer. `one_value_each` does the same without chance.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

ODD: list[Any] = [
    None, True, 0, -1, 1, 2, 7, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 63, 1 << 64, -(1 << 63), 0.0, -0.5,
    1e308, 5e-324, float("inf"), float("-inf"), float("nan"), "", "x", "../x", "\0", "é", "F32", "BF16",
    "relu", "fatrelu", "fatrelu_0.01", "silu", "llama3", "yarn", "mistral", "qwen2", [], [0], {}, {"x": 1},
]  # fmt: skip
_GONE = object()


def mutate(data: bytes, seed: int) -> bytes | None:
    """`data` with one JSON value changed, removed or doubled; None where there is no JSON in it."""
    choose = random.Random(seed)
    before, value, after = choose.choice(_taken_apart(data))
    if not isinstance(value, dict):
        return None
    _change(value, choose)
    return _together(before, value, after, ascii_only=choose.random() < 0.5)


def one_value_each(data: bytes, odd: list[Any] = ODD) -> Iterator[bytes]:
    """`data` with each value of its JSON objects removed, and in turn replaced by each of the `odd` ones."""
    for before, value, after in _taken_apart(data):
        if not isinstance(value, dict):
            continue
        for number in range(len(list(_places(value)))):
            for new in [_GONE, *odd]:
                changed = copy.deepcopy(value)
                holder, key = list(_places(changed))[number]
                if new is _GONE:
                    del holder[key]
                else:
                    holder[key] = new
                yield _together(before, changed, after)


def _taken_apart(data: bytes) -> list[tuple[bytes, Any, bytes]]:
    """For each JSON object: what stands before it, the object, what stands after it."""
    if len(data) > 8 and data[8:9] == b"{":
        end = 8 + int.from_bytes(data[:8], "little")
        return [(b"length", _parsed(data[8:end]), data[end:])]
    lines = data.splitlines(keepends=True)
    if len(lines) > 1 and all(line.startswith(b"{") for line in lines):
        return [
            (b"".join(lines[:i]), _parsed(line), b"\n" + b"".join(lines[i + 1 :]))
            for i, line in enumerate(lines)
        ]
    return [(b"", _parsed(data), b"")]


def _together(before: bytes, value: Any, after: bytes, *, ascii_only: bool = True) -> bytes:
    inner = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    return (struct.pack("<Q", len(inner)) if before == b"length" else before) + inner + after


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _change(value: dict[str, Any], choose: random.Random) -> None:
    places = list(_places(value))
    if not places:
        value[choose.choice(["x", "n_layers", "model"])] = choose.choice(ODD)
        return
    holder, key = choose.choice(places)
    action = choose.random()
    if action < 0.15:
        del holder[key]
    elif action < 0.3:
        other, name = choose.choice(places)
        holder[key] = other[name] if not isinstance(other[name], dict | list) else choose.choice(ODD)
    elif action < 0.5 and isinstance(holder[key], int):
        holder[key] = holder[key] + choose.choice([-1, 1, 8, 1 << 20])
    else:
        holder[key] = choose.choice(ODD)


def _places(value: Any, depth: int = 0) -> Any:
    """Every (container, key) below a value."""
    if depth > 20:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner, depth + 1)
