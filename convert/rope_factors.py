"""Rotary frequencies of a GGUF file as the `rope_parameters` of transformers.

GGUF says the base and the scaling as numbers, but Llama 3's scaling as a tensor: `rope_freqs.weight`, the
factor that each frequency is divided by. transformers has the formula and its four numbers instead, so the
tensor is accepted iff the formula gives it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hotcold.convert.gguf_read import GGUFFile
from hotcold.convert.quantize import dequantize
from hotcold.errors import FormatError, UnsupportedError

__all__ = ["llama3_factors", "rope_parameters"]

# Llama 3.1 and 3.2 (their config.json): these three are the same in all of them, the factor is 8 or 32.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_parameters(file: GGUFFile, architecture: str, head_dim: int) -> dict[str, Any]:
    """UnsupportedError for a scaling that is not known here, FormatError for a base that is no frequency."""
    base = _positive(file, f"{architecture}.rope.freq_base", 10000.0)
    if "rope_freqs.weight" in file.tensors:
        return {"rope_theta": base, **_llama3(file, base, head_dim)}
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_theta": base, "rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise UnsupportedError("rope scaling", where=file.path, got=kind, expected="none | linear | yarn")
    scaling = {"rope_type": kind, "factor": _positive(file, f"{architecture}.rope.scaling.factor", None)}
    if kind == "yarn":
        key = f"{architecture}.rope.scaling.original_context_length"
        scaling["original_max_position_embeddings"] = int(_positive(file, key, None))
    return {"rope_theta": base, **scaling}


def _positive(file: GGUFFile, key: str, default: float | None) -> float:
    if default is not None and key not in file.metadata:
        return default
    value = file.require(key, (int, float))
    if not 0 < value < math.inf:
        raise FormatError("bad value", where=file.path, field=key, got=value, expected="a positive number")
    return float(value)


def _llama3(file: GGUFFile, base: float, head_dim: int) -> dict[str, Any]:
    found = dequantize(file.tensors["rope_freqs.weight"]).reshape(-1)
    scaling = _LLAMA3 | {"factor": float(found.max(initial=0.0))}
    if len(found) == head_dim // 2 and np.allclose(
        found, llama3_factors(base, head_dim, **scaling), rtol=1e-3
    ):
        return {"rope_type": "llama3", **scaling}
    raise UnsupportedError(
        "frequency factors that are not Llama 3's", where=file.path, got=f"rope_freqs.weight {found.shape}"
    )


def llama3_factors(
    base: float,
    head_dim: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> np.ndarray:
    """What each of the head_dim / 2 frequencies is divided by, float64 (transformers: `llama3`)."""
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    turns = original_max_position_embeddings / wavelengths
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return 1 / (smooth + (1 - smooth) / max(factor, 1e-30))
