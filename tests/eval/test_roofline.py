"""Bytes that decoding must read, counted from a real file, and the arithmetic of the ceiling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotcold.eval.roofline import PARTS, Roofline, dense_bytes_per_token
from hotcold.files.gguf import GGUFFile

D_MODEL, D_FF, N_LAYERS, HEAD_DIM, KV_HEADS = 64, 96, 2, 16, 2


def test_bytes_of_a_dense_file_by_part(bundle):
    n_vocab = GGUFFile(bundle / "tiny.gguf").tensors["token_embd.weight"].shape[0]
    parts = dense_bytes_per_token(bundle / "tiny.gguf", position=10)
    kv = KV_HEADS * HEAD_DIM
    assert parts["attention"] == N_LAYERS * 2 * (2 * D_MODEL * D_MODEL + 2 * D_MODEL * kv)
    assert parts["head"] == n_vocab * D_MODEL * 2  # tied: the embedding is the head
    assert parts["kv"] == 10 * N_LAYERS * 2 * kv * 2
    router = D_MODEL * 4
    assert parts["ffn"] == N_LAYERS * (3 * D_MODEL * D_FF * 2 + router)
    assert parts["predictor"] == 0
    assert set(parts) == set(PARTS)


def test_all_weights_are_read_once(bundle):
    file = GGUFFile(bundle / "tiny.gguf")
    total = sum(tensor.data.nbytes for tensor in file.tensors.values())
    assert sum(dense_bytes_per_token(bundle / "tiny.gguf", position=0).values()) == total


@given(
    bandwidth=st.floats(1, 1000), tok_s=st.floats(0.1, 1e4), parts=st.lists(st.floats(1, 1e10), min_size=1)
)
def test_share_is_speed_over_ceiling_and_bytes_over_bandwidth(bandwidth, tok_s, parts):
    roofline = Roofline(dict(enumerate(parts)), bandwidth)
    assert roofline.share(roofline.ceiling) == pytest.approx(1.0)
    assert roofline.share(tok_s) == pytest.approx(roofline.gb_s(tok_s) / bandwidth)
