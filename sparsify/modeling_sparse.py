"""Llama-like models whose FFNs give exact zeros. This file needs torch and transformers, and nothing else.

hotcold copies it beside a checkpoint whose activation transformers does not know. Load such a checkpoint with

    from modeling_sparse import SparseLlamaForCausalLM
    model = SparseLlamaForCausalLM.from_pretrained(FOLDER)

or, without this file, after `import hotcold`, with transformers' AutoModelForCausalLM. Apache-2.0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn, where
from transformers import (
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

__all__ = [
    "SparseGraniteForCausalLM",
    "SparseLlamaForCausalLM",
    "SparseMistralForCausalLM",
    "SparseQwen2ForCausalLM",
    "SparseQwen3ForCausalLM",
]


class FATReLU(nn.Module):
    """x where it is positive and reaches the threshold, else 0 (ProSparse, arXiv 2402.13516, equation 3)."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return where((x > 0) & (x >= self.threshold), x, 0.0)


class ShiftedReLU(nn.Module):
    """max(x - shift, 0) (arXiv 2310.04564)."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift).relu()


def _rectified(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.relu()


class _Sparse:
    """Builds the model with ReLU, and puts the activation that `config.hidden_act` names in its place."""

    def __init__(self, config: Any) -> None:
        name, config.hidden_act = config.hidden_act, "relu"
        super().__init__(config)
        config.hidden_act = name
        kind, _, value = name.rpartition("_")
        for layer in self.model.layers:
            if kind == "fatrelu":
                layer.mlp.act_fn = FATReLU(float(value))
            elif kind == "shifted_relu":
                layer.mlp.act_fn = ShiftedReLU(float(value))
            elif name == "drelu":  # ReLU on gate and up (TurboSparse, arXiv 2406.05955)
                layer.mlp.up_proj.register_forward_hook(_rectified)
            elif name != "relu":
                raise ValueError(f"unknown activation {name!r}")


class SparseLlamaForCausalLM(_Sparse, LlamaForCausalLM):
    """Llama with a sparse activation."""


class SparseGraniteForCausalLM(_Sparse, GraniteForCausalLM):
    """Granite, MiniCPM included, with a sparse activation."""


class SparseMistralForCausalLM(_Sparse, MistralForCausalLM):
    """Mistral with a sparse activation."""


class SparseQwen2ForCausalLM(_Sparse, Qwen2ForCausalLM):
    """Qwen2 with a sparse activation."""


class SparseQwen3ForCausalLM(_Sparse, Qwen3ForCausalLM):
    """Qwen3 with a sparse activation."""
