"""Fake quantization is ggml's Q4_0, leaves gradients alone, and bakes weights that Q4_0 stores exactly."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotcold.model.checkpoint import ffn_layers
from hotcold.sparsify.training.rounding import (
    bake,
    pack_q4_0,
    prepare_rounding,
    quantizable,
    round_q4_0,
    start_rounding,
    unpack_q4_0,
)

Q4_0 = gguf.GGMLQuantizationType.Q4_0


def through_gguf(weight: torch.Tensor) -> torch.Tensor:
    stored = gguf.quants.quantize(weight.numpy(), Q4_0)
    return torch.from_numpy(gguf.quants.dequantize(stored, Q4_0))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([1e-4, 0.02, 1.0, 30.0]))
def test_it_is_what_q4_0_stores(seed, scale):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)) * scale
    weight[0] = 0
    assert np.array_equal(round_q4_0(weight).numpy(), through_gguf(weight).numpy())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([1e-4, 0.02, 30.0]))
def test_packed_bytes_are_ggmls(seed, scale):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)) * scale
    packed = pack_q4_0(weight)
    assert np.array_equal(packed.numpy(), gguf.quants.quantize(weight.numpy(), Q4_0))
    assert torch.equal(unpack_q4_0(packed), round_q4_0(weight))
    assert torch.equal(pack_q4_0(unpack_q4_0(packed).half().float()), packed)  # as a float16 checkpoint


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_rounding_twice_is_rounding_once(seed):
    once = round_q4_0(torch.randn(4, 96, generator=torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(round_q4_0(once), once, rtol=1e-3, atol=0)


def test_gradients_pass_straight_through(dense):
    layer = ffn_layers(dense)[0]
    x = torch.randn(5, 32)
    layer.gate(x).sum().backward()
    expected = layer.gate.weight.grad.clone()
    layer.gate.weight.grad = None
    prepare_rounding(dense)
    start_rounding(dense)
    layer.gate(x).sum().backward()
    torch.testing.assert_close(layer.gate.parametrizations.weight.original.grad, expected)


def test_baking_keeps_the_function_and_q4_0_stores_it(dense):
    dense.requires_grad_(False)
    for layer in ffn_layers(dense):
        layer.mlp.requires_grad_(True)
    ids = torch.arange(40)[None]
    before = dense(ids).logits
    prepare_rounding(dense)
    torch.testing.assert_close(dense(ids).logits, before)
    start_rounding(dense)
    rounded = dense(ids).logits
    bake(dense)
    torch.testing.assert_close(dense(ids).logits, rounded)
    assert (before - rounded).abs().max() > 1e-3
    assert not any("parametrizations" in name for name, _ in dense.named_parameters())
    for module, transposed in quantizable(dense):
        weight = module.weight.detach().T if transposed else module.weight.detach()
        torch.testing.assert_close(through_gguf(weight.contiguous()), weight, rtol=1e-3, atol=0)


def test_down_is_rounded_along_its_neurons(dense):
    transposed = {id(module) for module, is_transposed in quantizable(dense) if is_transposed}
    assert transposed == {id(layer.down) for layer in ffn_layers(dense)}


def test_rows_that_are_not_whole_blocks_stay(dense):
    ffn_layers(dense)[0].gate.weight = torch.nn.Parameter(torch.randn(64, 33))
    assert id(ffn_layers(dense)[0].gate) not in {id(module) for module, _ in quantizable(dense)}


def test_a_block_that_is_no_multiple_is_refused_by_torch():
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        round_q4_0(torch.ones(3, 33))
