"""Text sources: what is a document, what is held out, and what is refused."""

from __future__ import annotations

import hashlib
import re
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hotcold.errors import FormatError, InputError
from hotcold.text import PARTS, Document, _open, documents, part_of, split, token_stream


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


def test_the_test_part_of_stdlib_is_what_was_held_out_before_there_were_three(stdlib: list[Document]) -> None:
    """The model that comes with hotcold has seen the others; the rule of then, written out once more."""

    def held_out(name: str) -> bool:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < 0.05 * 2**64

    assert list(split(stdlib, "test")) == [document for document in stdlib if held_out(document.id)]


@pytest.mark.parametrize("part", ["calibrate", "test"])
def test_two_parts_of_stdlib_are_a_twentieth_or_so(stdlib: list[Document], part: str) -> None:
    size = sum(len(document.text) for document in split(stdlib, part))
    assert 0.01 < size / sum(len(document.text) for document in stdlib) < 0.12


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(), unique=True), st.lists(st.floats(0, 1)))
def test_split_divides_without_overlap(ids: list[str], places: list[float]) -> None:
    source = [Document(name, "") for name in ids] + [Document("piece", "", place) for place in places]
    parts = {part: list(split(source, part)) for part in PARTS}
    assert sum(map(len, parts.values())) == len(source)
    for part, found in parts.items():
        assert all(part_of(document) == part for document in found)
        assert [document for document in source if part_of(document) == part] == found


@settings(deadline=None)
@given(st.text(min_size=1), st.text(), st.text())
def test_split_looks_at_the_id_alone(name: str, one: str, other: str) -> None:
    assert len(list(split([Document(name, one), Document(name, other)], "test"))) in (0, 2)


def test_split_shares_converge() -> None:
    source = [Document(str(number), "") for number in range(20_000)]
    for part in ("calibrate", "test"):
        assert len(list(split(source, part))) == pytest.approx(1000, abs=120)


def test_split_refuses_an_unknown_part() -> None:
    with pytest.raises(InputError, match=r"unknown part.*got heldout, expected train . calibrate . test"):
        list(split([], "heldout"))


LINES = st.lists(st.sampled_from(["", "word", "a line of some words", "x" * 300, "y " * 900]), min_size=1)


@settings(deadline=None, max_examples=60)
@given(lines=LINES, times=st.integers(1, 400), end=st.sampled_from(["", "\n"]))
def test_a_long_file_is_three_runs_of_itself(lines: list[str], times: int, end: str) -> None:
    text = "\n".join(lines * times) + end
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "book.txt"
        path.write_text(text)
        pieces = list(_open(str(path)))
    assert "".join(piece.text for piece in pieces) == text
    parts = [part_of(piece) for piece in pieces]
    if len(text) <= 4000:
        assert len(pieces) == 1 and pieces[0].left is None
        return
    assert parts == sorted(parts, key=PARTS.index)  # one run each, so that two pairs of neighbors are parted
    longest = max(len(line) for line in lines) + 2
    for part, share in zip(PARTS, (0.9, 0.05, 0.05), strict=True):
        size = sum(len(piece.text) for piece in pieces if part_of(piece) == part)
        assert abs(size - share * len(text)) <= longest


def test_nothing_of_a_book_stands_beside_its_neighbor_of_another_part(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {number} " + "word " * 150 for number in range(400)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found = {part: "".join(d.text for d in documents(str(tmp_path / "book.txt"), part)) for part in PARTS}
    numbers = {part: [int(n) for n in re.findall(r"paragraph (\d+)", text)] for part, text in found.items()}
    assert [n for part in PARTS for n in numbers[part]] == list(range(400))
    assert (len(numbers["calibrate"]), len(numbers["test"])) == (pytest.approx(20, abs=1),) * 2


def test_each_long_file_of_a_glob_gives_to_all_parts_and_short_ones_go_as_wholes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "long.txt").write_text(f"{folder} line\n" * 20_000)
    for number in range(100):
        (tmp_path / f"short{number}.txt").write_text("short")
    glob = str(tmp_path / "**" / "*.txt")
    found = {part: list(documents(glob, part)) for part in PARTS}
    for documents_of in found.values():
        text = "".join(document.text for document in documents_of)
        assert "a line" in text and "b line" in text and "short" in text
    ids = [document.id for part in found.values() for document in part]
    assert len(set(ids)) == len(ids)  # files of one name in two folders are not one document
    assert {"a/long.txt#0", "short7.txt#0"} <= set(ids)


def test_a_line_without_end_is_cut_between_words(tmp_path: Path) -> None:
    text = "word " * 100_000
    (tmp_path / "a.txt").write_text(text)
    pieces = list(documents(str(tmp_path / "a.txt")))
    assert "".join(piece.text for piece in pieces) == text
    assert all(len(piece.text) <= 20_000 and piece.text.endswith(" ") for piece in pieces)
    assert {part_of(piece) for piece in pieces} == set(PARTS)


def test_a_text_too_small_for_three_parts_names_the_part(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words")
    given = {part: Document("a.txt#0", "") for part in PARTS if part != part_of(Document("a.txt#0", ""))}
    assert len(given) == 2
    for part in given:
        with pytest.raises(InputError, match=rf"a\.txt: too small to be divided: no text in its {part} part"):
            list(documents(str(tmp_path / "a.txt"), part))


def test_plain_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {number} " + "word " * 200 for number in range(50)) + "\n"
    (tmp_path / "a.txt").write_text(text)
    found = list(documents(str(tmp_path / "a.txt")))
    assert "".join(document.text for document in found) == text
    assert [document.id for document in found] == [f"a.txt#{number}" for number in range(len(found))]
    last = [part_of(one) != part_of(other) for one, other in zip(found, [*found[1:], found[0]], strict=True)]
    assert sum(last) == 3
    assert all(4000 <= len(d.text) < 6000 or end for d, end in zip(found, last, strict=True))
    assert all(document.text.lstrip().startswith("paragraph") for document in found)


def test_plain_file_without_blank_lines_is_cut_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line of words\n" * 5000)
    sizes = [len(document.text) for document in documents(str(tmp_path / "a.txt"))]
    assert sum(sizes) == 80_000 and max(sizes) <= 16_016


def test_glob_takes_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert [document.text for document in documents(str(tmp_path / "*.txt"))] == ["a.txt", "b.txt"]


def _write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("a.txt", b" \n\n ", InputError, "a.txt: contains no text; use"),
        ("a.txt", b"caf\xe9", InputError, "a.txt: is not UTF-8 text .got a bad byte at 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', FormatError, "a.jsonl, line 2: is not JSON"),
        (
            "a.jsonl",
            b'{"n": 1}\n',
            InputError,
            "line 1: no known text field .got an object with n .int.,",
        ),
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
    with pytest.raises(
        InputError, match=r"the text is too short .got 3 tokens, expected 4.; provide more text"
    ):
        token_stream([Document("a", "abc")], tokenizer, 4)
    with pytest.raises(InputError, match=r"must be positive .got 0."):
        token_stream([Document("a", "abc")], tokenizer, 0)
