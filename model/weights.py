"""A model's weights under one set of names, whatever its family calls and fuses them.

`attn_q.weight`, `ffn_down.bias` and so on, with shapes from the model's spec. The constants that Granite
and MiniCPM multiply by are folded into the weights here, so that every program that runs a Llama runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from hotcold.files.tensor_check import check_tensors
from hotcold.model.huggingface import WeightSource, shapes_of
from hotcold.model.spec import ModelSpec

__all__ = ["Weights", "check_weights", "hf_shapes", "parts_of"]

Shape = tuple[int, ...]

_OUTER = ("token_embd", "position_embd", "output_norm", "output")


def _module_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """The weight's shape of every module that any family has."""
    d, q, kv = spec.d_model, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    n_positions = spec.n_ctx + (spec.family.first_position or 0)
    outer = {
        "token_embd": (spec.n_vocab, d),
        "position_embd": (n_positions, d),
        "output_norm": (d,),
        "output": (spec.n_vocab, d),
    }
    attention = {
        "attn_norm": (d,),
        "attn_q": (q, d),
        "attn_k": (kv, d),
        "attn_v": (kv, d),
        "attn_qkv": (q + 2 * kv, d),
        "attn_q_norm": (spec.head_dim,),
        "attn_k_norm": (spec.head_dim,),
        "attn_output": (d, q),
    }
    ffn = {
        "ffn_norm": (d,),
        "ffn_gate": (spec.d_ff, d),
        "ffn_up": (spec.d_ff, d),
        "ffn_down": (d, spec.d_ff),
    }
    return outer | attention | ffn


def parts_of(spec: ModelSpec, module: str) -> tuple[str, ...]:
    """`weight`, and `bias` where the module has one. A fused q, k, v stands for its parts."""
    has_bias = module in spec.biases or (spec.family.layer_norm and module.endswith("norm"))
    return ("weight", "bias") if has_bias else ("weight",)


def _hf_name(spec: ModelSpec, module: str, layer: int) -> str:
    family = spec.family
    modules = {**family.modules, **family.two_norms} if spec.two_norms else family.modules
    return modules[module].format(layer)


def _hf_tensors(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    shapes = _module_shapes(spec)
    for module in spec.family.modules:
        for layer in range(1 if module in _OUTER else spec.n_layers):
            if module == "output" and spec.tied:
                continue
            shape = shapes[module]
            for part in parts_of(spec, module):
                yield f"{_hf_name(spec, module, layer)}.{part}", shape if part == "weight" else shape[:1]


def hf_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of this model must hold."""
    return dict(_hf_tensors(spec))


def check_weights(source: WeightSource, spec: ModelSpec) -> None:
    """Refuse a checkpoint whose tensors are not those of its config; raises as `check_tensors`."""
    check_tensors(hf_shapes(spec), shapes_of(source), source.path)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of one model; `source(name)` gives a tensor, float32, under transformers' name."""

    spec: ModelSpec
    source: Callable[[str], np.ndarray]

    def shape(self, module: str, part: str = "weight") -> Shape:
        """The shape of one of our tensors."""
        shape = _module_shapes(self.spec)[module]
        return shape if part == "weight" else shape[:1]

    def load(self, module: str, part: str = "weight", layer: int = 0) -> np.ndarray:
        """One of our tensors, float32."""
        if module == "output" and self.spec.tied:
            return self.load("token_embd")
        if self.spec.family.fused_qkv and module in ("attn_q", "attn_k", "attn_v"):
            return self._unfused(module, layer)
        value = self.source(f"{_hf_name(self.spec, module, layer)}.{part}")
        scale = self._scale(module)
        return value if scale == 1 else value * np.float32(scale)

    def unscaled(self, module: str, layer: int) -> np.ndarray:
        """A matrix as the checkpoint has it, without the constants that `load` folds into it."""
        return self.load(module, "weight", layer) / np.float32(self._scale(module))

    def _unfused(self, module: str, layer: int) -> np.ndarray:
        """Falcon: the queries of a key-value head, then its key and its value, head after head."""
        spec = self.spec
        fused = self.source(f"{spec.family.modules['attn_qkv'].format(layer)}.weight")
        heads = fused.reshape(spec.n_kv_heads, -1, spec.head_dim, spec.d_model)
        part = {"attn_q": heads[:, :-2], "attn_k": heads[:, -2], "attn_v": heads[:, -1]}[module]
        return np.ascontiguousarray(part).reshape(prod(part.shape[:-1]), spec.d_model)

    def _scale(self, module: str) -> float:
        """A tied head holds the embedding's scale, so the norm before it takes that away again."""
        scales = self.spec.scales
        match module:
            case "token_embd":
                return scales.embedding
            case "output_norm":
                return scales.logits / (scales.embedding if self.spec.tied else 1.0)
            case "attn_output" | "ffn_down":
                return scales.residual
            case "attn_q":
                return scales.query
        return 1.0
