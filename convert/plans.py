"""The tensors that all forms of a model share, planned for writing: embeddings, attention, norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hotcold.convert.architectures import HF_NAMES, LAYER_NAMES, ModelSpec, hf_shapes, interleave_rope
from hotcold.convert.gguf_write import TensorPlan, planned
from hotcold.convert.hf_checkpoint import WeightSource
from hotcold.convert.quantize import row_type
from hotcold.errors import ShapeError, UnsupportedError

__all__ = ["Planner", "TensorTypes", "check_weights"]

Change = Callable[[np.ndarray], np.ndarray]
Shape = tuple[int, ...]

_IGNORED = (
    "rotary_emb.inv_freq",
    "lm_head.weight",
)  # the former stands in the config, the latter may be tied


def check_weights(source: WeightSource, spec: ModelSpec) -> None:
    """Refuse a checkpoint whose tensors are not those of its config.

    UnsupportedError for weights that would be lost, FormatError for missing ones, ShapeError for the
    others.
    """
    shapes = hf_shapes(spec)
    lost = sorted(name for name in source.names() - set(shapes) if not name.endswith(_IGNORED))
    if lost:
        what = "weights that this conversion would lose"
        raise UnsupportedError(what, where=lost[0], got=f"{len(lost)} unknown tensors", expected="none")
    for name, shape in shapes.items():
        if source.shape(name) != shape:
            got = source.shape(name)
            raise ShapeError("tensor does not fit the config", where=name, got=got, expected=shape)


@dataclass(frozen=True, slots=True)
class TensorTypes:
    """ggml types: of the matrices, of embedding and head, of the predictors."""

    body: str
    head: str
    predictor: str = "Q8_0"


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans the tensors of one model; `load(name)` gives a weight, float32, under Hugging Face's name.

    `fallbacks` collects what could not be written in the wished type.
    """

    spec: ModelSpec
    types: TensorTypes
    load: Callable[[str], np.ndarray]
    fallbacks: list[str] = field(default_factory=list)

    def floats(self, name: str, shape: Shape, type_name: str, load: Callable[[], np.ndarray]) -> TensorPlan:
        """Plan a tensor to be quantised, as F16 where its rows are not whole blocks of `type_name`."""
        fitting = row_type(type_name, shape[-1])
        if fitting != type_name:
            why = f"rows of {shape[-1]} are not whole blocks of {type_name}"
            self.fallbacks.append(f"{name}: {why}, written as {fitting}")
        return planned(f"{name}.weight", shape, fitting, load)

    def weight(
        self,
        name: str,
        hf_name: str,
        type_name: str,
        change: Change | None = None,
        shape: Shape | None = None,
    ) -> TensorPlan:
        """Plan a weight of the model; `change` is applied to it first and gives it another `shape`."""
        hf_name = f"{hf_name}.weight"

        def load() -> np.ndarray:
            return change(self.load(hf_name)) if change else self.load(hf_name)

        return self.floats(name, shape or hf_shapes(self.spec)[hf_name], type_name, load)

    def layer_weight(
        self, layer: int, name: str, change: Change | None = None, written: tuple[str, Shape] | None = None
    ) -> TensorPlan:
        """Plan the matrix `blk.N.name`; `written` is another name and shape that `change` makes of it."""
        as_name, shape = written or (name, None)
        hf_name = f"model.layers.{layer}.{LAYER_NAMES[name]}"
        kind = "F32" if name.endswith("norm") else self.types.body
        return self.weight(f"blk.{layer}.{as_name}", hf_name, kind, change, shape)

    def embeddings(self, *, copy_tied: bool) -> list[TensorPlan]:
        """token_embd, output_norm, and output: left out of a tied model unless `copy_tied`."""
        head = HF_NAMES["token_embd" if self.spec.tied else "output"]
        plans = [
            self.weight("token_embd", HF_NAMES["token_embd"], self.types.head),
            self.weight("output_norm", HF_NAMES["output_norm"], "F32"),
        ]
        if copy_tied or not self.spec.tied:
            plans.append(self.weight("output", head, self.types.head))
        return plans

    def attention(self, layer: int, *, interleaved: bool) -> list[TensorPlan]:
        """The norms and the four projections of a layer; `interleaved` chooses the order of q and k rows."""
        heads = {"attn_q": self.spec.n_heads, "attn_k": self.spec.n_kv_heads} if interleaved else {}
        names = ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
        return [self.layer_weight(layer, name, _reorder(heads.get(name))) for name in names]


def _reorder(n_heads: int | None) -> Change | None:
    return None if n_heads is None else lambda weight: interleave_rope(weight, n_heads)
