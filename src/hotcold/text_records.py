"""Common kinds of records, and the text in them.

A file of records is JSON lines or one JSON array (an object with the array under a key such as `data` too). A
record is a string, or an object with fields that are known to hold text: plain text, instructions, questions
and answers, and conversations, whose messages are `{"role", "content"}` or ShareGPT's `{"from", "value"}`, a
content being a string or a list of parts. All known fields of a record are taken, prompts before answers, and
joined by newlines; nothing else is put between them. Where `text` or a conversation has all the other fields
word for word, as Alpaca's `text` has, they are not repeated. Ids, labels, scores, titles and URLs are not
text. A record without a known field, or with a known field that cannot be read, is refused rather than
misunderstood.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hotcold.errors import FormatError, InputError

__all__ = ["file_records", "record_text"]

# Fields with text, in the order in which they are read, independent of their order in a record.
_FIELDS = (
    "system", "system_prompt", "text", "texts", "content", "contents", "document", "article", "passage",
    "body", "paragraphs", "abstract", "sentence", "sentence1", "sentence2", "premise", "hypothesis",
    "description", "story", "code", "review", "dialogue", "dialog", "conversation", "conversations",
    "messages", "turns", "instruction", "instructions", "prompt", "query", "problem", "question", "questions",
    "context", "background", "input", "inputs", "choices", "options", "reasoning", "rationale", "explanation",
    "output", "outputs", "completion", "completions", "response", "responses", "answer", "answers",
    "solution", "target", "targets", "chosen", "rejected", "summary", "highlights",
)  # fmt: skip
_INSIDE = ("value", "parts")  # text in a message, or deeper; at the top of a record they may be anything
_SPEAKER = ("role", "from")
_CALLS = ("tool_calls", "function_call")
_WHOLE = ("text", "messages", "conversations")  # may have the other fields in them
_ORDER = {name: rank for rank, name in enumerate(("reasoning_content", "thinking", *_FIELDS, *_INSIDE))}
_WRAPPERS = ("data", "rows", "records", "examples", "instances", "train")
_DEEPEST = 20  # lists and objects in each other; conversations need five
_UNDERSTOOD = (
    "a string, or an object with text or content, conversations or messages, instruction and output, "
    "prompt and completion, or question and answer"
)


def file_records(text: str, path: Path) -> Iterator[tuple[int, Any, str]]:
    """Yield (number from 1, record, where it stands) of JSON lines or a JSON array; FormatError if it is
    neither.

    The number is that of the line in JSON lines, and of the record in an array.
    """
    first = next((line for line in text.split("\n") if line.strip()), "")
    one_line = first.strip() == text.strip()
    if _is_json(first) and not one_line:
        yield from _lines(text, path)
    elif text.lstrip()[:1] == "[":
        yield from _array(text, text.index("["), path)
    elif text.strip():
        yield from _whole(text, path)


def record_text(record: object, where: str) -> str:
    """All text of one record; InputError, with what was found and is understood, if there is none."""
    texts = _texts(record, where, 0)
    if texts is None:
        raise _refused(record, where)
    # JSON can hold half of a character, which no tokenizer takes
    return "\n".join(texts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_json(line: str) -> bool:
    try:
        json.loads(line.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return False
    return True


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line.lstrip("\ufeff"))  # concatenated files keep their byte order marks
            except (ValueError, RecursionError) as error:
                raise _broken(error, path, number) from error
            yield number, record, f"{path}, line {number}"


def _array(text: str, position: int, path: Path) -> Iterator[tuple[int, Any, str]]:
    """The elements of the array that begins at `position`, one after the other."""
    decoder, number, line, counted = json.JSONDecoder(), 0, 1, 0
    position = _skip(text, position + 1)
    while text[position : position + 1] != "]" or number:
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _broken(error, path, line) from error
        number += 1
        yield number, record, f"{path}, line {line}, record {number}"
        position = _skip(text, end)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            got = repr(text[position : position + 20]) if position < len(text) else "the end of the file"
            line += text.count("\n", counted, position)
            raise FormatError(
                "is not JSON",
                where=path,
                field=f"line {line}",
                got=got,
                expected="a comma or the array's end",
            )
        position = _skip(text, position + 1)
    if rest := text[position + 1 :].strip():
        raise FormatError("text after the JSON array", where=path, got=repr(rest[:40]))


def _skip(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _whole(text: str, path: Path) -> Iterator[tuple[int, Any, str]]:
    """One object over several lines: a record, or the wrapping of an array of them."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(error, path, getattr(error, "lineno", 1)) from error
    yield from _unwrapped(content, path)


def _unwrapped(content: object, path: Path) -> Iterator[tuple[int, Any, str]]:
    if isinstance(content, dict) and not any(name in _ORDER for name in content):
        for name in _WRAPPERS:
            if isinstance(content.get(name), list):
                for number, record in enumerate(content[name], start=1):
                    yield number, record, f"{path}, {name}, record {number}"
                return
    yield 1, content, f"{path}, line 1"


def _broken(error: Exception, path: Path, line: int) -> FormatError:
    return FormatError("is not JSON", where=path, field=f"line {line}", got=str(error))


def _texts(value: object, where: str, depth: int) -> list[str] | None:
    """The texts in a value, in reading order; None if it cannot contain text, such as a number."""
    if depth > _DEEPEST:
        raise InputError("lists and objects are nested too deeply", where=where, expected=_UNDERSTOOD)
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list | tuple):
        return _of_list(value, where, depth)
    if isinstance(value, dict):
        return _of_object(value, where, depth)
    return None


def _of_list(values: list | tuple, where: str, depth: int) -> list[str] | None:
    """Of messages, parts or strings. An object that cannot be read is refused: its text would be lost."""
    texts: list[str] = []
    known = not values
    for number, value in enumerate(values, start=1):
        found = _texts(value, where, depth + 1)
        if isinstance(value, dict) and found is None:
            if not _has_no_text(value):
                raise _refused(value, f"{where}, element {number}")
            found = []
        known |= found is not None
        texts += found or []
    return texts if known else None


def _has_no_text(value: dict) -> bool:
    """An image, a sound, or a call, by its own declaration."""
    return value.get("type", "text") != "text" or any(name in value for name in _CALLS)


def _of_object(fields: dict, where: str, depth: int) -> list[str] | None:
    """Of the known fields of a record, a message or a part; None if none of them can contain text."""
    inside = depth > 0 or any(name in fields for name in _SPEAKER)
    names = [name for name in fields if name in _ORDER and (inside or name not in _INSIDE)]
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=_ORDER.__getitem__):
        texts = _texts(fields[name], where, depth + 1)
        if texts is None and isinstance(fields[name], dict):
            raise _refused(fields[name], f"{where}, {name}")
        if texts is not None or fields[name] is None:
            found[name] = texts or []
    if not found:
        return None
    return [text for texts in _without_copies(found).values() for text in texts]


def _without_copies(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """One field alone if it has the texts of all the others, in them or as its messages."""
    for name in _WHOLE:
        whole = "\n".join(found.get(name, []))
        if whole and all(text in whole for texts in found.values() for text in texts):
            return {name: found[name]}
    return found


def _refused(value: object, where: str) -> InputError:
    got = type(value).__name__
    if isinstance(value, dict):
        fields = ", ".join(f"{name} ({type(content).__name__})" for name, content in value.items())
        got = f"an object with {fields or 'nothing in it'}"
    return InputError("no known text field", where=where, got=got, expected=_UNDERSTOOD)
