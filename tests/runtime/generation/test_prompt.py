"""Escapes against a second writing of llama.cpp's `string_process_escapes`, and bytes of odd locales."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotcold.errors import InputError
from hotcold.runtime.generation.prompt import given_prompt

PARTS = st.sampled_from(["\\", "n", "t", "r", "'", '"', "x", "4", "1", "é", "q", "\n", "x4", "x41", "\\x"])


def processed(text: str) -> str:
    """Character by character, as `common/common.cpp` does it; of ASCII bytes, to need no decoding."""
    out, at = "", 0
    while at < len(text):
        if text[at] != "\\" or at + 1 == len(text):
            out, at = out + text[at], at + 1
            continue
        kind = text[at + 1]
        at += 2
        digits = text[at : at + 2]
        if kind in "nrt'\"\\":
            out += {"n": "\n", "r": "\r", "t": "\t"}.get(kind, kind)
        elif kind == "x" and len(digits) == 2 and set(digits) <= set("0123456789abcdefABCDEF"):
            out, at = out + chr(int(digits, 16)), at + 2
        else:
            out += "\\" + kind
    return out


@given(st.lists(PARTS, max_size=12).map("".join))
def test_escapes_are_those_of_llama_cpp(text):
    assert given_prompt(text, escapes=True) == processed(text)
    assert given_prompt(text, escapes=False) == text


def test_bytes_may_be_one_character():
    assert given_prompt(r"\xc3\xa9\\n", escapes=True) == "é\\n"
    with pytest.raises(InputError, match="-p: the prompt is not UTF-8 at byte 0"):
        given_prompt(r"\xc3", escapes=True)


@pytest.mark.parametrize("text", ["Jürgen 🐙", "谢谢"])
def test_a_locale_that_is_not_utf8_loses_nothing(text, monkeypatch):
    """In the C locale Python carries the bytes of an argument as lone surrogates."""
    carried = text.encode().decode("ascii", "surrogateescape")
    monkeypatch.setattr(os, "fsencode", lambda argument: argument.encode("ascii", "surrogateescape"))
    assert given_prompt(carried, escapes=True) == text
