"""Rows hold what GGUF stores, weight for weight."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from hotcold.errors import ShapeError, UnsupportedError
from hotcold.runtime.triton.rows import Rows, joined


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_dequantizes_as_gguf_does(kind):
    quant = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32), quant)
    rows = Rows.from_gguf(kind, packed, 96)
    assert np.array_equal(rows.dequantize().numpy(), gguf.quants.dequantize(packed, quant))
    assert rows.nbytes == packed.nbytes and rows.row_bytes == packed.nbytes // 5
    few = rows.take(torch.tensor([3, 1]))
    assert torch.equal(few.dequantize(), rows.dequantize()[[3, 1]]) and few.n == 2


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0"])
def test_joined_where_types_allow_it(kind):
    def packed(name, n):
        values = np.random.default_rng(n).standard_normal((n, 64)).astype(np.float32)
        quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
        return Rows.from_gguf(name, quantized, 64)

    parts = [packed(kind, 3), packed(kind, 2)]
    (whole,) = joined(parts)
    assert whole.kind == parts[0].kind and whole.nbytes == sum(part.nbytes for part in parts)
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert joined([*parts, packed("F16", 2)])[:2] == parts


def test_errors():
    with pytest.raises(UnsupportedError, match="Q6_K"):
        Rows.from_gguf("Q6_K", np.zeros(210, np.uint8), 256)
    with pytest.raises(ShapeError, match="not a whole number of rows"):
        Rows.from_gguf("F16", np.zeros(7, np.uint8), 2)
    with pytest.raises(ShapeError, match="float matrix"):
        Rows.of(torch.zeros(2, 2, dtype=torch.int8))
