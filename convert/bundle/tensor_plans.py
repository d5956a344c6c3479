"""The tensors that all forms of a model share, planned for writing: embeddings, norms, attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hotcold.convert.gguf.write import TensorPlan, planned
from hotcold.files.quantize import row_type
from hotcold.model.forms import Form
from hotcold.model.spec import ModelSpec, interleave_rope
from hotcold.model.weights import Weights, parts_of

__all__ = ["Planner", "TensorTypes"]

Change = Callable[[np.ndarray], np.ndarray]
Shape = tuple[int, ...]

_QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True, slots=True)
class TensorTypes:
    """ggml types: of the matrices, of embedding and head, of the predictors."""

    body: str
    head: str
    predictor: str = "Q8_0"


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans the tensors of one model; `load(name)` gives a weight, float32, under transformers' name.

    `fallbacks` collects what could not be written in the wished type.
    """

    spec: ModelSpec
    types: TensorTypes
    load: Callable[[str], np.ndarray]
    fallbacks: list[str] = field(default_factory=list)

    @property
    def weights(self) -> Weights:
        """The same weights under our names."""
        return Weights(self.spec, self.load)

    def floats(self, name: str, shape: Shape, type_name: str, load: Callable[[], np.ndarray]) -> TensorPlan:
        """Plan a tensor to be quantized, as F16 where its rows are not whole blocks of `type_name`."""
        fitting = row_type(type_name, shape[-1])
        if fitting != type_name:
            why = f"rows of {shape[-1]} are not whole blocks of {type_name}"
            self.fallbacks.append(f"{name}: {why}, written as {fitting}")
        return planned(f"{name}.weight", shape, fitting, load)

    def matrix(
        self, name: str, module: str, layer: int, change: Change | None = None, shape: Shape | None = None
    ) -> TensorPlan:
        """Plan the matrix of a module as tensor `name`; `change` makes another `shape` of it."""

        def load() -> np.ndarray:
            weight = self.weights.load(module, "weight", layer)
            return change(weight) if change else weight

        kind = self.types.head if module in ("token_embd", "output") else self.types.body
        return self.floats(name, shape or self.weights.shape(module), kind, load)

    def vectors(
        self,
        name: str,
        module: str,
        layer: int,
        parts: tuple[str, ...] = ("bias",),
        change: Change | None = None,
    ) -> list[TensorPlan]:
        """Plan the bias of a module, or the weight and bias of a norm, as F32; none where it has none."""

        def plan(part: str) -> TensorPlan:
            def load() -> np.ndarray:
                vector = self.weights.load(module, part, layer)
                return change(vector) if change else vector

            return planned(f"{name}.{part}", self.weights.shape(module, "bias"), "F32", load)

        return [plan(part) for part in parts_of(self.spec, module) if part in parts]

    def norm(self, name: str, module: str, layer: int = 0) -> list[TensorPlan]:
        """Plan a norm as tensor `name`."""
        return self.vectors(name, module, layer, ("weight", "bias"))

    def linear(
        self, layer: int, module: str, change: Change | None = None, written: tuple[str, Shape] | None = None
    ) -> list[TensorPlan]:
        """Plan matrix and bias of a layer's module; `written` is another name and shape, made by `change`."""
        name, shape = written or (module, None)
        name = f"blk.{layer}.{name}"
        return [self.matrix(name, module, layer, change, shape), *self.vectors(name, module, layer)]

    def embeddings(self, form: Form, *, copy_tied: bool) -> list[TensorPlan]:
        """token_embd, positions, output_norm, and output: left out of a tied model unless `copy_tied`."""
        plans = [self.matrix("token_embd", "token_embd", 0), *self.norm("output_norm", "output_norm")]
        if form.positions:
            plans.append(self._positions(form))
        if copy_tied or not self.spec.tied:
            plans.append(self.matrix("output", "output", 0))
        divisors = self.spec.rope.llama3_divisors(self.spec.head_dim) if self.spec.rope else None
        if form.rope_factors and divisors is not None:
            plans.append(planned("rope_freqs.weight", divisors.shape, "F32", lambda: divisors))
        return plans

    def _positions(self, form: Form) -> TensorPlan:
        skipped = (self.spec.family.first_position or 0) - form.first_position
        rows, width = self.weights.shape("position_embd")
        return planned(
            f"{form.positions}.weight", (rows - skipped, width), "F32",
            lambda: self.weights.load("position_embd")[skipped:],
        )  # fmt: skip

    def attention(self, layer: int, form: Form) -> list[TensorPlan]:
        """The norms and the projections of a layer."""
        block = f"blk.{layer}"
        plans = [
            plan
            for name, module in _norms(self.spec, form)
            for plan in self.norm(f"{block}.{name}", module, layer)
        ]
        for module in ("attn_q_norm", "attn_k_norm") if form.head_norm else ():
            plans += self.norm(f"{block}.{module}", module, layer)
        if form.fused_qkv:
            plans += self._fused_qkv(layer)
        else:
            plans += [plan for module in _QKV for plan in self._projection(layer, module, form)]
        return plans + self.linear(layer, "attn_output")

    def _projection(self, layer: int, module: str, form: Form) -> list[TensorPlan]:
        heads = {"attn_q": self.spec.n_heads, "attn_k": self.spec.n_kv_heads}.get(module)
        name = f"blk.{layer}.{module}"
        change = _interleaved(heads) if form.interleaved and heads else None
        return [
            self.matrix(name, module, layer, change),
            *self.vectors(name, module, layer, change=change),
        ]

    def _fused_qkv(self, layer: int) -> list[TensorPlan]:
        """The rows of q, then of k, then of v."""
        name, weights = f"blk.{layer}.attn_qkv", self.weights

        def load(part: str) -> np.ndarray:
            return np.concatenate([weights.load(module, part, layer) for module in _QKV])

        plans = [self.floats(name, weights.shape("attn_qkv"), self.types.body, lambda: load("weight"))]
        if "attn_q" in self.spec.biases:
            plans.append(
                planned(f"{name}.bias", weights.shape("attn_qkv", "bias"), "F32", lambda: load("bias"))
            )
        return plans


def _norms(spec: ModelSpec, form: Form) -> list[tuple[str, str]]:
    """Names in the file, and of the modules. llama.cpp's Falcon calls that of the FFN attn_norm."""
    if not form.parallel:
        return [("attn_norm", "attn_norm"), ("ffn_norm", "ffn_norm")]
    return [("attn_norm", "ffn_norm"), *([("attn_norm_2", "attn_norm")] if spec.two_norms else [])]


def _interleaved(n_heads: int) -> Change:
    return lambda weight: interleave_rope(weight, n_heads)
