"""Quantized bytes are ggml's, and come back within the error that each type allows."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from hotcold.errors import UnsupportedError
from hotcold.files import quantize as module
from hotcold.files.gguf import Tensor, row_bytes
from hotcold.files.quantize import QUANTS, dequantize, quantize, row_type, type_of


def tensor(array: np.ndarray, kind: str) -> Tensor:
    return Tensor("t", array.shape, kind, quantize(array, kind).reshape(-1))


def odd_rows() -> np.ndarray:
    """Normal rows, zero blocks, tiny and huge values, one-sided blocks, ties."""
    rows = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    rows[1] = 0
    rows[2, 32:64] = 0
    rows[3] *= 1e-9
    rows[4] *= 1e4
    rows[5] = np.abs(rows[5])
    rows[6] = -np.abs(rows[6])
    rows[7] = np.tile([1.0, -1.0], 128)
    rows[8] = np.arange(256) / 16
    return rows


def ggml() -> ctypes.CDLL:
    """llama-cpp-python's shared library; names are also looked up in the ggml that it links to."""
    return pytest.importorskip("llama_cpp").llama_cpp._lib


def ggml_bytes(rows: np.ndarray, kind: str, n_bytes: int) -> np.ndarray:
    """What ggml's own quantizer makes of float32 rows."""
    reference = ggml()["ggml_quantize_chunk"]
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    reference.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    reference.restype = ctypes.c_size_t
    out = np.zeros(n_bytes, np.uint8)
    type_id = int(GGMLQuantizationType[kind])
    assert reference(type_id, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None) == n_bytes
    return out


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_bytes_equal_the_ggml_reference(kind):
    rows = odd_rows()
    ours = quantize(rows, kind)
    np.testing.assert_array_equal(ours.reshape(-1), ggml_bytes(rows, kind, ours.nbytes))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_of_ggml_are_read_as_ggml_reads_them(kind):
    rows = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    data = ggml_bytes(rows, kind, 8 * row_bytes(kind, 512))
    expected = np.zeros_like(rows)
    reference = ggml()[f"dequantize_row_{kind[:2].lower()}_K"]
    reference.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    reference.restype = None
    reference(data.ctypes.data, expected.ctypes.data, rows.size)
    np.testing.assert_allclose(
        dequantize(Tensor("t", rows.shape, kind, data)), expected, rtol=1e-6, atol=1e-6
    )


# largest error of a value, as a share of the largest value in its block of 32
LIMITS = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.51 / 127 + 2**-10, "Q4_0": 1 / 8 + 2**-9,
          "Q4_1": 1 / 15 + 2**-8, "Q5_0": 1 / 16 + 2**-9, "Q5_1": 1 / 31 + 2**-8}  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 1e3), kind=st.sampled_from(list(LIMITS)))
def test_values_come_back_within_the_limit_of_the_type(seed, scale, kind):
    array = np.random.default_rng(seed).standard_normal((4, 64)).astype(np.float32) * np.float32(scale)
    blocks, again = array.reshape(-1, 32), dequantize(tensor(array, kind)).reshape(-1, 32)
    assert again.dtype == np.float32
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    assert (np.abs(again - blocks) <= LIMITS[kind] * largest + 1e-30).all()


def test_every_name_has_a_limit_and_a_type():
    assert set(QUANTS.values()) == set(LIMITS)
    with pytest.raises(UnsupportedError, match=r"unknown quantization \(got q3, expected f32 \| f16"):
        type_of("q3")


def test_chunks_do_not_change_the_bytes(monkeypatch):
    rows = odd_rows()
    whole = quantize(rows, "Q4_0")
    monkeypatch.setattr(module, "_CHUNK", 600)
    np.testing.assert_array_equal(quantize(rows, "Q4_0"), whole)


def test_three_dimensions_and_empty_tensors():
    array = np.random.default_rng(0).standard_normal((1, 5, 64)).astype(np.float32)
    assert quantize(array, "Q8_0").shape == (1, 5, 68)
    assert dequantize(tensor(array, "Q8_0")).shape == array.shape
    assert dequantize(tensor(array[0, 0], "Q4_0")).shape == (64,)
    assert dequantize(tensor(np.zeros((0, 64), np.float32), "Q4_0")).shape == (0, 64)


def test_rows_of_broken_blocks_become_f16():
    assert [row_type(kind, 48) for kind in ("Q4_0", "Q8_0", "F32", "BF16")] == ["F16", "F16", "F32", "BF16"]
    assert row_type("Q4_0", 64) == "Q4_0"


def test_a_type_without_decoder_is_named():
    with pytest.raises(UnsupportedError, match=r"t: cannot decode this tensor type \(got Q8_1\)"):
        dequantize(Tensor("t", (32,), "Q8_1", np.zeros(40, np.uint8)))
