"""Rotary frequencies are those of transformers' own functions, whatever the scaling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hotcold.errors import UnsupportedError
from hotcold.model.config_fields import Fields
from hotcold.model.rope import Rope

N_CTX = 4096

factors = st.floats(1.0, 40.0)
originals = st.integers(64, 8192)
scalings = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factors}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"), "factor": factors, "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 8.0), "original_max_position_embeddings": originals,
        },
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"), "factor": factors, "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.5, 4.0), "original_max_position_embeddings": originals,
        },
        optional={"attention_factor": st.floats(0.5, 2.0)},
    ),
)  # fmt: skip


def read(**config: object) -> Rope:
    return Rope.from_config(Fields(config, "config.json"), N_CTX)


@settings(max_examples=60)
@given(scaling=scalings, theta=st.sampled_from([1e4, 5e5, 1e6]), dim=st.sampled_from([16, 64, 128]))
def test_frequencies_are_those_of_transformers(scaling, theta, dim):
    config = LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=N_CTX,
        rope_parameters=scaling | {"rope_theta": theta},
    )  # fmt: skip
    expected, attention = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    rope = read(rope_parameters=scaling | {"rope_theta": theta})
    np.testing.assert_allclose(rope.frequencies(dim), expected.numpy(), rtol=2e-5)
    assert rope.attention_factor == pytest.approx(attention)


def test_old_and_new_places_say_the_same():
    scaling = {"factor": 2.0, "rope_theta": 5000.0}
    new = read(rope_parameters=scaling | {"rope_type": "linear"})
    assert new == read(rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert new == Rope(5000.0, "linear", 2.0)
    assert (
        read(rope_scaling={"type": "dynamic", "factor": 2.0}) == Rope()
    )  # changes nothing within the context


def test_yarn_without_a_factor_stretches_to_the_context():
    rope = read(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 1024})
    assert rope.factor == 4.0


@pytest.mark.parametrize("more", [{"mscale": 1.0}, {"mscale_all_dim": 1.0}, {"truncate": False}])
def test_variants_of_yarn_that_gguf_cannot_say_are_refused(more):
    with pytest.raises(UnsupportedError, match=f"YaRN with {next(iter(more))}"):
        read(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 64, **more})


def test_yarn_comes_near_to_llama_3():
    """Both keep the pairs that turn often and divide the slow ones; only the ramp between is another."""
    rope = Rope(5e5, "llama3", 8.0, 8192, 1.0, 4.0)
    ratio = rope.as_yarn().frequencies(128) / rope.frequencies(128)
    np.testing.assert_allclose(np.delete(ratio, slice(28, 36)), 1, rtol=1e-5)
    assert 0.5 < ratio.min() <= ratio.max() < 1.5
    assert rope.as_yarn().attention_factor == 1.0
