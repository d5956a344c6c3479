"""Each error reads as one line: where, what, got and expected, what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotcold import errors
from hotcold.errors import FormatError, HotcoldError, InputError


@pytest.mark.parametrize(
    "error,line",
    [
        (InputError("empty"), "empty"),
        (InputError("empty", where="a.txt"), "a.txt: empty"),
        (InputError("empty", where=Path("a.txt"), fix="write to it"), "a.txt: empty; write to it"),
        (InputError("unknown mode", got="fast", expected="a, b"), "unknown mode (got fast, expected a, b)"),
        (InputError("too many", got=0), "too many (got 0)"),
        (FormatError("bad magic"), "file: bad magic"),
        (
            FormatError("bad magic", where="m.gguf", offset=0, got="ZIP"),
            "m.gguf at byte 0: bad magic (got ZIP)",
        ),
        (FormatError("too long", where="m", offset=8, field="n_kv"), "m at byte 8, n_kv: too long"),
        (FormatError("missing", where="m", field="version", fix="get v3"), "m, version: missing; get v3"),
    ],
)
def test_lines(error, line):
    assert str(error) == line


def test_parts_stay_readable_by_programs():
    error = FormatError("bad", where="m.gguf", offset=3, field="magic", got="A", expected="B", fix="fix it")
    assert (error.what, error.offset, error.field) == ("bad", 3, "magic")
    assert (error.got, error.expected, error.fix) == ("A", "B", "fix it")


@given(st.text(), st.text(), st.text(), st.one_of(st.none(), st.text()))
def test_always_one_line(what, where, got, fix):
    assert len(str(InputError(what, where=where, got=got, fix=fix)).splitlines()) <= 1


def test_every_error_is_a_hotcold_error():
    named = [getattr(errors, name) for name in errors.__all__]
    assert all(issubclass(error, HotcoldError) for error in named) and len(named) == 7
