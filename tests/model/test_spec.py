"""`config.json` is read strictly, and the order of q/k rows can be changed and changed back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotcold.errors import FormatError, HotcoldError, UnsupportedError
from hotcold.model.metadata import hyper_parameters
from hotcold.model.spec import ModelSpec
from hotcold.model.tensors import interleave_rope, split_rope

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "max_position_embeddings": 256, "vocab_size": 100, "rms_norm_eps": 1e-5,
    "hidden_act": "relu", "rope_theta": 5000.0,
}  # fmt: skip


def test_defaults():
    spec = ModelSpec.from_config(LLAMA)
    assert (spec.n_kv_heads, spec.head_dim, spec.tied) == (4, 16, False)
    assert (spec.activation, spec.firing.thresholds, spec.rope_theta) == ("relu", (0.0, 0.0), 5000.0)


@pytest.mark.parametrize(
    "changes, activation, thresholds",
    [
        ({"hidden_act": "silu"}, "silu", (0.0, 0.0)),
        ({"hidden_act": "swish"}, "silu", (0.0, 0.0)),
        ({"hidden_act": "drelu"}, "drelu", (0.0, 0.0)),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.01}, "fatrelu", (0.01, 0.01)),
        ({"hidden_act": "fatrelu_0.01"}, "fatrelu", (0.01, 0.01)),
        ({"hidden_act": "fatrelu", "activation_thresholds": [0.0, 0.5]}, "fatrelu", (0.0, 0.5)),
        ({"hidden_act": "fatrelu"}, "fatrelu", (0.0, 0.0)),
    ],
)
def test_activations_and_their_spellings(changes, activation, thresholds):
    spec = ModelSpec.from_config(LLAMA | changes)
    assert (spec.activation, spec.firing.thresholds) == (activation, thresholds)


@pytest.mark.parametrize(
    "rope, theta",
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, 1e5),
        ({"rope_scaling": {"rope_type": "default"}}, 5000.0),
        ({"rope_scaling": None}, 5000.0),
        ({"rope_theta": None}, 10000.0),
    ],
)
def test_rope_in_old_and_new_places(rope, theta):
    spec = ModelSpec.from_config(LLAMA | rope)
    assert hyper_parameters(spec, "llama")["llama.rope.freq_base"] == np.float32(spec.rope_theta) == theta


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"hidden_size": None}, FormatError, r"c\.json, hidden_size: missing key"),
        ({"hidden_size": "64"}, FormatError, r"bad value \(got 64, expected a positive integer\)"),
        ({"num_hidden_layers": 0}, FormatError, r"num_hidden_layers: bad value"),
        ({"vocab_size": True}, FormatError, r"vocab_size: bad value"),
        ({"rms_norm_eps": float("nan")}, FormatError, r"rms_norm_eps: bad value"),
        ({"model_type": "gpt2"}, UnsupportedError, r"model_type \(got gpt2, expected llama \| mistral \|"),
        ({"hidden_act": "mish"}, UnsupportedError, r"got mish, expected relu \| relu2 \| drelu \| fatrelu_T"),
        ({"hidden_act": "fatrelu", "activation_thresholds": [0.1]}, FormatError, r"2 of them"),
        ({"hidden_act": "fatrelu", "hidden_act_param": -1}, FormatError, r"bad thresholds"),
        ({"rope_scaling": {"rope_type": "yarn"}}, FormatError, "original_max_position_embeddings: missing"),
        ({"rope_scaling": {"type": "longrope"}}, UnsupportedError, r"unknown rope scaling \(got longrope"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, FormatError, "factor: bad value"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                              "original_max_position_embeddings": 64}},
            FormatError, "high_freq_factor: bad value",
        ),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial rotary positions"),
        ({"rope_parameters": [1]}, FormatError, r"rope_parameters: bad value"),
        ({"model_type": "mistral", "sliding_window": -1}, FormatError, "sliding_window: bad value"),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": 1}, FormatError, "true or false"),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "layer_types": ["a"]},
            FormatError, "layer_types: bad value",
        ),
        ({"model_type": "minicpm"}, FormatError, "scale_emb: missing key"),
        ({"model_type": "opt", "do_layer_norm_before": False}, UnsupportedError, "opt with do_layer_norm"),
        ({"model_type": "falcon", "alibi": True}, UnsupportedError, r"falcon with alibi \(got True"),
        ({"model_type": "falcon", "activation": "drelu"}, UnsupportedError, "dReLU needs a gate"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        ModelSpec.from_config(LLAMA | changes, "c.json")


@pytest.mark.parametrize(
    "changes, windows",
    [
        ({"model_type": "mistral", "sliding_window": 256}, (0, 0)),  # as long as the context
        ({"model_type": "mistral", "sliding_window": 128}, (128, 128)),
        ({"model_type": "mistral", "sliding_window": None}, (0, 0)),
        ({"model_type": "llama", "sliding_window": 128}, (0, 0)),  # transformers' Llama has none
        ({"model_type": "qwen2", "sliding_window": 128}, (0, 0)),
        ({"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True}, (0, 0)),  # from layer 28
        (
            {"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            (0, 8),
        ),
        (
            {"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True,
             "layer_types": ["sliding_attention", "full_attention"]},
            (8, 0),
        ),
    ],
)  # fmt: skip
def test_sliding_windows_are_where_transformers_has_them(changes, windows):
    assert ModelSpec.from_config(LLAMA | changes).windows == windows


def test_head_dim_that_differs_is_written_out():
    spec = ModelSpec.from_config(LLAMA | {"head_dim": 32})
    assert hyper_parameters(spec, "llama")["llama.attention.key_length"] == np.uint32(32)
    assert "llama.attention.key_length" not in hyper_parameters(ModelSpec.from_config(LLAMA), "llama")


SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FALCON = {
    "model_type": "falcon", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "vocab_size": 100, "max_position_embeddings": 256, "new_decoder_architecture": True, "num_kv_heads": 2,
    "num_ln_in_parallel_attn": 2, "multi_query": True, "layer_norm_epsilon": 1e-5, "activation": "relu",
    "ffn_hidden_size": 128, "alibi": False, "parallel_attn": True, "bias": False,
}  # fmt: skip
OPT = {
    "model_type": "opt", "num_hidden_layers": 2, "hidden_size": 64, "ffn_dim": 128,
    "num_attention_heads": 4, "max_position_embeddings": 256, "vocab_size": 100,
    "activation_function": "relu", "do_layer_norm_before": True, "enable_bias": True,
}  # fmt: skip
SPELLINGS = [
    LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True, "head_dim": 16},
    LLAMA | {"rope_parameters": YARN | {"attention_factor": 1.0, "beta_fast": 32, "beta_slow": 1}},
    LLAMA | {"rope_parameters": LLAMA3, "hidden_act": "fatrelu", "hidden_act_param": 0.01},
    LLAMA | {"hidden_act": "fatrelu", "activation_thresholds": [0.1, 0.2], "attention_bias": True},
    LLAMA | {"model_type": "mistral", "sliding_window": 16, "num_key_value_heads": 2},
    LLAMA | {"model_type": "qwen2"} | SLIDING,
    LLAMA | {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]} | SLIDING,
    LLAMA | {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
    LLAMA | {"model_type": "granite", "logits_scaling": 2.0, "attention_multiplier": 0.1},
    FALCON,
    OPT,
]  # fmt: skip
ODD = [
    None, True, [], [1], {}, {"a": []}, "", "x", "fatrelu_1e999", 0, -1, 1, 2.5, 1 << 31, 10**400,
    5e-324, 1e308, float("inf"), float("nan"),
]  # fmt: skip


@pytest.mark.parametrize("good", SPELLINGS, ids=lambda config: config["model_type"])
def test_no_odd_value_of_any_key_gets_past_its_check(good):
    spec = ModelSpec.from_config(good)
    assert spec.n_layers == 2
    changed = [good | {key: value} for key in good for value in ODD]
    for rope in ("rope_parameters", "rope_scaling"):
        inner = good.get(rope, {})
        changed += [good | {rope: inner | {key: value}} for key in inner for value in ODD]
    refused = 0
    for config in changed:
        try:
            ModelSpec.from_config(config)
        except HotcoldError:  # anything else is a crash
            refused += 1
    assert refused > len(changed) // 3


@given(n_heads=st.integers(1, 6), half=st.integers(1, 5), width=st.integers(1, 4))
def test_interleaving_pairs_row_i_with_row_i_plus_half(n_heads, half, width):
    weight = np.arange(n_heads * 2 * half * width).reshape(n_heads * 2 * half, width)
    interleaved = interleave_rope(weight, n_heads)
    for head in range(n_heads):
        start = head * 2 * half
        for i in range(half):
            assert (interleaved[start + 2 * i] == weight[start + i]).all()
            assert (interleaved[start + 2 * i + 1] == weight[start + i + half]).all()
    np.testing.assert_array_equal(split_rope(interleaved, n_heads), weight)
