"""Text sources: what is a document, what is held out, and what is refused."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hotcold.errors import FormatError, InputError
from hotcold.text import Document, documents, split, token_stream


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token per character."""
    vocabulary = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return list(documents("stdlib"))


def test_stdlib_holds_megabytes_of_distinct_prose(stdlib: list[Document]) -> None:
    assert sum(len(document.text) for document in stdlib) > 2_000_000
    assert len({document.id for document in stdlib}) == len(stdlib) > 300
    paragraphs = [paragraph for document in stdlib for paragraph in document.text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert {"module/argparse", "topic/types"} <= {document.id for document in stdlib}
    assert not any(">>> " in paragraph[:4] for paragraph in paragraphs)


def test_stdlib_order_is_fixed(stdlib: list[Document]) -> None:
    assert list(islice(documents("stdlib"), 40)) == stdlib[:40]


def test_stdlib_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sysconfig

    canary = tmp_path / "canary"
    (tmp_path / "bad.py").write_text(
        f'"""{"Prose that is long enough to be kept. " * 9}"""\nopen({str(canary)!r}, "w")'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    ids = {document.id for document in documents("stdlib")}
    assert "module/bad" in ids and "module/broken" not in ids
    assert not canary.exists()


def test_stdlib_heldout_is_a_twentieth_or_so(stdlib: list[Document]) -> None:
    size = sum(len(document.text) for document in split(stdlib, "heldout"))
    assert 0.01 < size / sum(len(document.text) for document in stdlib) < 0.12


@settings(deadline=None)
@given(st.lists(st.text(), unique=True), st.floats(0, 1))
def test_split_divides_without_overlap(ids: list[str], share: float) -> None:
    source = [Document(name, "") for name in ids]
    train, heldout = list(split(source, "train", share)), list(split(source, "heldout", share))
    assert sorted(ids) == sorted(document.id for document in train + heldout)
    assert not {document.id for document in train} & {document.id for document in heldout}


@settings(deadline=None)
@given(st.text(min_size=1), st.text(), st.text())
def test_split_looks_at_the_id_alone(name: str, one: str, other: str) -> None:
    assert len(list(split([Document(name, one), Document(name, other)], "heldout"))) in (0, 2)


def test_split_shares_converge() -> None:
    source = [Document(str(number), "") for number in range(20_000)]
    assert len(list(split(source, "heldout", 0.05))) == pytest.approx(1000, abs=120)


def test_split_refuses_an_unknown_part() -> None:
    with pytest.raises(InputError, match=r"unknown part.*got test, expected train or heldout"):
        list(split([], "test"))


def test_plain_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {number} " + "word " * 200 for number in range(50)) + "\n"
    (tmp_path / "a.txt").write_text(text)
    found = list(documents(str(tmp_path / "a.txt")))
    assert "".join(document.text for document in found) == text
    assert [document.id for document in found] == [f"a.txt#{number}" for number in range(len(found))]
    assert all(4000 <= len(document.text) < 6000 for document in found[:-1])
    assert all(document.text.startswith("paragraph") for document in found)


def test_plain_file_without_blank_lines_is_cut_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line of words\n" * 5000)
    sizes = [len(document.text) for document in documents(str(tmp_path / "a.txt"))]
    assert sum(sizes) == 80_000 and max(sizes) <= 16_016


def test_glob_takes_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert [document.text for document in documents(str(tmp_path / "*.txt"))] == ["a.txt", "b.txt"]


def test_jsonl_takes_the_text_like_field(tmp_path: Path) -> None:
    records = [{"id": 1, "text": "one", "title": "no"}, {"question": "why", "answer": "so", "n": 3}, "plain"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert [document.text for document in documents(str(path))] == ["one", "why\nso", "plain"]


def _write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("a.txt", b" \n\n ", InputError, "a.txt: no text in it; give"),
        ("a.txt", b"caf\xe9", InputError, "a.txt: is not UTF-8 text .got a bad byte at 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', FormatError, "a.jsonl, line 2: is not JSON"),
        ("a.jsonl", b'{"n": 1}\n', InputError, "line 1: no text field .expected a string"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, name: str, data: bytes, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        list(documents(_write(tmp_path / name, data)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the text source is empty; give a file"),
        ("missing.txt", "missing.txt: no such file; give a file, a glob"),
        ("no/such/*.txt", r"no/such/\*.txt: no such file; give"),
        (".", r"\.: is a folder; give its files as a glob"),
    ],
)
def test_missing_sources_are_refused(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(documents(source))


def test_data_set_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"someone/texts: no such file; .*run `pip install datasets`"):
        list(documents("someone/texts"))


def test_token_stream_gives_exactly_so_many_tokens(tokenizer: Tokenizer) -> None:
    source = [Document("a", "abcd"), Document("b", ""), Document("c", "efgh"), Document("d", "ijkl")]
    stream = token_stream(source, tokenizer, 6)
    assert [ids.dtype for ids in stream] == [np.int32, np.int32]
    assert [tokenizer.decode(ids.tolist()).replace(" ", "") for ids in stream] == ["abcd", "ef"]


def test_token_stream_reads_no_further_than_it_must(tokenizer: Tokenizer) -> None:
    def endless():
        while True:
            yield Document("a", "abc")

    assert sum(map(len, token_stream(endless(), tokenizer, 100))) == 100


def test_token_stream_adds_what_the_tokenizer_adds(tokenizer: Tokenizer) -> None:
    with_bos = Tokenizer.from_str(tokenizer.to_str())
    with_bos.post_processor = processors.TemplateProcessing(
        "! $A", special_tokens=[("!", with_bos.token_to_id("!"))]
    )
    first = with_bos.token_to_id("!")
    assert [ids[0] for ids in token_stream([Document("a", "x"), Document("b", "y")], with_bos, 4)] == [
        first,
        first,
    ]


def test_too_little_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"the text is too short .got 3 tokens, expected 4.; give more text"):
        token_stream([Document("a", "abc")], tokenizer, 4)
    with pytest.raises(InputError, match=r"must be positive .got 0."):
        token_stream([Document("a", "abc")], tokenizer, 0)
