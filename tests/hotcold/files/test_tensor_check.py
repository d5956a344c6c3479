"""The one rule about found and expected tensors, the names of both, and the bits of numbers that are none."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotcold.errors import FormatError, HotcoldError, InputError, ShapeError, UnsupportedError
from hotcold.files.stored import check_stored
from hotcold.files.tensor_check import check_tensors, plain_names
from hotcold.finite import all_finite, check_logits, perplexity_of

EXPECTED = {"embed.weight": (8, 4), "mlp.up_proj.weight": (6, 4), "norm.weight": (4,)}
SHAPES = st.dictionaries(
    st.sampled_from([*EXPECTED, "mlp.up_proj.bias", "self_attn.rotary_emb.inv_freq", "attn.bias"]),
    st.sampled_from([(8, 4), (6, 4), (4,), (1, 1, 9, 9)]),
)


@given(SHAPES)
def test_exactly_the_expected_tensors_pass(found):
    """Written a second time: what is left of `found` without buffers must be `EXPECTED`."""
    mask = found.get("attn.bias") == (1, 1, 9, 9)
    weights = {
        name: shape
        for name, shape in found.items()
        if not name.endswith("inv_freq") and not (name == "attn.bias" and mask)
    }
    if weights == EXPECTED:
        check_tensors(EXPECTED, found, "m")
        return
    with pytest.raises(HotcoldError) as caught:
        check_tensors(EXPECTED, found, "m")
    kind = ShapeError
    if EXPECTED.keys() - weights.keys():
        kind = FormatError
    elif weights.keys() - EXPECTED.keys():
        kind = UnsupportedError
    assert type(caught.value) is kind
    wrong = {name for name in EXPECTED.keys() | weights if EXPECTED.get(name) != weights.get(name)}
    assert any(name in str(caught.value) for name in wrong)


def test_a_missing_tensor_is_named_with_those_that_are_there_instead():
    found = dict(EXPECTED)
    found["mlp.up.weight"] = found.pop("mlp.up_proj.weight")
    with pytest.raises(
        FormatError, match=r"^m, mlp\.up_proj\.weight: missing tensor \(got mlp\.up\.weight\)$"
    ):
        check_tensors(EXPECTED, found, "m")


@pytest.mark.parametrize(
    "stored, name, prefixes",
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", []),
        ("_orig_mod.model.norm.weight", "model.norm.weight", ["_orig_mod."]),
        ("model.layers.0._orig_mod.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", ["_orig_mod."]),
        ("base_model.model.model.norm.weight", "model.norm.weight", ["base_model.model."]),
        ("base_model.model.lm_head.weight", "lm_head.weight", ["base_model.model."]),
        ("module.lm_head.weight", "lm_head.weight", ["module."]),
        ("module._orig_mod.model.norm.weight", "model.norm.weight", ["module.", "_orig_mod."]),
        ("_fsdp_wrapped_module.model.norm.weight", "model.norm.weight", ["_fsdp_wrapped_module."]),
        ("model.language_model.layers.0.x.weight", "model.layers.0.x.weight", ["model.language_model."]),
        ("language_model.model.norm.weight", "model.norm.weight", ["language_model."]),
        ("language_model.lm_head.weight", "lm_head.weight", ["language_model."]),
        ("model.model.norm.weight", "model.norm.weight", ["model."]),
        ("model.transformer.h.0.mlp.x.weight", "transformer.h.0.mlp.x.weight", ["model."]),
        ("decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight", []),
        ("h.0.mlp.x.weight", "transformer.h.0.mlp.x.weight", []),
    ],
)
def test_prefixes_of_wrappers_are_taken_off(stored, name, prefixes):
    found, taken = plain_names([stored])
    assert found == {name: stored}
    assert sorted(taken) == sorted(prefixes)


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(FormatError, match=r"lm_head\.weight: two tensors with the same name"):
        plain_names(["lm_head.weight", "_orig_mod.lm_head.weight"])


@pytest.mark.parametrize(
    "name, what",
    [
        ("base_model.model.model.layers.0.q_proj.lora_A.default.weight", "adapter.*merge the adapter first"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "adapter"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "adapter"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "quantized"),
        ("model.layers.0.mlp.up_proj.weight_scale", "quantized"),
        ("model.layers.0.mlp.up_proj.qweight", "quantized"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "quantized"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "quantized"),
    ],
)
def test_adapters_and_quantized_weights_are_refused(name, what):
    with pytest.raises(UnsupportedError, match=what) as caught:
        plain_names([name])
    assert name in str(caught.value)


FLOATS = st.floats(width=32) | st.sampled_from([0.0, 1e-40, 65504.0, 65520.0, 1e6, 3e38, -np.inf, np.nan])


@given(st.lists(FLOATS, max_size=40))
def test_finite_is_what_numpy_calls_finite(values):
    array = np.array(values, np.float32)
    assert all_finite(array) == bool(np.isfinite(array).all())


@given(st.lists(FLOATS, min_size=6, max_size=6), st.sampled_from(["F32", "F16", "BF16", "F64"]))
def test_stored_floats_are_looked_at_by_their_bits(values, kind):
    array = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        stored = array.astype({"F16": np.float16, "F64": np.float64}.get(kind, np.float32))
    if kind == "BF16":
        stored = (array.view(np.uint32) >> 16).astype(np.uint16)
        array = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        array = stored
    if np.isfinite(array).all():
        check_stored(stored.view(np.uint8), kind, "w", "m")
    else:
        with pytest.raises(FormatError, match=f"^m, w: a value is not finite in {kind}$"):
            check_stored(stored.view(np.uint8), kind, "w", "m")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@given(place=st.integers(0, 8 * 32 - 1), value=st.sampled_from([np.nan, np.inf, -np.inf, 1e38, 1.0]))
def test_stored_blocks_are_looked_at_by_their_scales(kind, place, value):
    rows = np.linspace(-1, 1, 8 * 32, dtype=np.float32).reshape(2, -1)
    rows.reshape(-1)[place] = value
    with np.errstate(all="ignore"):
        packed = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
        decoded = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    if np.isfinite(decoded).all():
        check_stored(packed, kind, "w", "m")
    else:
        with pytest.raises(FormatError, match="w: a value is not finite"):
            check_stored(packed, kind, "w", "m")


def test_logits():
    assert check_logits(np.float32([[1, -np.inf], [3, 4]])).tolist() == [[1], [4]]
    for bad in ([np.nan, 1], [np.inf, 1], [-np.inf, -np.inf]):
        with pytest.raises(InputError, match="logits that are not finite"):
            check_logits(np.float32(bad))
    assert perplexity_of(0.0) == 1
    for nll in (np.nan, np.inf, 710.0):
        with pytest.raises(InputError, match="the perplexity is not finite"):
            perplexity_of(nll)
