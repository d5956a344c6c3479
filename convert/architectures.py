"""Llama-like models: hyper-parameters, names in Hugging Face and in GGUF, and the order of q and k rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hotcold.errors import FormatError, UnsupportedError

__all__ = [
    "ACTIVATIONS",
    "HF_NAMES",
    "LAYER_NAMES",
    "ModelSpec",
    "hf_shapes",
    "hyper_parameters",
    "interleave_rope",
    "split_rope",
]

ACTIVATIONS = ("relu", "fatrelu", "drelu", "silu")
MODEL_TYPES = ("llama", "mistral")

# GGUF name -> Hugging Face name
HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# The same inside a layer: blk.N.X and model.layers.N.X
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What `config.json` says about a model, checked, in hotcold's terms.

    `activation_thresholds` holds one t per layer: a gate fires iff it is positive and reaches t
    (0 for a plain ReLU).
    """

    model_type: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_ctx: int
    n_vocab: int
    rms_eps: float
    rope_theta: float
    tied: bool
    activation: str
    activation_thresholds: tuple[float, ...]

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str | Path = "config.json") -> ModelSpec:
        """Read `config.json`. FormatError for missing or bad fields, UnsupportedError for unknown models."""
        read = _Fields(config, where)
        model_type = read.choice("model_type", MODEL_TYPES)
        n_layers, d_model, n_heads = (
            read.count(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        )
        activation, thresholds = read.activation(n_layers)
        n_ctx = read.count("max_position_embeddings")
        read.refuse_window(n_ctx)
        return cls(
            model_type=model_type,
            n_layers=n_layers,
            d_model=d_model,
            d_ff=read.count("intermediate_size"),
            n_heads=n_heads,
            n_kv_heads=read.count("num_key_value_heads", n_heads),
            head_dim=read.count("head_dim", d_model // n_heads),
            n_ctx=n_ctx,
            n_vocab=read.count("vocab_size"),
            rms_eps=read.number("rms_norm_eps"),
            rope_theta=read.rope_theta(),
            tied=bool(config.get("tie_word_embeddings", False)),
            activation=activation,
            activation_thresholds=thresholds,
        )


class _Fields:
    """Typed access to `config.json`."""

    def __init__(self, config: dict[str, Any], where: str | Path) -> None:
        self.config, self.where = config, where

    def get(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        value = default if value is None else value
        if value is None:
            raise FormatError("missing key", where=self.where, field=key)
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise FormatError(
                "bad value", where=self.where, field=key, got=value, expected="a positive integer"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
            raise FormatError("bad value", where=self.where, field=key, got=value, expected="a number")
        return float(value)

    def choice(self, key: str, known: tuple[str, ...]) -> str:
        value = self.get(key)
        if value not in known:
            raise UnsupportedError(f"unknown {key}", where=self.where, got=value, expected=" | ".join(known))
        return value

    def activation(self, n_layers: int) -> tuple[str, tuple[float, ...]]:
        """Name and thresholds. ProSparse's models say `fatrelu` + `hidden_act_param`, or `fatrelu_0.01`."""
        name = str(self.get("hidden_act"))
        threshold = 0.0
        if match := re.fullmatch(r"fatrelu_(\d+(?:\.\d+)?(?:e-?\d+)?)", name):
            name, threshold = "fatrelu", float(match[1])
        name = {"swish": "silu"}.get(name, name)
        if name not in ACTIVATIONS:
            expected = " | ".join(ACTIVATIONS)
            raise UnsupportedError("unknown activation", where=self.where, got=name, expected=expected)
        if name == "fatrelu":
            return name, self.thresholds(n_layers, threshold)
        return name, (0.0,) * n_layers

    def thresholds(self, n_layers: int, default: float) -> tuple[float, ...]:
        value = self.config.get("activation_thresholds", self.config.get("hidden_act_param", default))
        values = value if isinstance(value, list) else [value] * n_layers
        good = all(isinstance(t, int | float) and np.isfinite(t) and t >= 0 for t in values)
        if len(values) != n_layers or not good:
            expected = f"one number >= 0, or {n_layers} of them"
            raise FormatError(
                "bad thresholds",
                where=self.where,
                field="activation_thresholds",
                got=value,
                expected=expected,
            )
        return tuple(map(float, values))

    def rope_theta(self) -> float:
        """The base. transformers 5 keeps it in `rope_parameters`, older ones beside `rope_scaling`."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise FormatError(
                "bad value", where=self.where, field="rope_parameters", got=rope, expected="object"
            )
        both = _Fields({**self.config, **rope}, self.where)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or both.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedError(
                "rope scaling or partial rope", where=self.where, got=rope, expected="none"
            )
        return both.number("rope_theta", 10000.0)

    def refuse_window(self, n_ctx: int) -> None:
        window = self.config.get("sliding_window")
        if window is not None and window < n_ctx and self.config.get("use_sliding_window", True):
            raise UnsupportedError("sliding-window attention", where=self.where, got=window, expected="none")


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that a checkpoint of this model must hold."""
    d_model, d_ff, q, kv = (
        spec.d_model,
        spec.d_ff,
        spec.n_heads * spec.head_dim,
        spec.n_kv_heads * spec.head_dim,
    )
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (d_model,), "attn_q": (q, d_model), "attn_k": (kv, d_model), "attn_v": (kv, d_model),
        "attn_output": (d_model, q), "ffn_norm": (d_model,), "ffn_gate": (d_ff, d_model),
        "ffn_up": (d_ff, d_model), "ffn_down": (d_model, d_ff),
    }  # fmt: skip
    outer = {
        "token_embd": (spec.n_vocab, d_model),
        "output_norm": (d_model,),
        "output": (spec.n_vocab, d_model),
    }
    if spec.tied:
        del outer["output"]
    shapes = {f"{HF_NAMES[name]}.weight": shape for name, shape in outer.items()}
    for i in range(spec.n_layers):
        shapes |= {f"model.layers.{i}.{LAYER_NAMES[name]}.weight": shape for name, shape in layer.items()}
    return shapes


def hyper_parameters(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    """The `{architecture}.*` metadata of llama.cpp and PowerInfer, in the exact types they insist on."""
    numbers = {
        "block_count": spec.n_layers,
        "context_length": spec.n_ctx,
        "embedding_length": spec.d_model,
        "feed_forward_length": spec.d_ff,
        "attention.head_count": spec.n_heads,
        "attention.head_count_kv": spec.n_kv_heads,
        "rope.dimension_count": spec.head_dim,
        "vocab_size": spec.n_vocab,
    }
    if spec.head_dim * spec.n_heads != spec.d_model:
        numbers |= {"attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim}
    metadata: dict[str, Any] = {f"{architecture}.{key}": np.uint32(value) for key, value in numbers.items()}
    metadata[f"{architecture}.attention.layer_norm_rms_epsilon"] = np.float32(spec.rms_eps)
    metadata[f"{architecture}.rope.freq_base"] = np.float32(spec.rope_theta)
    return metadata


def interleave_rope(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder q/k rows [n_heads·head_dim, ...] from halves (i, i + head_dim/2) to neighbours (2i, 2i + 1).

    Hugging Face rotates the former pairs (NEOX), GGUF's `llama` architecture the latter.
    """
    rows = weight.reshape(n_heads, 2, -1, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def split_rope(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """The inverse of `interleave_rope`."""
    rows = weight.reshape(n_heads, -1, 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)
