"""llama.cpp behind our interface: the same numbers as its own high-level API, and an honest stopwatch."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
from tiny_families import FAMILIES, write_model

from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.errors import InputError, UnsupportedError
from hotcold.eval.peers import llama_cpp as peer
from hotcold.eval.peers.llama_cpp import LlamaCpp
from hotcold.model.huggingface import HFCheckpoint
from hotcold.runtime.reference import ReferenceEngine

IDS = np.array([5, 77, 123, 9, 200, 42, 42, 7, 250, 11, 19, 201], dtype=np.int32)


@pytest.fixture
def side(bundle):
    side = LlamaCpp(bundle / "tiny.gguf", n_threads=1, n_ctx=64)
    yield side
    side.close()


def test_computes_what_the_reference_computes(bundle, side):
    expected = ReferenceEngine.load(bundle, "dense", n_threads=1).prefill(IDS, all_logits=True)
    logits = side.prefill(IDS, all_logits=True)
    assert logits.shape == (len(IDS), side.n_vocab)
    np.testing.assert_allclose(logits, expected, atol=0.02 * np.abs(expected).max())


def test_token_by_token_equals_a_block(side):
    block = side.prefill(IDS, all_logits=True)
    side.reset()
    first = side.prefill(IDS[:4])
    rest = [side.decode(int(token)) for token in IDS[4:]]
    np.testing.assert_allclose(np.array([first, *rest]), block[3:], atol=1e-2)


def test_blocks_longer_than_a_batch(bundle, monkeypatch, side):
    whole = side.prefill(IDS, all_logits=True)
    monkeypatch.setattr(peer, "_BATCH", 5)
    pieces = LlamaCpp(bundle / "tiny.gguf", n_threads=1, n_ctx=64)
    np.testing.assert_allclose(pieces.prefill(IDS, all_logits=True), whole, atol=1e-2)
    pieces.reset()
    np.testing.assert_allclose(pieces.prefill(IDS), whole[-1], atol=1e-2)


def test_logits_are_copies(side):
    first = side.prefill(IDS[:3])
    kept = first.copy()
    side.decode(9)
    np.testing.assert_array_equal(first, kept)


def test_stopwatch_counts_computing_only(side):
    assert side.seconds == 0.0
    start = time.perf_counter()
    side.prefill(IDS)
    time.sleep(0.05)
    side.decode(3)
    assert 0.0 < side.seconds < time.perf_counter() - start - 0.05
    side.reset()
    assert (side.seconds, side.position) == (0.0, 0)


def test_full_context_is_refused(side):
    side.prefill(np.zeros(60, dtype=np.int32))
    with pytest.raises(InputError, match=r"context is full \(got 65, expected at most 64\)"):
        side.prefill(np.zeros(5, dtype=np.int32))


def test_more_positions_than_there_are_do_not_end_the_process(tmp_path):
    """Beyond them llama.cpp itself ends it, with SIGABRT."""
    write_model(tmp_path / "opt", FAMILIES["opt"])
    source = HFCheckpoint(tmp_path / "opt")
    export_bundle(source, tmp_path / "b", name="m", fingerprint="0" * 64, options=ExportOptions("f32"))
    file = tmp_path / "b" / "m.gguf"
    assert LlamaCpp(file, n_threads=1, n_ctx=64).n_ctx == 64
    with pytest.raises(InputError, match=r"no positions for so long a context \(got 65, expected at most 64"):
        LlamaCpp(file, n_threads=1, n_ctx=65)


@pytest.mark.parametrize("worst", [-1, 320])
def test_ids_that_are_none(side, worst):
    with pytest.raises(InputError, match=rf"token id outside of the vocabulary \(got {worst}"):
        side.prefill([1, worst])
    with pytest.raises(InputError, match="outside of the vocabulary"):
        side.decode(worst)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        LlamaCpp(tmp_path / "none.gguf", n_threads=1)


def test_not_a_model_says_why_and_is_silent(tmp_path, capfd):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"this is not a model")
    with pytest.raises(UnsupportedError, match=r"bad\.gguf: llama\.cpp cannot load this model: .*magic"):
        LlamaCpp(path, n_threads=1)
    assert capfd.readouterr() == ("", "")


def test_missing_library_says_what_to_install(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hotcold\[bench\]'"):
        LlamaCpp(bundle / "tiny.gguf", n_threads=1)
