"""When a neuron fires, and what it computes then: one table of rules, and how models store theirs.

A neuron's gate g = gate · x becomes a value v(g); where its score reaches the neuron's threshold, it fires
and contributes v(g) · up, else 0. The same function is meant wherever a model runs: in training, in dense
mode, and where rows of neurons that do not fire are never read. Three things implement the table: the torch
modules (`model/modeling_sparse.py`), the CPU kernels (`csrc/firing.h`) and those of Triton (`tiles.py`).

`config.json` holds the rule's name as `hidden_act`, with a threshold for all neurons in it (`fatrelu_0.01`),
or others as `activation_thresholds`: per layer a number, or a list of d_ff. GGUF files hold
`hotcold.activation`, and `hotcold.activation_thresholds` f32[L] or, per neuron, an F32 tensor
`blk.N.ffn_act.thresholds` [d_ff].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hotcold.errors import FormatError, UnsupportedError
from hotcold.files.tensor_check import misshapen_tensor, missing_tensor

if TYPE_CHECKING:
    from hotcold.files.gguf import GGUFFile

__all__ = ["NAMES", "RULES", "FiringRule", "Rule", "Score", "Value", "threshold_tensor"]

_NAME, _THRESHOLDS = "hotcold.activation", "hotcold.activation_thresholds"
_TINY, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

Threshold = float | tuple[float, ...]  # of a layer: for all of its neurons, or one each


class Value(IntEnum):
    """What a gate g becomes: g, g², g - threshold, silu(g), gelu(g). The numbers are those of the kernels."""

    GATE = 0
    SQUARE = 1
    SHIFTED = 2
    SILU = 3
    GELU = 4


class Score(IntEnum):
    """When a neuron fires: always; where its gate reaches the threshold; where |value| does; where the gate
    does, and up is positive. The numbers are those of the kernels."""

    ALWAYS = 0
    GATE = 1
    MAGNITUDE = 2
    GATE_AND_UP = 3


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table; `letter` stands for the threshold in the name, where the rule has any."""

    value: Value
    score: Score
    letter: str = ""

    @property
    def rectifies(self) -> bool:
        """Whether only positive gates fire, whatever the threshold."""
        return self.value in (Value.GATE, Value.SQUARE, Value.SHIFTED)

    @property
    def least(self) -> float:
        """The smallest threshold that makes sense."""
        return -_LARGEST if self.score is Score.GATE and not self.rectifies else 0.0


