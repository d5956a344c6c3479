"""Rotary frequencies and their scalings, as transformers computes them (`modeling_rope_utils`).

Pair i of a head of `dim` values turns by position · base^(-2i/dim) radians, unless a scaling says
otherwise: `linear` (position interpolation, arXiv 2306.15595) divides all frequencies, `llama3` the low
ones, `yarn` (arXiv 2309.00071) the low ones with a ramp and scales sine and cosine besides. GGUF has keys
for linear and YaRN; Llama 3's is a divisor per pair there, the tensor `rope_freqs`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hotcold.errors import UnsupportedError

if TYPE_CHECKING:
    from hotcold.model.config_fields import Fields

__all__ = ["Rope"]

# transformers' `dynamic` changes nothing up to max_position_embeddings, where our context ends too.
_UNSCALED = ("default", "dynamic")


@dataclass(frozen=True, slots=True)
class Rope:
    """Base and scaling of one model's rotary positions.

    `kind` is `default`, `linear`, `yarn` or `llama3`; `factor` stretches the context of `original_ctx`
    tokens. `low` and `high` are YaRN's beta_slow and beta_fast or Llama 3's low_freq_factor and
    high_freq_factor; `attention_factor` multiplies sine and cosine. `divisors` [head_dim / 2], if any, are
    what a GGUF file divides the frequencies by besides.
    """

    base: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_ctx: int = 0
    low: float = 1.0
    high: float = 32.0
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()

    @classmethod
    def from_config(cls, fields: Fields, n_ctx: int) -> Rope:
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` beside it (older)."""
        rope = fields.config.get("rope_parameters") or fields.config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise fields.bad("rope_parameters", rope, "object")
        both = type(fields)({**fields.config, **rope}, fields.where)
        base, kind = both.positive("rope_theta", 10000.0), rope.get("rope_type", rope.get("type", "default"))
        if base <= 1:
            raise fields.bad("rope_theta", base, "more than 1")
        if not isinstance(kind, str):
            raise fields.bad("rope_type", kind, "a name")
        if both.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedError("partial rotary positions", where=fields.where, got=rope, expected="none")
        readers = {"linear": cls._linear, "yarn": cls._yarn, "llama3": cls._llama3}
        if kind in _UNSCALED:
            return cls(base)
        if kind not in readers:
            known = " | ".join((*_UNSCALED, *readers))
            raise UnsupportedError("unknown rope scaling", where=fields.where, got=kind, expected=known)
        return readers[kind](base, both, n_ctx)

    @classmethod
    def _linear(cls, base: float, fields: Fields, n_ctx: int) -> Rope:
        return cls(base, "linear", fields.positive("factor"))

    @classmethod
    def _llama3(cls, base: float, fields: Fields, n_ctx: int) -> Rope:
        low, high = fields.positive("low_freq_factor"), fields.positive("high_freq_factor")
        original = fields.count("original_max_position_embeddings")
        if high <= low:
            raise fields.bad("high_freq_factor", high, f"more than low_freq_factor, {low}")
        return cls(base, "llama3", fields.positive("factor"), original, low, high)

    @classmethod
    def _yarn(cls, base: float, fields: Fields, n_ctx: int) -> Rope:
        for key, plain in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
            if fields.config.get(key, plain) != plain:
                raise UnsupportedError(f"YaRN with {key}", where=fields.where, got=fields.config[key])
        original = fields.count("original_max_position_embeddings")
        factor = fields.positive("factor", n_ctx / original)
        default = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        low, high = fields.positive("beta_slow", 1.0), fields.positive("beta_fast", 32.0)
        attention = fields.positive("attention_factor", default)
        return cls(base, "yarn", factor, original, low, high, attention)

    def frequencies(self, dim: int) -> np.ndarray:
        """Radians per position of each pair, float32 [dim / 2]."""
        plain = self.base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        frequencies = (plain / self._divisors(plain, dim)).astype(np.float32)
        return frequencies / np.float32(self.divisors) if self.divisors else frequencies

    def llama3_divisors(self, dim: int) -> np.ndarray | None:
        """What llama.cpp wants in `rope_freqs`, float32 [dim / 2]; None unless this is Llama 3's scaling."""
        if self.kind != "llama3":
            return None
        plain = self.base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        return self._divisors(plain, dim).astype(np.float32)

    def _divisors(self, plain: np.ndarray, dim: int) -> np.ndarray:
        match self.kind:
            case "linear":
                return np.full_like(plain, self.factor)
            case "llama3":
                turns = self.original_ctx * plain / (2 * math.pi)  # of each pair over the first context
                smooth = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
                return 1 / ((1 - smooth) / self.factor + smooth)
            case "yarn":
                kept = 1 - self._ramp(dim)
                return 1 / ((1 - kept) / self.factor + kept)
        return np.ones_like(plain)

    def _ramp(self, dim: int) -> np.ndarray:
        """0 for pairs that turn often enough to be kept, 1 for those to be interpolated, [dim / 2]."""

        def pair_with(turns: float) -> float:
            return dim * math.log(self.original_ctx / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        first, last = max(math.floor(pair_with(self.high)), 0), min(math.ceil(pair_with(self.low)), dim - 1)
        width = last - first or 0.001
        return np.clip((np.arange(dim // 2) - first) / width, 0, 1)

    def as_yarn(self) -> Rope:
        """Llama 3's scaling as YaRN comes nearest to it: the same ends, another ramp between them."""
        return replace(self, kind="yarn") if self.kind == "llama3" else self

    def metadata(self) -> dict[str, Any]:
        """llama.cpp's keys, without the architecture before them. Llama 3's scaling has none: see above."""
        keys: dict[str, Any] = {"rope.freq_base": np.float32(self.base)}
        if self.kind in ("linear", "yarn"):
            keys |= {"rope.scaling.type": self.kind, "rope.scaling.factor": np.float32(self.factor)}
        if self.kind == "yarn":
            keys |= {
                "rope.scaling.original_context_length": np.uint32(self.original_ctx),
                "rope.scaling.yarn_beta_slow": np.float32(self.low),
                "rope.scaling.yarn_beta_fast": np.float32(self.high),
                "rope.scaling.attn_factor": np.float32(self._llama_cpp_attention()),
            }
        return keys

    def _llama_cpp_attention(self) -> float:
        """llama.cpp multiplies `attn_factor` by YaRN's own 1 + 0.1 ln(factor)."""
        return (
            self.attention_factor / (1 + 0.1 * math.log(self.factor))
            if self.factor > 1
            else self.attention_factor
        )
