"""Input rules: what they say, where they stand, and what transformers then computes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import D_FF, D_MODEL, FAMILIES, IDS, N_LAYERS, write_model

from hotcold import storage
from hotcold.errors import FormatError
from hotcold.files.gguf import GGUFFile
from hotcold.files.json import read_json
from hotcold.model import checkpoint
from hotcold.model.inputs import (
    CONFIG_KEY,
    SCORES,
    SITES,
    InputRule,
    config_entry,
    least_inputs,
    metadata_of,
    rules_of_config,
    rules_of_file,
    weights_key,
)
from hotcold.model.spec import ModelSpec

PARTS = {
    "llama-silu-tied": {
        "qkv": "model.layers.{}.self_attn.q_proj model.layers.{}.self_attn.k_proj "
        "model.layers.{}.self_attn.v_proj",
        "o": "model.layers.{}.self_attn.o_proj",
        "gate_up": "model.layers.{}.mlp.gate_proj model.layers.{}.mlp.up_proj",
        "down": "model.layers.{}.mlp.down_proj",
    },
    "opt": {
        "qkv": "model.decoder.layers.{}.self_attn.q_proj model.decoder.layers.{}.self_attn.k_proj "
        "model.decoder.layers.{}.self_attn.v_proj",
        "o": "model.decoder.layers.{}.self_attn.out_proj",
        "gate_up": "model.decoder.layers.{}.fc1",
        "down": "model.decoder.layers.{}.fc2",
    },
    "falcon-7b": {
        "qkv": "transformer.h.{}.self_attention.query_key_value",
        "o": "transformer.h.{}.self_attention.dense",
        "gate_up": "transformer.h.{}.mlp.dense_h_to_4h",
        "down": "transformer.h.{}.mlp.dense_4h_to_h",
    },
}  # fmt: skip
SOME = (InputRule("o", (0.25, 0.5)), InputRule("down", (0.0, 1.5), "wina"))

thresholds = st.lists(st.floats(0, 1e6, width=32), min_size=N_LAYERS, max_size=N_LAYERS).map(tuple)
rules = st.builds(InputRule, st.sampled_from(list(SITES)), thresholds, st.sampled_from(list(SCORES)))
rule_sets = st.lists(rules, unique_by=lambda rule: rule.site).map(
    lambda found: tuple(sorted(found, key=lambda rule: list(SITES).index(rule.site)))
)


@given(rule_sets)
def test_what_is_written_is_read(some):
    assert rules_of_config({CONFIG_KEY: config_entry(some)}, N_LAYERS) == some


def write_gguf(path, metadata):
    """By the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_key_value(key, value.tolist(), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.FLOAT32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile(path)


def test_gguf_metadata_says_the_same(tmp_path):
    weights = np.linspace(0, 3, N_LAYERS * D_FF, dtype=np.float32)
    file = write_gguf(tmp_path / "m.gguf", metadata_of(SOME) | {weights_key(SOME[1]): weights})
    assert rules_of_file(file, N_LAYERS) == SOME
    spec = ModelSpec.from_config(FAMILIES["llama"])
    found = least_inputs(file, spec)
    assert list(found) == ["o", "down"]
    np.testing.assert_array_equal(found["o"], [[0.25] * D_MODEL, [0.5] * D_MODEL])
    assert not found["down"][0].any()
    size = np.float32(0.7)
    for least, weight in zip(found["down"][1], weights[D_FF:], strict=True):
        assert (size >= least) == (size * weight >= 1.5)


@pytest.mark.parametrize(
    "weights", [None, np.ones(3), np.full(N_LAYERS * D_FF, np.nan), -np.ones(N_LAYERS * D_FF)]
)
def test_weights_that_do_not_fit_are_refused(tmp_path, weights):
    metadata = metadata_of(SOME) | ({} if weights is None else {weights_key(SOME[1]): weights.astype("f4")})
    file = write_gguf(tmp_path / "m.gguf", metadata)
    with pytest.raises(FormatError, match=r"hotcold\.inputs\.down\.weights"):
        least_inputs(file, ModelSpec.from_config(FAMILIES["llama"]))


GOOD = {"score": "magnitude", "thresholds": [0.1, 0.2]}


@pytest.mark.parametrize(
    "entry",
    [
        "o", ["o"], {"p": GOOD}, {"o": None}, {"o": {"score": "magnitude"}}, {"o": GOOD | {"more": 1}},
        {"o": GOOD | {"score": "size"}}, {"o": GOOD | {"score": ["wina"]}}, {"o": GOOD | {"thresholds": 0.1}},
        {"o": GOOD | {"thresholds": [0.1]}}, {"o": GOOD | {"thresholds": [0.1, -0.1]}},
        {"o": GOOD | {"thresholds": [0.1, True]}}, {"o": GOOD | {"thresholds": [0.1, float("nan")]}},
        {"o": GOOD | {"thresholds": [0.1, float("inf")]}}, {"o": GOOD | {"thresholds": [0.1, "0.1"]}},
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused(entry):
    with pytest.raises(FormatError, match="not an input rule"):
        ModelSpec.from_config(FAMILIES["llama"] | {CONFIG_KEY: entry})


def model_with(folder, name, some):
    write_model(folder, FAMILIES[name])
    config = read_json(folder / "config.json") | {CONFIG_KEY: config_entry(some)}
    storage.write_json(folder / "config.json", config)
    return checkpoint.load_model(str(folder))


def masked_by_hand(model, places, site, score, threshold):
    """A second hand: wraps `forward` of each module, and knows the first token by its place in the row."""
    for layer in range(N_LAYERS):
        modules = [model.get_submodule(path) for path in places[site].format(*[layer] * 3).split()]
        norm = torch.cat([module.weight for module in modules]).norm(dim=0) if score == "wina" else 1.0
        for module in modules:
            plain = module.forward

            def forward(x, plain=plain, norm=norm):
                rows = x.reshape(-1, len(IDS), x.shape[-1])
                kept = rows.abs() * norm >= threshold
                kept[:, 0] = True
                return plain((rows * kept).view_as(x))

            module.forward = forward
    return model


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("score", SCORES)
@torch.no_grad()
def test_transformers_computes_what_the_rules_say(tmp_path, name, site, score):
    threshold = 0.5
    ids = torch.from_numpy(np.stack([IDS, IDS[::-1]]))
    model = model_with(tmp_path / "rules", name, [InputRule(site, (threshold,) * N_LAYERS, score)])
    write_model(tmp_path / "plain", FAMILIES[name])
    plain = checkpoint.load_model(str(tmp_path / "plain"))
    dense = plain(ids).logits
    expected = masked_by_hand(plain, PARTS[name], site, score, threshold)(ids).logits
    found = model(ids).logits
    torch.testing.assert_close(found, expected)
    assert (found - dense).abs().max() > 1e-3  # something was left out
    torch.testing.assert_close(found[:, 0], dense[:, 0])  # but not of the first token


@torch.no_grad()
def test_a_cache_does_not_make_a_first_token(tmp_path):
    model = model_with(tmp_path / "m", "llama", [InputRule("qkv", (0.5, 0.5)), InputRule("down", (0.5, 0.5))])
    ids = torch.from_numpy(IDS)[None]
    begun = model(ids[:, :20], use_cache=True)
    steps = [model(ids[:, 20:21], past_key_values=begun.past_key_values, use_cache=True).logits]
    steps += [model(ids[:, 21:], past_key_values=begun.past_key_values, use_cache=True).logits]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits[:, 20:])


def test_a_saved_model_keeps_its_rules(tmp_path):
    model = model_with(tmp_path / "m", "llama", SOME)
    model.save_pretrained(tmp_path / "again")
    assert rules_of_config(read_json(tmp_path / "again/config.json"), N_LAYERS) == SOME
