"""Mutations that know JSON: where random bytes would only ever break the syntax, values are exchanged.

JSON objects, JSON lines and the header of safetensors files are taken apart, changed in one place and put
together again. Everything else is left to libFuzzer.
"""

from __future__ import annotations

import json
import random
import struct
from typing import Any

ODD: list[Any] = [
    None, True, 0, -1, 1, 2, 7, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 63, 1 << 64, -(1 << 63), 0.0, -0.5,
    1e308, float("inf"), float("-inf"), float("nan"), "", "x", "../x", "\0", "é", "F32", "BF16", "relu",
    "fatrelu", "fatrelu_0.01", "silu", "llama3", "yarn", "mistral", "qwen2", [], [0], {}, {"x": 1},
]  # fmt: skip


def mutate(data: bytes, seed: int) -> bytes | None:
    """`data` with one JSON value changed, removed or doubled; None where there is no JSON in it."""
    choose = random.Random(seed)
    before, value, after = _taken_apart(data, choose)
    if not isinstance(value, dict):
        return None
    _change(value, choose)
    inner = json.dumps(value, ensure_ascii=choose.random() < 0.5).encode(errors="surrogatepass")
    if before == b"length":
        return struct.pack("<Q", len(inner)) + inner + after
    return before + inner + after


def _taken_apart(data: bytes, choose: random.Random) -> tuple[bytes, Any, bytes]:
    """What stands before a JSON object, the object, what stands after it."""
    if len(data) > 8 and data[8:9] == b"{":
        end = 8 + int.from_bytes(data[:8], "little")
        return b"length", _parsed(data[8:end]), data[end:]
    lines = data.splitlines(keepends=True)
    if len(lines) > 1 and all(line.startswith(b"{") for line in lines):
        i = choose.randrange(len(lines))
        return b"".join(lines[:i]), _parsed(lines[i]), b"\n" + b"".join(lines[i + 1 :])
    return b"", _parsed(data), b""


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
