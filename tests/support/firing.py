"""The firing rules once more, as formulas in float64: what kernels and operators are compared with."""

from __future__ import annotations

import math

import numpy as np

from hotcold.model.firing import RULES

__all__ = ["SPARSE_RULES", "fired", "kernel_ids"]

SPARSE_RULES = [name for name in RULES if name not in ("silu", "gelu")]
_erf = np.vectorize(math.erf, otypes=[float])


def fired(name: str, gate: np.ndarray, threshold: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """What gates become under a rule, and which of them fire; float64 and bool."""
    g = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        silu = g / (1 + np.exp(-g))
    gelu = g * (1 + _erf(g / math.sqrt(2))) / 2
    always, positive = np.ones(g.shape, bool), (g > 0) & (g >= threshold)
    return {
        "silu": (silu, always),
        "gelu": (gelu, always),
        "relu": (g, g > 0),
        "drelu": (g, g > 0),
        "relu2": (g * g, g > 0),
        "fatrelu": (g, positive),
        "shifted_relu": (g - threshold, positive),
        "thresholded_silu": (silu, np.abs(silu) >= threshold),
        "thresholded_gelu": (gelu, np.abs(gelu) >= threshold),
        "gate_thresholded_silu": (silu, g >= threshold),
        "gate_thresholded_gelu": (gelu, g >= threshold),
    }[name]


def kernel_ids(name: str) -> tuple[int, int]:
    """Value and score of a rule, as the kernels take them."""
    return int(RULES[name].value), int(RULES[name].score)
