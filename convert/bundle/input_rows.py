"""Matrices by input, in a GGUF file beside the others of a bundle.

In the other files a row of a matrix is what one output adds up; here, as in `ffn_down_t`, it is what one
input gives to all outputs, so that an input that does not count need not be read. Quantized from the weights
themselves, not from what the other files hold. q and k are in the order of Hugging Face, where the rotary
pairs are half a head apart. Biases and norms stand in the other files only.

A model with input rules (`hotcold.model.inputs`) has the matrices of their sites here, another one those of
attention, if it is asked for: `--input-sparsity` then leaves out a share of their inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from hotcold.convert.bundle.tensor_plans import Planner
from hotcold.convert.gguf.write import TensorPlan
from hotcold.errors import MismatchError
from hotcold.files.gguf import GGUFFile
from hotcold.model.inputs import site_slots, weights_key
from hotcold.model.spec import ModelSpec, Scales
from hotcold.model.tensors import GGUF, ROWS, UNGATED_GGUF, Naming
from hotcold.model.weights import CheckpointWeights, FileWeights

__all__ = [
    "ATTENTION",
    "RULES",
    "input_role",
    "input_rows",
    "input_rows_plans",
    "score_weights",
    "sites_by_input",
]

# Roles of such files. They give the file its name, and the architecture, for which no program takes it.
ATTENTION, RULES = "attention", "inputs"


def input_role(spec: ModelSpec, *, attention_rows: bool) -> str | None:
    """The role of the file that a model gets; None: none."""
    return RULES if spec.inputs else ATTENTION if attention_rows else None


def sites_by_input(spec: ModelSpec) -> tuple[str, ...]:
    """The sites whose matrices such a file has: those of the model's rules, without rules attention's."""
    return tuple(rule.site for rule in spec.inputs) or ("qkv", "o")


def input_rows_plans(planner: Planner) -> list[TensorPlan]:
    """`blk.N.attn_q_t.weight` [inputs, outputs] and so on, of all layers."""
    naming, planner = _naming(planner.spec), replace(planner, spec=_without_biases(planner.spec))
    return [plan for slot, i in _slots(planner.spec) for plan in planner.tensor(naming, [slot], i)]


def input_rows(file: GGUFFile, model: FileWeights) -> FileWeights:
    """The matrices of such a file; MismatchError unless it is of this model, else as `FileWeights.read`."""
    key = "hotcold.model_fingerprint"
    got, expected = file.find(key, str), model.file.find(key, str)
    if got != expected:
        what, fix = "these rows belong to another model", "export both together"
        raise MismatchError(what, where=file.path, got=got, expected=expected, fix=fix)
    weights = FileWeights(file, _without_biases(model.spec), _naming(model.spec))
    weights.check(_slots(model.spec))
    return weights


def _slots(spec: ModelSpec) -> list[tuple[str, int]]:
    return [
        (slot + ROWS, layer)
        for layer in range(spec.n_layers)
        for site in sites_by_input(spec)
        for slot in site_slots(spec, site)
    ]


def _naming(spec: ModelSpec) -> Naming:
    return Naming(GGUF if spec.structure.gated else UNGATED_GGUF)


def _without_biases(spec: ModelSpec) -> ModelSpec:
    return replace(spec, biases=frozenset())


def score_weights(spec: ModelSpec, load: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """What scores multiply inputs by, as metadata: from the matrices as the checkpoint has them."""
    weights = CheckpointWeights(replace(spec, scales=Scales()), load)

    def matrices(site: str, layer: int) -> Iterator[np.ndarray]:
        return (weights.floats(slot, layer) for slot in site_slots(spec, site))

    return {
        weights_key(rule): np.concatenate(
            [rule.weights(matrices(rule.site, layer)) for layer in range(spec.n_layers)]
        )
        for rule in spec.inputs
        if rule.weighted
    }
