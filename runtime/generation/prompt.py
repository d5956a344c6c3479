"""The prompt of a command line: UTF-8 in any locale, with llama.cpp's escapes, or from a file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hotcold.errors import InputError

__all__ = ["given_prompt", "read_prompt"]

_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|([nrt'\"\\]))")
_MEANING = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def given_prompt(argument: str, *, escapes: bool) -> str:
    """The text of `-p`. With `escapes`, a `\\n` written in it is a new line, as in llama.cpp, and so are
    `\\r`, `\\t`, `\\'`, `\\"`, `\\\\` and bytes as `\\xNN`. InputError for what is not UTF-8 then."""
    try:
        data = argument.encode()
    except UnicodeEncodeError:  # bytes that the locale's encoding could not read
        data = os.fsencode(argument)
    return _text(_ESCAPE.sub(_unescaped, data) if escapes else data, "-p")


def _unescaped(match: re.Match[bytes]) -> bytes:
    return bytes.fromhex(match[1].decode()) if match[1] else _MEANING.get(match[2], match[2])


def read_prompt(path: str) -> str:
    """The text of a file; of its final newlines one is left out, since editors add it (so does llama.cpp),
    and so is a byte order mark. InputError for a file that is not there or no text."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the prompt: {error.strerror}", where=path) from error
    return _text(data, path).removeprefix("\ufeff").removesuffix("\n")


def _text(data: bytes, where: str) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt is not UTF-8 at byte {error.start}", where=where) from error
    if "\0" in text:
        raise InputError(f"the prompt has a NUL at character {text.index(chr(0))}", where=where)
    return text
