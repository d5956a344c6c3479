"""Training text: every document in turn, in the given shares, and the same after a restart at any window."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotcold.errors import FormatError, InputError, ShapeError
from hotcold.sparsify.training.data import PAD, Batch, Documents, Mixture, TokenRows, read_windows
from hotcold.sparsify.training.teacher_text import read_rows
from hotcold.storage import write_tensors
from hotcold.text import Document, documents, split

LENGTH = 8


class Numbers:
    """A tokenizer of texts that are numbers."""

    def __init__(self):
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        self.ids = [int(word) for word in text.split()]
        return self


def numbered(lengths):
    first = 0
    for i, n in enumerate(lengths):
        yield Document(str(i), " ".join(str(first + j) for j in range(n)))
        first += n


def source(lengths, **options):
    return Documents(lambda: numbered(lengths), Numbers(), LENGTH, **options)


def test_packed_documents_follow_each_other_without_a_gap():
    windows = source([5, 9, 30]).take(5)
    assert windows.flatten().tolist() == list(range(40))


def test_unpacked_each_document_begins_a_window_and_the_rest_is_padding():
    batch = Batch.of(source([3, 20, 8], pack=False).take(3))
    assert batch.mask.sum(1).tolist() == [3, 8, 8]
    assert batch.ids[0].tolist() == [0, 1, 2] + [0] * 5
    assert batch.counts.tolist() == [19, 2 + 7 + 7]


def test_a_text_begins_anew_where_it_ends():
    windows = source([5, 7]).take(3)
    assert windows.flatten().tolist() == [*range(12), *range(12)]


@pytest.mark.parametrize("lengths", [[], [3]])
def test_a_text_shorter_than_a_window_is_refused(lengths):
    with pytest.raises(InputError, match=r"story: too little text \(got \d tokens, expected at least 8\)"):
        source(lengths, where="story").take(1)


def mixture(block=16, seed=0):
    rows = TokenRows(torch.arange(1000, 1000 + 10 * LENGTH).reshape(10, LENGTH))
    return Mixture([(source([5, 9, 30, 100]), 3.0), (rows, 1.0)], seed, block)


def test_each_source_has_its_share_of_a_block():
    ids = mixture().batch(16).ids
    assert (ids[:, 0] >= 1000).sum() == 4


def test_the_seed_decides_the_order():
    same, other = mixture(seed=3).batch(16).ids, mixture(seed=4).batch(16).ids
    assert torch.equal(mixture(seed=3).batch(16).ids, same)
    assert not torch.equal(same, other)
    assert sorted(same[:, 0].tolist()) == sorted(other[:, 0].tolist())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=5), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_restart_changes_nothing(before, after):
    data = mixture()
    for size in before:
        data.batch(size)
    state = json.loads(json.dumps(data.state()))
    expected = [data.batch(size).ids for size in after]
    restarted = mixture()
    restarted.restore(state)
    assert all(torch.equal(restarted.batch(n).ids, ids) for n, ids in zip(after, expected, strict=True))


def test_a_restart_does_not_tokenise_what_was_read():
    data = source([8] * 100)
    data.take(90)
    again = source([8] * 100)
    again.restore(data.state())
    assert again.take(1)[0, 0] == 90 * 8
    assert again._tokenizer.calls == 1


def test_rows_of_a_batch_can_be_shared_out():
    batch = Batch.of(torch.tensor([[1, 2], [3, PAD], [4, 5], [6, 7]]))
    mine = batch.rows(slice(1, None, 2))
    assert mine.ids.tolist() == [[3, 0], [6, 7]]
    assert mine.mask.tolist() == [[True, False], [True, True]]


def test_windows_of_text_hold_its_tokens(text_file, tokenizer):
    ids = read_windows(split(documents(str(text_file)), "train"), tokenizer, 64, 1000, "story")
    assert ids.shape[1] == 64
    assert len(ids) >= 1000 // 64
    first = next(split(documents(str(text_file)), "train"))
    assert ids[0].tolist() == tokenizer.encode(first.text).ids[:64]


def test_too_little_text(tokenizer):
    with pytest.raises(InputError, match=r"story: too little text \(got 0 tokens, expected at least 64\)"):
        read_windows([], tokenizer, 64, 1000, "story")


def test_a_file_of_tokens(tmp_path):
    rows = torch.arange(4 * LENGTH, dtype=torch.int32).reshape(4, LENGTH)
    write_tensors(tmp_path / "good.safetensors", {"ids": rows.numpy()})
    assert torch.equal(read_rows(tmp_path / "good.safetensors", LENGTH), rows.long())
    with pytest.raises(ShapeError, match=r"not windows of token ids \(got \[4, 8\], expected \[n, 9\]\)"):
        read_rows(tmp_path / "good.safetensors", LENGTH + 1)
    write_tensors(tmp_path / "other.safetensors", {"x": rows.numpy()})
    for name in ("other", "missing"):
        with pytest.raises(FormatError, match="contains no token ids"):
            read_rows(tmp_path / f"{name}.safetensors", LENGTH)


def test_a_local_data_set_is_streamed(tmp_path, tokenizer):
    load = pytest.importorskip("datasets")
    folder = tmp_path / "corpus"
    folder.mkdir()
    load.Dataset.from_dict({"text": [f"Carol wrote {n} letters." for n in range(50)]}).to_parquet(
        folder / "train.parquet"
    )
    found = list(documents(str(folder)))
    assert len(found) == 50
    assert found[3].text == "Carol wrote 3 letters."
