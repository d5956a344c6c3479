"""The attention matrices by input, in a GGUF file beside the others of a bundle.

In the other files a row of a projection is what one output adds up; here, as in `ffn_down_t`, it is what one
input gives to all outputs, so that an input that is nearly zero need not be read. Quantized from the weights
themselves, not from what the other files hold. q and k are in the order of Hugging Face, where the rotary
pairs are half a head apart. Biases and norms stand in the other files only.
"""

from __future__ import annotations

from typing import Any

from hotcold.convert.bundle.tensor_plans import Planner
from hotcold.convert.gguf.write import TensorPlan
from hotcold.errors import MismatchError
from hotcold.files.gguf import GGUFFile
from hotcold.model.tensors import GGUF, PROJECTIONS, ROWS, Naming
from hotcold.model.weights import FileWeights

__all__ = ["ARCHITECTURE", "ROLE", "attention_rows", "attention_rows_metadata", "attention_rows_plans"]

ARCHITECTURE = "hotcold-attention"  # no program should take the file for a model
ROLE = "attention"
_NAMING = Naming(GGUF)


def attention_rows_metadata() -> dict[str, Any]:
    """What is not common to all files of a bundle."""
    return {"general.architecture": ARCHITECTURE}


def attention_rows_plans(planner: Planner) -> list[TensorPlan]:
    """`blk.N.attn_q_t.weight` [inputs, outputs] and so on, of all layers."""
    layers = range(planner.spec.n_layers)
    return [
        plan for i in layers for slot in PROJECTIONS for plan in planner.tensor(_NAMING, [slot + ROWS], i)
    ]


def attention_rows(file: GGUFFile, model: FileWeights) -> FileWeights:
    """The matrices of such a file; MismatchError unless it is of this model, else as `FileWeights.read`."""
    key = "hotcold.model_fingerprint"
    got, expected = file.find(key, str), model.file.find(key, str)
    if got != expected:
        what, fix = "rows of another model", "export both together"
        raise MismatchError(what, where=file.path, got=got, expected=expected, fix=fix)
    weights = FileWeights(file, model.spec, _NAMING)
    weights.check([(slot + ROWS, layer) for layer in range(model.spec.n_layers) for slot in PROJECTIONS])
    return weights
