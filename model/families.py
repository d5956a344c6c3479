"""The families of models: one row per `model_type` of transformers, and one per `general.architecture` of
GGUF.

A family that is new in its names alone is a row here, and nothing else. What differs between two checkpoints
of a family stands in their `config.json` or metadata and is read by `ModelSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hotcold.model.tensors import FALCON_GGUF, GGUF, UNGATED_GGUF, Naming

if TYPE_CHECKING:
    from hotcold.files.gguf import GGUFFile

__all__ = ["ARCHITECTURES", "FAMILIES", "Architecture", "Family", "Structure", "names_in"]

_ATTENTION = ("q", "k", "v", "o")


@dataclass(frozen=True, slots=True)
class Structure:
    """How the blocks of a model are put together.

    `layer_norm`: LayerNorms with biases, not RMSNorms. `gated`: FFNs have gates. `parallel`: attention and
    FFN read the same input. `head_norm`: each head of q and k is normed. `learned_positions`: not rotary
    ones.
    """

    layer_norm: bool = False
    gated: bool = True
    parallel: bool = False
    head_norm: bool = False
    learned_positions: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`.

    `keys`: Llama's names of settings to this family's. `biases`: which slots have one, by the flag in
    `config.json` that turns it on (`""`: always). `window`: which layers a sliding window is for (`all`,
    `chosen` by the config, or none). `dense`, `sparse`: the `general.architecture` of the two GGUF files,
    with the model's own FFN.
    """

    naming: Naming
    structure: Structure = Structure()
    keys: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    window: str = ""
    tied: bool = False  # where the config does not say
    activation: str | None = None  # where the config does not say; None: it has to
    drelu: bool = False  # what this family calls ReLU is applied to gate and up
    dense: str = "llama"
    sparse: str = "llama"
    refused: Mapping[str, object] = field(default_factory=dict)  # settings that must have this value
    act: str = "act_fn"  # the attribute of transformers' FFN that holds the activation


_GGUF, _INTERLEAVED = Naming(GGUF), Naming(GGUF, interleaved=True)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `general.architecture`, which fixes what a file does not say.

    `activation` is what llama.cpp or PowerInfer computes with it. `experts`: the FFN is written as a
    mixture's only expert. `rope_factors`: the tensor of that slot is known. `default_eps`: the norm's epsilon
    in files that do not say it, as those of PowerInfer's OPT converter. `model_type` is the family of a model
    in such a file.
    """

    structure: Structure = Structure()
    naming: Naming = _GGUF
    activation: str = "silu"
    experts: bool = False
    rope_factors: bool = False
    default_eps: float | None = None
    model_type: str = "llama"

    @property
    def eps_key(self) -> str:
        """Where the norm's epsilon stands."""
        return f"attention.layer_norm_{'' if self.structure.layer_norm else 'rms_'}epsilon"


_LLAMA = {
    "embedding": "model.embed_tokens",
    "output_norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "o": "model.layers.{}.self_attn.o_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
}
_OPT = {
    "embedding": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "output_norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
    "attn_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "q": "model.decoder.layers.{}.self_attn.q_proj",
    "k": "model.decoder.layers.{}.self_attn.k_proj",
    "v": "model.decoder.layers.{}.self_attn.v_proj",
    "o": "model.decoder.layers.{}.self_attn.out_proj",
    "ffn_norm": "model.decoder.layers.{}.final_layer_norm",
    "gate": "model.decoder.layers.{}.fc1",
    "down": "model.decoder.layers.{}.fc2",
}
_FALCON = {
    "embedding": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "head": "lm_head",
    "norm": "transformer.h.{}.input_layernorm",
    "attn_norm": "transformer.h.{}.ln_attn",
    "ffn_norm": "transformer.h.{}.ln_mlp",
    "qkv": "transformer.h.{}.self_attention.query_key_value",
    "o": "transformer.h.{}.self_attention.dense",
    "gate": "transformer.h.{}.mlp.dense_h_to_4h",
    "down": "transformer.h.{}.mlp.dense_4h_to_h",
}

_QWEN3_BLOCKS = Structure(head_norm=True)
_OPT_BLOCKS = Structure(layer_norm=True, gated=False, learned_positions=True)
_FALCON_BLOCKS = Structure(layer_norm=True, gated=False, parallel=True)

_LLAMA_FAMILY = Family(Naming(_LLAMA), biases={"attention_bias": _ATTENTION})
_MISTRAL = Family(Naming(_LLAMA), window="all")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA_FAMILY,
    "mistral": _MISTRAL,
    # Bamboo and TurboSparse-Mistral: `hidden_act` says relu, the remote code applies it twice
    "bamboo": replace(_MISTRAL, drelu=True),
    "qwen2": Family(
        Naming(_LLAMA), biases={"": _ATTENTION[:3]}, window="chosen", dense="qwen2", sparse="qwen2"
    ),
    "qwen3": replace(
        _LLAMA_FAMILY, structure=_QWEN3_BLOCKS, window="chosen", dense="qwen3", sparse="qwen3"
    ),
    "granite": _LLAMA_FAMILY,
    "minicpm": Family(Naming(_LLAMA), tied=True),
    "opt": Family(
        Naming(_OPT, first_position=2), _OPT_BLOCKS,
        keys={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        biases={"": (*_ATTENTION, "gate", "down")}, tied=True, activation="relu", dense="gpt2", sparse="opt",
        act="activation_fn",
        refused={"do_layer_norm_before": True, "_remove_final_layer_norm": False,
                 "layer_norm_elementwise_affine": True, "enable_bias": True},
    ),
    "falcon": Family(
        Naming(_FALCON, fused="heads"), _FALCON_BLOCKS,
        keys={"intermediate_size": "ffn_hidden_size", "hidden_act": "activation",
              "rms_norm_eps": "layer_norm_epsilon", "num_key_value_heads": "num_kv_heads"},
        tied=True, activation="gelu", dense="falcon", sparse="falcon", act="act",
        refused={"alibi": False, "parallel_attn": True, "bias": False},
    ),
}  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(naming=_INTERLEAVED, rope_factors=True),
    "qwen2": Architecture(model_type="qwen2"),
    "qwen3": Architecture(_QWEN3_BLOCKS, model_type="qwen3"),
    "smallthinker": Architecture(activation="relu", experts=True),
    "gpt2": Architecture(_OPT_BLOCKS, Naming(UNGATED_GGUF, fused="parts"), "gelu", model_type="opt"),
    "falcon": Architecture(_FALCON_BLOCKS, Naming(FALCON_GGUF, fused="parts"), "gelu", model_type="falcon"),
    # PowerInfer's own
    "bamboo": Architecture(naming=_INTERLEAVED, activation="drelu", model_type="bamboo"),
    "opt": Architecture(
        _OPT_BLOCKS, Naming(UNGATED_GGUF | {"positions": "pos_embd"}, first_position=2), "relu",
        default_eps=1e-5, model_type="opt",
    ),
}  # fmt: skip


def names_in(file: GGUFFile) -> Mapping[str, str]:
    """What a file calls its slots: the usual names where its architecture is not known."""
    name = file.find("general.architecture", str)
    return ARCHITECTURES[name].naming.names if name in ARCHITECTURES else GGUF
