"""The rotary positions that a GGUF file means, and the same as the `rope_parameters` of transformers.

GGUF says the base and the scaling as numbers, but Llama 3's scaling as a tensor: `rope_freqs.weight`, the
factor that each frequency is divided by (or `hotcold.rope.factors`, where llama.cpp knows no such tensor).
transformers has the formula and its four numbers instead, so for it the factors are accepted iff the formula
gives them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hotcold.errors import FormatError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.files.quantize import dequantize
from hotcold.model.config_fields import LARGEST, SMALLEST
from hotcold.model.rope import Rope
from hotcold.model.tensors import GGUF

__all__ = ["ROPE_FACTORS", "check_pairs", "read_rope", "rope_parameters"]

ROPE_FACTORS = "hotcold.rope.factors"  # f32[head_dim / 2]: as the tensor rope_freqs, where that is not known
_TENSOR = f"{GGUF['rope_factors']}.weight"

# Llama 3.1 and 3.2 (their config.json): these three are the same in all of them, the factor is 8 or 32.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_rope(file: GGUFFile, architecture: str, head_dim: int) -> Rope:
    """Base and scaling by llama.cpp's keys, and the factors of each pair.

    UnsupportedError for a scaling that is not known here, FormatError for a number that cannot be.
    """
    divisors = _divisors(file, head_dim)
    rope = _read_scaling(file, architecture)
    return rope if divisors is None else replace(rope, divisors=tuple(divisors.tolist()))


def _read_scaling(file: GGUFFile, architecture: str) -> Rope:
    def number(name: str, default: float | None = None) -> float:
        return _positive(file, f"{architecture}.rope.{name}", default)

    base, kind = number("freq_base", 10000.0), file.find(f"{architecture}.rope.scaling.type", str, "none")
    if base <= 1:
        field, expected = f"{architecture}.rope.freq_base", "more than 1"
        raise FormatError("bad value", where=file.path, field=field, got=base, expected=expected)
    if kind == "none" or ROPE_FACTORS in file.metadata:  # with factors, the scaling is for other programs
        return Rope(base)
    if kind not in ("linear", "yarn"):
        raise UnsupportedError("rope scaling", where=file.path, got=kind, expected="none | linear | yarn")
    factor = number("scaling.factor")
    if kind == "linear":
        return Rope(base, "linear", factor)
    original = file.count(f"{architecture}.rope.scaling.original_context_length")
    low, high = number("scaling.yarn_beta_slow", 1.0), number("scaling.yarn_beta_fast", 32.0)
    attention = number("scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(factor) if factor > 1 else 1.0)
    return Rope(base, "yarn", factor, original, low, high, attention)


def check_pairs(file: GGUFFile, head_dim: int) -> None:
    """Raise FormatError unless values can be turned in pairs."""
    if head_dim % 2:
        raise FormatError("bad size of a head", where=file.path, got=head_dim, expected="an even number")


def _divisors(file: GGUFFile, head_dim: int) -> np.ndarray | None:
    """What each frequency is divided by, float32 [head_dim / 2], or None; FormatError for other shapes."""
    if _TENSOR in file.tensors:
        found = dequantize(file.tensors[_TENSOR]).reshape(-1)
    elif ROPE_FACTORS in file.metadata:
        found = file.require(ROPE_FACTORS, np.ndarray)
    else:
        return None
    if found.shape != (head_dim // 2,) or not ((found >= SMALLEST) & (found <= LARGEST)).all():
        expected = f"{head_dim // 2} positive numbers"
        raise FormatError("bad rope factors", where=file.path, field="rope_freqs", expected=expected)
    return found.astype(np.float32)


def rope_parameters(rope: Rope, where: str | Path) -> dict[str, Any]:
    """A file's rope for transformers; UnsupportedError for factors without a formula."""
    if rope.divisors:
        return {"rope_theta": rope.base, **_llama3(rope, where)}
    parameters: dict[str, Any] = {"rope_theta": rope.base, "rope_type": rope.kind}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "yarn":
        parameters |= {"original_max_position_embeddings": rope.original_ctx, "beta_slow": rope.low}
        parameters |= {"beta_fast": rope.high, "attention_factor": rope.attention_factor}
    return parameters


def _positive(file: GGUFFile, key: str, default: float | None) -> float:
    kinds = (int, float)
    value = file.require(key, kinds) if default is None else file.find(key, kinds, default)
    if not SMALLEST <= value <= LARGEST:
        raise FormatError("bad value", where=file.path, field=key, got=value, expected="a positive number")
    return float(value)


def _llama3(rope: Rope, where: str | Path) -> dict[str, Any]:
    # Without scaling a pair of low frequency is divided by the factor, which is the greatest divisor.
    factor, (low, high, original) = max(rope.divisors), _LLAMA3.values()
    formula = Rope(rope.base, "llama3", factor, original, low, high)
    expected = formula.llama3_divisors(2 * len(rope.divisors))
    if expected is not None and np.allclose(rope.divisors, expected, rtol=1e-3):
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    got = f"{_TENSOR} ({len(rope.divisors)},)"
    raise UnsupportedError("frequency factors that are not Llama 3's", where=where, got=got)
