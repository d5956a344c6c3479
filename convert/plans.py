"""The tensors that all forms of a model share, checked and planned: embeddings, attention, norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from hotcold.convert.architectures import HF_NAMES, LAYER_NAMES, ModelSpec, interleave_rope
from hotcold.convert.gguf_write import TensorPlan, planned
from hotcold.convert.hf_checkpoint import WeightSource
from hotcold.convert.quantize import row_type
from hotcold.errors import ShapeError, UnsupportedError
from hotcold.progress import log

__all__ = ["Planner", "TensorTypes"]

Change = Callable[[np.ndarray], np.ndarray]

_IGNORED = ("rotary_emb.inv_freq",)  # old checkpoints store what the config says anyway


@dataclass(frozen=True, slots=True)
class TensorTypes:
    """ggml types: of the matrices, of embedding and head, of the predictors."""

    body: str
    head: str
    predictor: str = "Q8_0"


class Planner:
    """Plans the tensors of one model. Raises ShapeError where one does not fit the config."""

    def __init__(self, source: WeightSource, spec: ModelSpec, types: TensorTypes) -> None:
        self.source, self.spec, self.types = source, spec, types
        self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        layers = [
            f"model.layers.{i}.{name}" for i in range(self.spec.n_layers) for name in LAYER_NAMES.values()
        ]
        known = {f"{name}.weight" for name in [*HF_NAMES.values(), *layers]}
        unknown = sorted(name for name in self.source.names() - known if not name.endswith(_IGNORED))
        if unknown:
            what = "weights that this conversion would lose"
            raise UnsupportedError(
                what, where=unknown[0], got=f"{len(unknown)} unknown tensors", expected="none"
            )

    def matrix(
        self, name: str, hf_name: str, shape: tuple[int, ...], type_name: str, change: Change | None = None,
        written: tuple[int, ...] | None = None,
    ) -> TensorPlan:  # fmt: skip
        """Plan a 2-D tensor [out, in]; `change` is applied to it first and gives the shape `written`."""
        self._check(hf_name, shape)
        load = partial(self.source.load, hf_name)
        changed = (lambda: change(load())) if change else load
        return self.floats(name, written or shape, type_name, changed)

    def floats(
        self, name: str, shape: tuple[int, ...], type_name: str, load: Callable[[], np.ndarray]
    ) -> TensorPlan:
        """Plan a tensor to be quantised, as F16 where its rows are not whole blocks of `type_name`."""
        fitting = row_type(type_name, shape[-1])
        if fitting != type_name:
            log(f"{name}: rows of {shape[-1]} are not whole blocks of {type_name}, written as {fitting}")
        return planned(f"{name}.weight", shape, fitting, load)

    def vector(self, name: str, hf_name: str) -> TensorPlan:
        """Plan a norm's weight [d_model], always F32."""
        self._check(hf_name, (self.spec.d_model,))
        return planned(f"{name}.weight", (self.spec.d_model,), "F32", lambda: self.source.load(hf_name))

    def _check(self, hf_name: str, shape: tuple[int, ...]) -> None:
        got = self.source.shape(hf_name)
        if got != shape:
            raise ShapeError("tensor does not fit the config", where=hf_name, got=got, expected=shape)

    def embeddings(self, *, copy_tied: bool) -> list[TensorPlan]:
        """token_embd, output_norm, and output: left out of a tied model unless `copy_tied`."""
        shape = (self.spec.n_vocab, self.spec.d_model)
        embedding = f"{HF_NAMES['token_embd']}.weight"
        head = embedding if self.spec.tied else f"{HF_NAMES['output']}.weight"
        plans = [
            self.matrix("token_embd", embedding, shape, self.types.head),
            self.vector("output_norm", f"{HF_NAMES['output_norm']}.weight"),
        ]
        if copy_tied or not self.spec.tied:
            plans.append(self.matrix("output", head, shape, self.types.head))
        return plans

    def attention(self, layer: int, *, interleaved: bool) -> list[TensorPlan]:
        """The norms and the four projections of a layer; `interleaved` chooses the order of q and k rows."""
        spec = self.spec
        q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        order = {"attn_q": spec.n_heads, "attn_k": spec.n_kv_heads} if interleaved else {}
        shapes = {
            "attn_q": (q, spec.d_model),
            "attn_k": (kv, spec.d_model),
            "attn_v": (kv, spec.d_model),
            "attn_output": (spec.d_model, q),
        }
        norms = [self.vector(self.name(layer, n), self.hf_name(layer, n)) for n in ("attn_norm", "ffn_norm")]
        return norms + [
            self.layer_matrix(layer, n, shape, _reorder(order.get(n))) for n, shape in shapes.items()
        ]

    def layer_matrix(
        self, layer: int, name: str, shape: tuple[int, ...], change: Change | None = None,
        written: tuple[str, tuple[int, ...]] | None = None,
    ) -> TensorPlan:  # fmt: skip
        """Plan the matrix that GGUF calls `name`; `written`: its name and shape once `change` is done."""
        written_name, written_shape = written or (name, shape)
        names = self.name(layer, written_name), self.hf_name(layer, name)
        return self.matrix(*names, shape, self.types.body, change, written_shape)

    @staticmethod
    def name(layer: int, name: str) -> str:
        return f"blk.{layer}.{name}"

    @staticmethod
    def hf_name(layer: int, name: str) -> str:
        return f"model.layers.{layer}.{LAYER_NAMES[name]}.weight"


def _reorder(n_heads: int | None) -> Change | None:
    return None if n_heads is None else lambda weight: interleave_rope(weight, n_heads)
