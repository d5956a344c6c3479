"""Matrices by input, in a GGUF file beside the others of a bundle.

In the other files a row of a matrix is what one output adds up; here, as in `ffn_down_t`, it is what one
input gives to all outputs, so that an input that does not count need not be read. Quantized from the weights
themselves, not from what the other files hold. q and k are in the order of Hugging Face, where the rotary
pairs are half a head apart. Biases and norms stand in the other files only.

A model with input rules (`hotcold.model.inputs`) has the matrices of their sites here, another one those of
attention, if it is asked for: `--input-sparsity` then leaves out a share of their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hotcold.convert.bundle.tensor_plans import Planner
from hotcold.convert.gguf.write import TensorPlan
from hotcold.model.inputs import SITES, InputRule, weights_key
from hotcold.model.spec import ModelSpec
from hotcold.model.weights import Weights

__all__ = ["ATTENTION", "RULES", "input_role", "input_rows_plans", "score_weights", "sites_by_input"]

# Roles of such files. They give the file its name, and the architecture, for which no program takes it.
ATTENTION, RULES = "attention", "inputs"


def input_role(spec: ModelSpec, *, attention_rows: bool) -> str | None:
    """The role of the file that a model gets; None: none."""
    return RULES if spec.inputs else ATTENTION if attention_rows else None


def sites_by_input(rules: tuple[InputRule, ...]) -> tuple[str, ...]:
    """The sites whose matrices such a file has: those of the model's rules, without rules attention's."""
    return tuple(rule.site for rule in rules) or ("qkv", "o")


def input_rows_plans(planner: Planner) -> list[TensorPlan]:
    """`blk.N.attn_q_t.weight` [inputs, outputs] and so on, of all layers."""
    return [
        _transposed(planner, layer, module)
        for layer in range(planner.spec.n_layers)
        for site in sites_by_input(planner.spec.inputs)
        for module in _modules(planner.spec, site)
    ]


def _transposed(planner: Planner, layer: int, module: str) -> TensorPlan:
    outputs, inputs = planner.weights.shape(module)
    return planner.matrix(f"blk.{layer}.{module}_t", module, layer, np.transpose, (inputs, outputs))


def _modules(spec: ModelSpec, site: str) -> list[str]:
    return [module for module in SITES[site] if module != "ffn_gate" or spec.family.gated]


def score_weights(weights: Weights) -> dict[str, Any]:
    """What scores multiply inputs by, as metadata: from the matrices as the checkpoint has them."""

    def matrices(site: str, layer: int) -> Iterator[np.ndarray]:
        return (weights.unscaled(module, layer) for module in _modules(weights.spec, site))

    return {
        weights_key(rule): np.concatenate(
            [rule.weights(matrices(rule.site, layer)) for layer in range(weights.spec.n_layers)]
        )
        for rule in weights.spec.inputs
        if rule.weighted
    }
