"""One text, cut once: nothing lost between chunks, nothing added, the same for every engine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from hotcold import text
from hotcold.errors import FormatError, InputError
from hotcold.eval import windows

from .conftest import make_tokenizer

PLAIN = make_tokenizer()


@pytest.fixture
def tokenizer():
    return PLAIN


def test_a_file_is_taken_whole_though_it_is_read_in_chunks(tokenizer, text_file):
    assert len(list(text.documents(str(text_file)))) > 1
    whole = tokenizer.encode(text_file.read_text(), add_special_tokens=False).ids
    np.testing.assert_array_equal(windows.text_ids(str(text_file), tokenizer, 2000), whole[:2000])


def test_stdlib_means_its_test_part(tokenizer):
    test = "\n\n".join(document.text for document in text.documents("stdlib", "test"))
    ids = windows.text_ids("stdlib", tokenizer, 3000)
    assert test.startswith(tokenizer.decode(ids[:2990].tolist()))


def test_pieces_are_put_together_as_they_were_and_files_are_not(tokenizer, tmp_path):
    """A line that is cut into pieces, then a file that does not end in a newline, then another."""
    (tmp_path / "a.txt").write_text("word " * 10_000 + "end")
    (tmp_path / "b.txt").write_text("short")
    ids = windows.text_ids(str(tmp_path / "*.txt"), tokenizer, 20_000)
    whole = tokenizer.encode("word " * 10_000 + "end\n\nshort", add_special_tokens=False).ids
    np.testing.assert_array_equal(ids[: len(whole)], whole[:20_000])


def test_short_text_is_refused(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(InputError, match=r"short\.txt: the text is too short \(got \d+, expected 500\)"):
        windows.text_ids(str(path), tokenizer, 500)


@given(n=st.integers(2, 300), window=st.integers(2, 40))
def test_windows_are_the_stream_cut_to_length(n, window):
    tokenizer, ids = PLAIN, np.arange(n, dtype=np.int32)
    if n < window:
        with pytest.raises(InputError, match="fewer tokens than one window"):
            windows.windows(ids, window, tokenizer)
        return
    cut = windows.windows(ids, window, tokenizer)
    assert {len(part) for part in cut} == {window}
    np.testing.assert_array_equal(np.concatenate(cut), ids[: n // window * window])


def test_a_tokenizers_own_bos_begins_each_window():
    tokenizer = make_tokenizer()
    bos = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", bos)]
    )
    cut = windows.windows(np.arange(100, 131, dtype=np.int32), 11, tokenizer)
    assert [part[0] for part in cut] == [bos] * 3
    np.testing.assert_array_equal(np.concatenate([part[1:] for part in cut]), np.arange(100, 130))


def test_a_window_of_one_token_scores_nothing(tokenizer):
    with pytest.raises(InputError, match="at least 2"):
        windows.windows(np.arange(9), 1, tokenizer)


def test_tokenizer_that_is_missing_or_broken(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        windows.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="not a tokenizer"):
        windows.load_tokenizer(tmp_path)
