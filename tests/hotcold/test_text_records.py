"""Records as people have them: all their text, none of what is not text, and what is refused where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotcold.errors import FormatError, InputError
from hotcold.text import documents
from hotcold.text_records import record_text

UNDERSTOOD = {
    "a string": ("plain", "plain"),
    "text with a title": ({"id": 1, "text": "one", "title": "no", "url": "http://x", "score": 0.5}, "one"),
    "a review": ({"review": "good", "label": "positive", "label_id": 1}, "good"),
    "gsm8k": ({"question": "why", "answer": "so", "n": 3}, "why\nso"),
    "answer first": ({"answer": "so", "question": "why"}, "why\nso"),
    "alpaca": ({"instruction": "do", "input": "this", "output": "done"}, "do\nthis\ndone"),
    "alpaca without input": ({"instruction": "do", "input": "", "output": "done"}, "do\ndone"),
    "alpaca with its prompt": (
        {"instruction": "do", "input": "", "output": "it", "text": "Below: do\n### Response: it"},
        "Below: do\n### Response: it",
    ),
    "dolly": ({"instruction": "do", "context": "here", "response": "ok", "category": "qa"}, "do\nhere\nok"),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, "a\nb"),
    "sharegpt": (
        {"id": "x_0", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        "hi\nhello",
    ),
    "sharegpt with a system": (
        {"conversations": [{"from": "human", "value": "hi"}], "system": "be kind"},
        "be kind\nhi",
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"}]},
        "yes\nyes",
    ),
    "messages and their prompt": (
        {"prompt": "hi", "prompt_id": "9", "messages": [{"role": "user", "content": "hi"}]},
        "hi",
    ),
    "messages in parts": (
        {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "what is it"}, {"type": "image_url", "image_url": {"url": "http://y"}},
            {"type": "text", "text": "there"},
        ]}]},
        "what is it\nthere",
    ),
    "a call between": (
        {"messages": [
            {"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [{"id": "c1"}]}, {"role":
            "assistant", "content": None, "tool_calls": []}, {"role": "assistant", "content": "done"},
        ]},
        "go\ndone",
    ),
    "a bare list": ([{"role": "user", "content": "hi"}, {"from": "gpt", "value": "ho"}], "hi\nho"),
    "preferences": (
        {"prompt": "q", "chosen": [{"role": "assistant", "content": "good"}], "rejected": "bad"},
        "q\ngood\nbad",
    ),
    "squad": (
        {"id": "5", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [3]}},
        "q\nc\na",
    ),
    "choices": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
        "q\nx\ny",
    ),
    "an answer that is a number": ({"question": "q", "choices": ["x", "y"], "answer": 1}, "q\nx\ny"),
    "trivia": ({"question": "q", "answer": {"value": "v", "aliases": ["w"]}}, "q\nv"),
    "pairs": ({"sentence1": "a", "sentence2": "b", "label": "entailment"}, "a\nb"),
    "half of a character": ({"text": "a\ud83d"}, "a\ufffd"),
    "both halves": ({"text": "\ud83d\ude00"}, "\U0001f600"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_all_text_of_a_record_and_nothing_else(name: str) -> None:
    record, expected = UNDERSTOOD[name]
    assert record_text(record, "here") == expected


WORD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
TURN = st.one_of(
    st.tuples(st.just("role"), st.just("content"), WORD),
    st.tuples(st.just("from"), st.just("value"), WORD),
)


@settings(deadline=None)
@given(
    turns=st.lists(TURN, min_size=1, max_size=6),
    key=st.sampled_from(["messages", "conversations", "conversation", "dialog"]),
    system=st.none() | WORD,
    noise=st.dictionaries(
        st.sampled_from(["id", "url", "label", "score", "source", "lang"]), WORD | st.integers()
    ),
)
def test_no_turn_is_lost_and_none_is_invented(turns: list, key: str, system: str | None, noise: dict) -> None:
    record = noise | {key: [{who: "someone", what: text} for who, what, text in turns]}
    texts = [text for _, _, text in turns]
    if system is not None:
        record["system"] = system
        if key in ("messages", "conversations") and system in "\n".join(texts):
            return  # not said twice
        texts = [system, *texts]
    assert record_text(record, "here") == "\n".join(texts)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {"instruction": WORD, "output": WORD}, optional={"input": WORD, "id": st.integers()}
    ),
)
def test_instructions_keep_every_field(record: dict) -> None:
    fields = [record[name] for name in ("instruction", "input", "output") if name in record]
    assert record_text(record, "here") == "\n".join(fields)


NAMES = st.sampled_from(
    ["text", "messages", "role", "content", "from", "value", "type", "id", "answer", "data"]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=3),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(NAMES, inside, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(JSON)
def test_any_record_is_understood_or_refused(record: object) -> None:
    """And what is understood is made of strings that are in it, whole."""
    try:
        text = record_text(record, "here")
    except InputError:
        return
    assert set(text.split("\n")) <= {"", *_strings(record)}


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inside for text in _strings(item)]


RECORDS = [{"text": "one"}, {"question": "q", "answer": "a"}, "plain"]
FILES = {
    "lines": ("a.jsonl", "\n".join(map(json.dumps, RECORDS)) + "\n\n"),
    "lines under another name": ("a.json", "\n".join(map(json.dumps, RECORDS))),
    "ndjson": ("a.ndjson", "\n".join(map(json.dumps, RECORDS))),
    "carriage returns": ("a.jsonl", "\r\n".join(map(json.dumps, RECORDS)) + "\r\n"),
    "a mark": ("a.jsonl", "\ufeff" + "\n".join(map(json.dumps, RECORDS))),
    "marks between": ("a.jsonl", "\n".join("\ufeff" + json.dumps(record) for record in RECORDS)),
    "an array": ("a.json", json.dumps(RECORDS)),
    "an array over lines": ("a.json", json.dumps(RECORDS, indent=2)),
    "an array with a mark": ("a.json", "\ufeff" + json.dumps(RECORDS, indent=1)),
    "an array of carriage returns": ("a.json", json.dumps(RECORDS, indent=1).replace("\n", "\r\n")),
    "an array called lines": ("a.jsonl", json.dumps(RECORDS)),
    "an array in an object": ("a.json", json.dumps({"version": "1", "data": RECORDS}, indent=1)),
}


@pytest.mark.parametrize("name", FILES)
def test_files_as_people_have_them(tmp_path: Path, name: str) -> None:
    file, content = FILES[name]
    (tmp_path / file).write_bytes(content.encode())
    assert [document.text for document in documents(str(tmp_path / file))] == ["one", "q\na", "plain"]


def test_one_record_is_a_file_too(tmp_path: Path) -> None:
    for content in (json.dumps({"text": "one"}), json.dumps({"text": "one"}, indent=1)):
        (tmp_path / "a.json").write_text(content)
        assert [document.text for document in documents(str(tmp_path / "a.json"))] == ["one"]


def test_plain_files_have_no_mark_either(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert [document.text for document in documents(str(tmp_path / "a.txt"))] == ["one\ntwo"]


REFUSED = {
    "nothing known": (
        '{"text": "x"}\n{"id": 7, "mood": "sunny"}', InputError,
        r"a.jsonl, line 2: no known text field.*got an object with id .int., mood .str., expected a string",
    ),
    "a number": ("7\n8", InputError, r"a.jsonl, line 1: no known text field.*got int"),
    "text that is a number": ('{"text": 5}', InputError, r"line 1: .*got an object with text .int."),
    "an answer of another kind": (
        '{"question": "q", "answer": {"mood": "x"}}\n', InputError, r"line 1, answer: .*mood .str.",
    ),
    "a turn of another kind": (
        '{"messages": [{"role": "user", "content": "a"}, {"who": "b", "says": "c"}]}', InputError,
        r"line 1, element 2: .*got an object with who .str., says",
    ),
    "an empty object": ("{}\n{}", InputError, "line 1: .*an object with nothing in it"),
    "not JSON": ('{"text": "x"}\n{"text": ', FormatError, "a.jsonl, line 2: is not JSON"),
    "the first line": ('{"text": \n{"text": "x"}', FormatError, r"a.jsonl, line \d: is not JSON"),
    "an array that breaks": ('[{"text": "x"},\n{"text": }]', FormatError, "a.jsonl, line 2: is not JSON"),
    "an array without commas": (
        '[{"text": "x"}\n\n{"text": "y"}]', FormatError, "line 3: is not JSON .*a comma",
    ),
    "an array without end": ('[{"text": "x"}', FormatError, "line 1: is not JSON .*the end of the file"),
    "a record of an array": (
        '[{"text": "x"},\n {"n": 1}]', InputError, "a.jsonl, line 2, record 2: no known text field",
    ),
    "more after an array": ('[{"text": "x"}\n]\nx', FormatError, "text after the JSON array"),
    "too deep": ('{"text": ' + "[" * 90 + "]" * 90 + "}", InputError, "too deep"),
    "as deep as it goes": ("[" * 100_000, FormatError, "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_named_by_file_and_line(tmp_path: Path, name: str) -> None:
    content, error, message = REFUSED[name]
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(error, match=message) as caught:
        list(documents(str(tmp_path / "a.jsonl")))
    assert "\n" not in str(caught.value)


def test_a_data_set_is_read_by_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    records = [{"conversations": [{"from": "human", "value": "hi"}], "id": "3"}, {"mood": "x"}]
    module = types.SimpleNamespace(load_dataset=lambda *_, **__: iter(records))
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = documents("someone/talk")
    assert next(found).text == "hi"
    with pytest.raises(InputError, match=r"talk, record 1: no known text field .got an object with"):
        next(found)
