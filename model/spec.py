"""What `config.json` says about a model: sizes, positions, activation, biases, scales. All of it checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hotcold.errors import UnsupportedError
from hotcold.model.config_fields import Fields
from hotcold.model.families import FAMILIES, Family
from hotcold.model.firing import FiringRule
from hotcold.model.rope import Rope

__all__ = ["ModelSpec", "Scales", "interleave_rope", "split_rope"]

_MAX_LAYERS = 1 << 12  # lists are made of that length before any weight is looked for


@dataclass(frozen=True, slots=True)
class Scales:
    """Constants that a model multiplies by: the embedding, what a block adds to the residual stream, the
    logits,
    and the queries (beside 1/sqrt(head_dim)). Granite's and MiniCPM's; 1 in all others."""

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    query: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What `config.json` says about a model, checked, in hotcold's terms.

    `firing` says when neurons fire. `windows` holds how many positions the queries of a layer see, 0 being
    all; `rope` is None where positions are learned.
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
    norm_eps: float
    rope: Rope | None
    tied: bool
    firing: FiringRule
    windows: tuple[int, ...]
    biases: frozenset[str]
    two_norms: bool  # of a parallel block: attention and FFN have one each
    scales: Scales

    @property
    def family(self) -> Family:
        """How such models are put together."""
        return FAMILIES[self.model_type]

    @property
    def activation(self) -> str:
        """The name of its firing rule."""
        return self.firing.name

    @property
    def is_sparse(self) -> bool:
        """Whether its activation gives exact zeros."""
        return self.firing.gives_zeros

    @property
    def rope_theta(self) -> float:
        """The base of the rotary positions."""
        return self.rope.base if self.rope else 10000.0

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str | Path = "config.json") -> ModelSpec:
        """Read `config.json`. FormatError for missing or bad fields, UnsupportedError for unknown models."""
        model_type = Fields(config, where).choice("model_type", tuple(FAMILIES))
        family = FAMILIES[model_type]
        read = Fields(config, where, dict(family.keys))
        for key, value in family.refused.items():
            if config.get(key, value) not in (value, None):
                raise UnsupportedError(
                    f"{model_type} with {key}", where=where, got=config[key], expected=value
                )
        n_layers = read.count("num_hidden_layers", most=_MAX_LAYERS)
        d_model, n_heads = read.count("hidden_size"), read.count("num_attention_heads")
        head_dim = read.count("head_dim", d_model // n_heads)
        if family.first_position is None and head_dim % 2:
            raise read.bad("head_dim", head_dim, "an even number: rotary positions turn pairs")
        n_ctx = read.count("max_position_embeddings")
        d_ff = read.count("intermediate_size", None if family.gated else 4 * d_model)
        return cls(
            model_type=model_type,
            n_layers=n_layers,
            d_model=d_model,
            d_ff=d_ff,
            n_heads=n_heads,
            n_kv_heads=_n_kv_heads(read, family, n_heads),
            head_dim=head_dim,
            n_ctx=n_ctx,
            n_vocab=read.count("vocab_size"),
            norm_eps=read.positive("rms_norm_eps", 1e-5 if family.layer_norm else None),
            rope=Rope.from_config(read, n_ctx) if family.first_position is None else None,
            tied=read.flag("tie_word_embeddings", family.tied),
            firing=_firing(read, family, n_layers, d_ff),
            windows=_windows(read, family, n_layers, n_ctx),
            biases=_biases(read, family),
            two_norms=_two_norms(read, family),
            scales=_scales(read, model_type, n_layers, d_model, head_dim),
        )


def _firing(read: Fields, family: Family, n_layers: int, d_ff: int) -> FiringRule:
    name = str(read.get("hidden_act", family.activation))
    if family.drelu and name == "relu":
        name = "drelu"
    return FiringRule.from_config(read.config, name, n_layers, d_ff, gated=family.gated, where=read.where)


def _n_kv_heads(read: Fields, family: Family, n_heads: int) -> int:
    """Falcon's first models have one key-value head with `multi_query`, whatever `num_kv_heads` says."""
    if not family.fused_qkv or read.flag("new_decoder_architecture"):
        return read.count("num_key_value_heads", n_heads)
    if not read.flag("multi_query", True):
        raise UnsupportedError("Falcon with multi_query", where=read.where, got=False, expected=True)
    return 1


def _windows(read: Fields, family: Family, n_layers: int, n_ctx: int) -> tuple[int, ...]:
    """Positions seen per layer. A window as long as the context is none."""
    chosen = family.window == "chosen"
    if not family.window or "sliding_window" not in read or (chosen and not read.flag("use_sliding_window")):
        return (0,) * n_layers
    window = read.count("sliding_window")
    kinds = read.config.get("layer_types") if chosen else None
    if kinds is None:
        first = read.number("max_window_layers", 28) if chosen else 0
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(n_layers)]
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        raise read.bad("layer_types", kinds, f"{n_layers} names")
    return tuple(window if kind == "sliding_attention" and window < n_ctx else 0 for kind in kinds)


def _biases(read: Fields, family: Family) -> frozenset[str]:
    on = (modules for flag, modules in family.biases.items() if not flag or read.flag(flag))
    return frozenset(module for modules in on for module in modules)


def _two_norms(read: Fields, family: Family) -> bool:
    if not family.parallel or not read.flag("new_decoder_architecture"):
        return False
    return read.count("num_ln_in_parallel_attn", 2) == 2


def _scales(read: Fields, model_type: str, n_layers: int, d_model: int, head_dim: int) -> Scales:
    if model_type == "minicpm":
        embedding, depth = read.positive("scale_emb"), read.positive("scale_depth")
        return Scales(embedding, depth / math.sqrt(n_layers), read.positive("dim_model_base") / d_model)
    if model_type == "granite":
        keys = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
        embedding, residual, logits, attention = (read.positive(key, 1.0) for key in keys)
        return Scales(embedding, residual, 1 / logits, attention * math.sqrt(head_dim))
    return Scales()


def interleave_rope(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder q/k rows [n_heads·head_dim, ...] from halves (i, i + head_dim/2) to neighbors (2i, 2i + 1).

    Hugging Face rotates the former pairs (NEOX), GGUF's `llama` architecture the latter.
    """
    rows = weight.reshape(n_heads, 2, -1, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def split_rope(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """The inverse of `interleave_rope`."""
    rows = weight.reshape(n_heads, -1, 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)
