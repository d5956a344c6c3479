"""The attention matrices by input, in a GGUF file beside the others of a bundle.

In the other files a row of a projection is what one output adds up; here, as in `ffn_down_t`, it is what one
input gives to all outputs, so that an input that is nearly zero need not be read. Quantized from the weights
themselves, not from what the other files hold. q and k are in the order of Hugging Face, where the rotary
pairs are half a head apart. Biases and norms stand in the other files only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hotcold.convert.bundle.tensor_plans import Planner
from hotcold.convert.gguf.write import TensorPlan

__all__ = ["ARCHITECTURE", "PROJECTIONS", "ROLE", "attention_rows_metadata", "attention_rows_plans"]

ARCHITECTURE = "hotcold-attention"  # no program should take the file for a model
ROLE = "attention"
PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_output")


def attention_rows_metadata() -> dict[str, Any]:
    """What is not common to all files of a bundle."""
    return {"general.architecture": ARCHITECTURE}


def attention_rows_plans(planner: Planner) -> list[TensorPlan]:
    """`blk.N.attn_q_t.weight` [inputs, outputs] and so on, of all layers."""
    plans = []
    for layer in range(planner.spec.n_layers):
        for module in PROJECTIONS:
            outputs, inputs = planner.weights.shape(module)
            name = f"blk.{layer}.{module}_t"
            plans.append(planner.matrix(name, module, layer, np.transpose, (inputs, outputs)))
    return plans
