"""What a model is: sizes, layers, positions, activation, scales, from `config.json` or from GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hotcold.errors import UnsupportedError
from hotcold.model.config_fields import Fields
from hotcold.model.families import FAMILIES, Family, Structure
from hotcold.model.firing import FiringRule
from hotcold.model.inputs import InputRule, rules_of_config
from hotcold.model.rope import Rope

if TYPE_CHECKING:
    from hotcold.files.gguf import GGUFFile

__all__ = ["MAX_LAYERS", "LayerSpec", "ModelSpec", "Scales"]

MAX_LAYERS = 1 << 12  # lists are made of that length before any weight is looked for


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
class LayerSpec:
    """What may differ from layer to layer.

    `ffn` is `gated`, `ungated` or `none`; of `n_experts` FFNs each token takes `n_used`. `window` is how many
    positions a query sees, 0 being all.
    """

    d_ff: int
    window: int = 0
    ffn: str = "gated"
    n_experts: int = 1
    n_used: int = 1


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model, checked, in hotcold's terms.

    `firing` says when neurons fire. `rope` is None where positions are learned; `n_ctx` is 0 where a file
    does not say it. `biases` are slots of `hotcold.model.tensors`.
    """

    model_type: str
    structure: Structure
    layers: tuple[LayerSpec, ...]
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_ctx: int
    n_vocab: int
    norm_eps: float
    rope: Rope | None
    tied: bool
    firing: FiringRule
    biases: frozenset[str]
    two_norms: bool  # of a parallel block: attention and FFN have one each
    scales: Scales = Scales()
    inputs: tuple[InputRule, ...] = ()

    @property
    def family(self) -> Family:
        """What transformers calls its parts, and which files are written for it."""
        return FAMILIES[self.model_type]

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def d_ff(self) -> int:
        """Neurons per layer. UnsupportedError where the layers' FFNs differ."""
        self.check_layers()
        return self.layers[0].d_ff

    @property
    def activation(self) -> str:
        """The name of its firing rule."""
        return self.firing.name

    @property
    def windows(self) -> tuple[int, ...]:
        """Positions that the queries of each layer see, 0 being all."""
        return tuple(layer.window for layer in self.layers)

    @property
    def is_sparse(self) -> bool:
        """Whether its activation gives exact zeros."""
        return self.firing.gives_zeros

    @property
    def rope_theta(self) -> float:
        """The base of the rotary positions."""
        return self.rope.base if self.rope else 10000.0

    @property
    def rope_frequencies(self) -> np.ndarray:
        """Radians per position of each pair, float32 [head_dim / 2]; empty where positions are learned."""
        return self.rope.frequencies(self.head_dim) if self.rope else np.empty(0, np.float32)

    def check_layers(self, where: str | Path | None = None) -> None:
        """Raise UnsupportedError for what can be described, but not yet run: experts, or FFNs that differ."""
        one = self.layers[0]
        for layer in self.layers:
            if layer.n_experts != 1:
                what, expected = "a mixture of experts", "one expert"
                raise UnsupportedError(what, where=where, got=layer.n_experts, expected=expected)
            if (layer.d_ff, layer.ffn) != (one.d_ff, one.ffn) or layer.ffn == "none":
                got = f"{layer.ffn} {layer.d_ff}"
                expected = f"an FFN like that of the first layer, {one.ffn} {one.d_ff}"
                raise UnsupportedError("layers that differ", where=where, got=got, expected=expected)

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelSpec:
        """Read a GGUF file's metadata. FormatError or ShapeError for what cannot be, UnsupportedError for
        unknown architectures, activations and scalings."""
        from hotcold.model.metadata import read_spec

        return read_spec(file)

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
        n_layers = read.count("num_hidden_layers", most=MAX_LAYERS)
        d_model, n_heads = read.count("hidden_size"), read.count("num_attention_heads")
        head_dim = read.count("head_dim", d_model // n_heads)
        if not family.structure.learned_positions and head_dim % 2:
            raise read.bad("head_dim", head_dim, "an even number: rotary positions turn pairs")
        n_ctx = read.count("max_position_embeddings")
        layers = _layers(read, family, n_layers, d_model, n_ctx)
        return cls(
            model_type=model_type,
            structure=family.structure,
            layers=layers,
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=_n_kv_heads(read, family, n_heads),
            head_dim=head_dim,
            n_ctx=n_ctx,
            n_vocab=read.count("vocab_size"),
            norm_eps=read.positive("rms_norm_eps", 1e-5 if family.structure.layer_norm else None),
            rope=None if family.structure.learned_positions else Rope.from_config(read, n_ctx),
            tied=read.flag("tie_word_embeddings", family.tied),
            firing=_firing(read, family, layers),
            biases=_biases(read, family),
            two_norms=_two_norms(read, family),
            scales=_scales(read, model_type, n_layers, d_model, head_dim),
            inputs=rules_of_config(config, n_layers, where),
        )


def _layers(read: Fields, family: Family, n_layers: int, d_model: int, n_ctx: int) -> tuple[LayerSpec, ...]:
    """One of each layer; `intermediate_size` may be a list."""
    gated, key = family.structure.gated, "intermediate_size"
    sizes = read.get(key, None if gated else 4 * d_model)
    if not isinstance(sizes, list):
        sizes = [read.count(key, None if gated else 4 * d_model)] * n_layers
    elif len(sizes) != n_layers or not all(type(n) is int and 0 <= n < 1 << 31 for n in sizes):
        raise read.bad(key, sizes, f"{n_layers} integers, 0 for no FFN")
    kind, windows = "gated" if gated else "ungated", _windows(read, family, n_layers, n_ctx)
    experts = [read.count(key, 1) for key in ("num_local_experts", "num_experts_per_tok")]
    return tuple(
        LayerSpec(n, window, kind if n else "none", *experts)
        for n, window in zip(sizes, windows, strict=True)
    )


def _firing(read: Fields, family: Family, layers: Sequence[LayerSpec]) -> FiringRule:
    name = str(read.get("hidden_act", family.activation))
    if family.drelu and name == "relu":
        name = "drelu"
    gated, d_ff = family.structure.gated, layers[0].d_ff
    return FiringRule.from_config(read.config, name, len(layers), d_ff, gated=gated, where=read.where)


def _n_kv_heads(read: Fields, family: Family, n_heads: int) -> int:
    """Falcon's first models have one key-value head with `multi_query`, whatever `num_kv_heads` says."""
    if not family.naming.fused or read.flag("new_decoder_architecture"):
        n_kv_heads = read.count("num_key_value_heads", n_heads)
        if family.naming.fused and n_heads % n_kv_heads:
            raise read.bad("num_key_value_heads", n_kv_heads, f"a divisor of {n_heads}")
        return n_kv_heads
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
    on = (slots for flag, slots in family.biases.items() if not flag or read.flag(flag))
    return frozenset(slot for slots in on for slot in slots)


def _two_norms(read: Fields, family: Family) -> bool:
    if not family.structure.parallel or not read.flag("new_decoder_architecture"):
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
