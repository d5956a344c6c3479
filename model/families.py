"""The families of models: how each is put together, and what transformers calls its weights and settings.

One row of `FAMILIES` per `model_type`. Weights bear GGUF's names in all of hotcold (`attn_q`, `ffn_down`,
…, one set for every family); a row says which module of transformers each is. What differs between two
checkpoints of a family stands in their `config.json` and is read by `architectures.ModelSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

__all__ = ["FAMILIES", "Family"]

_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`.

    `modules`: our names to transformers', those inside a layer with `{}` for its number. `keys`: Llama's
    names of settings to this family's. `biases`: which modules have one, by the flag in `config.json` that
    turns it on (`""`: always). `two_norms`: the norms' modules where a
    parallel block has two. `window`: which layers a sliding window is
    for (`all`, `chosen` by the config, or none). `dense`, `sparse`: the `general.architecture` of the two
    GGUF files, with the model's own FFN.
    """

    modules: Mapping[str, str]
    keys: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layer_norm: bool = False
    gated: bool = True
    parallel: bool = False
    head_norm: bool = False
    fused_qkv: bool = False
    two_norms: Mapping[str, str] = field(default_factory=dict)
    first_position: int | None = None  # row of the learned position 0; None: rotary positions
    window: str = ""
    tied: bool = False  # where the config does not say
    activation: str | None = None  # where the config does not say; None: it has to
    drelu: bool = False  # what this family calls ReLU is applied to gate and up
    dense: str = "llama"
    sparse: str = "llama"
    refused: Mapping[str, object] = field(default_factory=dict)  # settings that must have this value


_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_HEAD_NORMS = {
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
# Without a gate there is one matrix into the FFN, and it is called up.
_OPT = {
    "token_embd": "model.decoder.embed_tokens",
    "position_embd": "model.decoder.embed_positions",
    "output_norm": "model.decoder.final_layer_norm",
    "output": "lm_head",
    "attn_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "attn_q": "model.decoder.layers.{}.self_attn.q_proj",
    "attn_k": "model.decoder.layers.{}.self_attn.k_proj",
    "attn_v": "model.decoder.layers.{}.self_attn.v_proj",
    "attn_output": "model.decoder.layers.{}.self_attn.out_proj",
    "ffn_norm": "model.decoder.layers.{}.final_layer_norm",
    "ffn_up": "model.decoder.layers.{}.fc1",
    "ffn_down": "model.decoder.layers.{}.fc2",
}
_FALCON = {
    "token_embd": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.input_layernorm",
    "attn_qkv": "transformer.h.{}.self_attention.query_key_value",
    "attn_output": "transformer.h.{}.self_attention.dense",
    "ffn_norm": "transformer.h.{}.input_layernorm",
    "ffn_up": "transformer.h.{}.mlp.dense_h_to_4h",
    "ffn_down": "transformer.h.{}.mlp.dense_4h_to_h",
}

_LLAMA_FAMILY = Family(_LLAMA, biases={"attention_bias": _ATTENTION})
_MISTRAL = Family(_LLAMA, window="all")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA_FAMILY,
    "mistral": _MISTRAL,
    # Bamboo and TurboSparse-Mistral: `hidden_act` says relu, the remote code applies it twice
    "bamboo": replace(_MISTRAL, drelu=True),
    "qwen2": Family(_LLAMA, biases={"": _ATTENTION[:3]}, window="chosen", dense="qwen2", sparse="qwen2"),
    "qwen3": Family(
        _LLAMA | _HEAD_NORMS, biases={"attention_bias": _ATTENTION}, head_norm=True, window="chosen",
        dense="qwen3", sparse="qwen3",
    ),
    "granite": _LLAMA_FAMILY,
    "minicpm": Family(_LLAMA, tied=True),
    "opt": Family(
        _OPT,
        keys={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        biases={"": (*_ATTENTION, "ffn_up", "ffn_down")},
        layer_norm=True, gated=False, first_position=2, tied=True, activation="relu",
        dense="gpt2", sparse="opt",
        refused={"do_layer_norm_before": True, "_remove_final_layer_norm": False,
                 "layer_norm_elementwise_affine": True, "enable_bias": True},
    ),
    "falcon": Family(
        _FALCON,
        keys={"intermediate_size": "ffn_hidden_size", "hidden_act": "activation",
              "rms_norm_eps": "layer_norm_epsilon", "num_key_value_heads": "num_kv_heads"},
        two_norms={"attn_norm": "transformer.h.{}.ln_attn", "ffn_norm": "transformer.h.{}.ln_mlp"},
        layer_norm=True, gated=False, parallel=True, fused_qkv=True, tied=True, activation="gelu",
        dense="falcon", sparse="falcon", refused={"alibi": False, "parallel_attn": True, "bias": False},
    ),
}  # fmt: skip