RULES: dict[str, Rule] = {
    "relu": Rule(Value.GATE, Score.GATE),
    "relu2": Rule(Value.SQUARE, Score.GATE),  # arXiv 2402.03804
    "drelu": Rule(Value.GATE, Score.GATE_AND_UP),  # arXiv 2406.05955
    "fatrelu": Rule(Value.GATE, Score.GATE, "T"),  # arXiv 2402.13516, equation 3: kept, not shifted
    "shifted_relu": Rule(Value.SHIFTED, Score.GATE, "B"),  # arXiv 2310.04564
    "thresholded_silu": Rule(Value.SILU, Score.MAGNITUDE, "T"),  # CATS, arXiv 2404.08763
    "thresholded_gelu": Rule(Value.GELU, Score.MAGNITUDE, "T"),
    "gate_thresholded_silu": Rule(Value.SILU, Score.GATE, "T"),
    "gate_thresholded_gelu": Rule(Value.GELU, Score.GATE, "T"),
    "silu": Rule(Value.SILU, Score.ALWAYS),
    "gelu": Rule(Value.GELU, Score.ALWAYS),
}
NAMES = tuple(f"{name}_{rule.letter}" if rule.letter else name for name, rule in RULES.items())
_ALIASES = {"swish": "silu"}
_NUMBERED = re.compile(r"([a-z_]+[a-z])_(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


@dataclass(frozen=True, slots=True)
class FiringRule:
    """The rule of a model: its name in `RULES`, and the thresholds of each layer (0 where it has none)."""

    name: str
    thresholds: tuple[Threshold, ...]

    @property
    def rule(self) -> Rule:
        """Its row in the table."""
        return RULES[self.name]

    @property
    def gives_zeros(self) -> bool:
        """Whether there are neurons that do not fire."""
        return self.rule.score is not Score.ALWAYS

    @property
    def per_neuron(self) -> bool:
        """Whether neurons of a layer differ."""
        return any(isinstance(threshold, tuple) for threshold in self.thresholds)

    @property
    def highest(self) -> float:
        """The largest threshold of all neurons."""
        return max(max(t) if isinstance(t, tuple) else t for t in self.thresholds)

    def kernel_thresholds(self, layer: int) -> np.ndarray:
        """float32 [1] or [d_ff]: a neuron fires iff its score is this or greater."""
        values = np.atleast_1d(np.asarray(self.thresholds[layer], np.float32))
        return np.maximum(values, np.float32(_TINY)) if self.rule.rectifies else values

    # ---- config.json

    @classmethod
    def named(cls, name: str, n_layers: int, *, gated: bool = True, where: str | Path = "") -> FiringRule:
        """The rule of a name that says all, such as `relu` or `fatrelu_0.01`; else UnsupportedError."""
        base, threshold = _parse(name)
        if base not in RULES or (threshold is None) is bool(RULES[base].letter):
            raise _unknown(name, where)
        if threshold is not None and not RULES[base].least <= threshold <= _LARGEST:
            raise _unknown(name, where)
        return cls(base, (threshold or 0.0,) * n_layers)._checked(gated, where)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], name: str, n_layers: int, d_ff: int | None = None,
        *, gated: bool = True, where: str | Path = "config.json",
    ) -> FiringRule:  # fmt: skip
        """The rule `name` of a config, with thresholds from the name, `activation_thresholds` or, as in the
        checkpoints of ProSparse, `hidden_act_param`. `d_ff` is not checked where it is None."""
        base, threshold = _parse(name)
        if base not in RULES or (threshold is not None and not RULES[base].letter):
            raise _unknown(name, where)
        if not RULES[base].letter:
            return cls(base, (0.0,) * n_layers)._checked(gated, where)
        default = 0.0 if threshold is None and base == "fatrelu" else threshold
        value = config.get("activation_thresholds", config.get("hidden_act_param", default))
        values = value if isinstance(value, list) else [value] * n_layers
        good = len(values) == n_layers and all(_fits(t, RULES[base].least, d_ff) for t in values)
        if not good:
            raise FormatError(
                "bad thresholds", where=where, field="activation_thresholds", got=str(value)[:80],
                expected=f"one number >= {RULES[base].least:g}, or {n_layers} of them, or lists of d_ff",
            )  # fmt: skip
        thresholds = tuple(tuple(map(float, t)) if isinstance(t, list) else float(t) for t in values)
        return cls(base, thresholds)._checked(gated, where)

    def as_config(self, key: str = "hidden_act") -> dict[str, Any]:
        """What `config.json` says of it; `key` is what the family calls its activation."""
        if not self.rule.letter:
            return {key: self.name}
        first = self.thresholds[0]
        if isinstance(first, float) and math.isfinite(first) and set(self.thresholds) == {first}:
            return {key: f"{self.name}_{first!r}"}
        values = [list(t) if isinstance(t, tuple) else t for t in self.thresholds]
        return {key: self.name, "activation_thresholds": values}

    # ---- GGUF

    @classmethod
    def from_gguf(
        cls, file: GGUFFile, implied: str, n_layers: int, d_ff: int, *, gated: bool = True
    ) -> FiringRule:
        """The rule of a file, or where that does not say, what its architecture implies: `implied`."""
        name = file.find(_NAME, str, implied)
        if name not in RULES:
            raise _unknown(name, file.path)
        if threshold_tensor(0) in file.tensors:
            thresholds = tuple(_neuron_thresholds(file, layer, d_ff) for layer in range(n_layers))
        else:
            thresholds = _layer_thresholds(file, n_layers, needed=bool(RULES[name].letter))
        name = "fatrelu" if name == "relu" and any(thresholds) else name
        if not RULES[name].letter:  # what else stands there is checked, and means nothing
            thresholds = (0.0,) * n_layers
        return cls(name, thresholds)._checked(gated, file.path)

    def metadata(self) -> dict[str, Any]:
        """What a GGUF file says of it, beside `tensors`."""
        if self.per_neuron:
            return {_NAME: self.name}
        return {_NAME: self.name, _THRESHOLDS: np.asarray(self.thresholds, np.float32)}

    def tensors(self, d_ff: int) -> Iterator[tuple[str, np.ndarray]]:
        """float32 [d_ff] of each layer under the tensor's name, where neurons differ."""
        for layer, threshold in enumerate(self.thresholds if self.per_neuron else ()):
            values = np.broadcast_to(np.asarray(threshold, np.float32), d_ff)
            yield threshold_tensor(layer), np.ascontiguousarray(values)

    def _checked(self, gated: bool, where: str | Path) -> FiringRule:
        if self.rule.score is Score.GATE_AND_UP and not gated:
            raise UnsupportedError("dReLU needs a gate", where=where)
        return self


def threshold_tensor(layer: int) -> str:
    """The tensor of a GGUF file that holds a layer's thresholds per neuron."""
    return f"blk.{layer}.ffn_act.thresholds"


def _parse(name: str) -> tuple[str, float | None]:
    """`fatrelu_0.01` is fatrelu and 0.01."""
    match = _NUMBERED.fullmatch(name)
    return (match[1], float(match[2])) if match else (_ALIASES.get(name, name), None)


def _unknown(name: str, where: str | Path) -> UnsupportedError:
    return UnsupportedError("unknown activation", where=where or None, got=name, expected=" | ".join(NAMES))


def _fits(value: object, least: float, d_ff: int | None) -> bool:
    if isinstance(value, list):
        whole = bool(value) and d_ff in (None, len(value))
        return whole and all(not isinstance(t, list) and _fits(t, least, d_ff) for t in value)
    return isinstance(value, int | float) and least <= value <= _LARGEST


def _layer_thresholds(file: GGUFFile, n_layers: int, *, needed: bool) -> tuple[float, ...]:
    values = file.require(_THRESHOLDS, np.ndarray) if needed else file.find(_THRESHOLDS, np.ndarray)
    if values is None:
        return (0.0,) * n_layers
    if len(values) != n_layers:
        raise FormatError(
            "one value per layer", where=file.path, field=_THRESHOLDS, got=len(values), expected=n_layers
        )
    _check_numbers(values, file, _THRESHOLDS)
    return tuple(map(float, values.tolist()))


def _neuron_thresholds(file: GGUFFile, layer: int, d_ff: int) -> tuple[float, ...]:
    name = threshold_tensor(layer)
    if name not in file.tensors:
        raise missing_tensor(name, file.path)
    tensor = file.tensors[name]
    if tensor.shape != (d_ff,) or tensor.type != "F32":
        raise misshapen_tensor(name, file.path, tensor.shape, (d_ff,))
    values = np.frombuffer(tensor.data.tobytes(), "<f4")
    _check_numbers(values, file, name)
    return tuple(values.tolist())


def _check_numbers(values: np.ndarray, file: GGUFFile, field: str) -> None:
    """Infinite ones say that all or none fire."""
    if values.dtype.kind not in "fiu" or np.isnan(values).any():
        raise FormatError("not a number", where=file.path, field=field, got=values.tolist()[:8])
