"""The tensors of a model, planned for writing under one `general.architecture`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from hotcold.convert.gguf.write import TensorPlan, planned
from hotcold.files.quantize import row_type
from hotcold.model.families import Architecture
from hotcold.model.spec import ModelSpec
from hotcold.model.tensors import ALL, PROJECTIONS, Naming, Shape, parts_of, place, rows_of, shape_of
from hotcold.model.weights import CheckpointWeights

__all__ = ["Planner", "TensorTypes"]


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
    def weights(self) -> CheckpointWeights:
        """The same weights by slots."""
        return CheckpointWeights(self.spec, self.load)

    def floats(self, name: str, shape: Shape, type_name: str, load: Callable[[], np.ndarray]) -> TensorPlan:
        """Plan a tensor to be quantized, as F16 where its rows are not whole blocks of `type_name`."""
        fitting = row_type(type_name, shape[-1])
        if fitting != type_name:
            why = f"rows of {shape[-1]} are not whole blocks of {type_name}"
            self.fallbacks.append(f"{name}: {why}, written as {fitting}")
        return planned(f"{name}.weight", shape, fitting, load)

    def predictor(self, naming: Naming, name: str, layer: int, values: np.ndarray) -> TensorPlan:
        """Plan a matrix of a layer's predictor (`fc1.weight`), or a vector (`fc2.bias`), which is F32."""
        slot, _, part = name.partition(".")
        name = naming.names[slot].format(layer)
        if part == "bias":
            return planned(f"{name}.bias", values.shape, "F32", lambda: values)
        return self.floats(name, values.shape, self.types.predictor, lambda: values)

    def tensor(self, naming: Naming, slots: Sequence[str], layer: int = 0) -> list[TensorPlan]:
        """Plan the tensor that holds these slots, and its bias, if it has one. Vectors are F32."""
        plans = []
        for part in parts_of(self.spec, slots[0]):
            name, shape = place(self.spec, naming, slots[0], layer, part)
            load = partial(self._joined, naming, slots, layer, part, shape)
            if len(shape) == 1:
                plans.append(planned(name, shape, "F32", load))
            else:
                kind = self.types.head if slots[0] in ("embedding", "head") else self.types.body
                plans.append(self.floats(name.removesuffix(".weight"), shape, kind, load))
        return plans

    def _joined(
        self, naming: Naming, slots: Sequence[str], layer: int, part: str, shape: Shape
    ) -> np.ndarray:
        """The rows of the slots where the file is to have them."""
        pieces = [
            (rows_of(self.spec, naming, slot), self.weights.floats(slot, layer, part)) for slot in slots
        ]
        if pieces[0][0] is ALL:
            return pieces[0][1]
        values = np.empty(shape, np.float32)
        for rows, piece in pieces:
            values[rows] = piece
        return values

    def embeddings(self, architecture: Architecture, *, copy_tied: bool) -> list[TensorPlan]:
        """Embedding, positions, output norm, and head: left out of a tied model unless `copy_tied`."""
        naming = architecture.naming
        plans = self.tensor(naming, ["embedding"]) + self.tensor(naming, ["output_norm"])
        if self.spec.structure.learned_positions:
            plans.append(self._positions(naming))
        if copy_tied or not self.spec.tied:
            plans += self.tensor(naming, ["head"])
        divisors = self.spec.rope.llama3_divisors(self.spec.head_dim) if self.spec.rope else None
        if architecture.rope_factors and divisors is not None:
            name = f"{naming.names['rope_factors']}.weight"
            plans.append(planned(name, divisors.shape, "F32", lambda: divisors))
        return plans

    def _positions(self, naming: Naming) -> TensorPlan:
        """From the row on that the format begins with: before that of position 0 there may be others."""
        name, shape = place(self.spec, naming, "positions")
        skipped = self.weights.naming.first_position - naming.first_position
        weights = self.weights
        return planned(name, shape, "F32", lambda: weights.tensor("positions").data[skipped:])

    def attention(self, layer: int, naming: Naming) -> list[TensorPlan]:
        """The norms and the projections of a layer."""
        norms = {place(self.spec, naming, slot, layer)[0]: slot for slot in ("attn_norm", "ffn_norm")}
        slots = [[norms[name]] for name in sorted(norms)]
        slots += [["q_norm"], ["k_norm"]] if self.spec.structure.head_norm else []
        slots += [PROJECTIONS[:3]] if naming.fused else [[slot] for slot in PROJECTIONS[:3]]
        return [plan for group in [*slots, ["o"]] for plan in self.tensor(naming, group, layer)]

    def ffn(self, layer: int, naming: Naming, down: str = "down") -> list[TensorPlan]:
        """The matrices of a layer's FFN, that out of it as `down` or `down_rows`."""
        slots = ("gate", "up", down) if self.spec.structure.gated else ("gate", down)
        return [plan for slot in slots for plan in self.tensor(naming, [slot], layer)]

    def expert(self, layer: int, naming: Naming) -> list[TensorPlan]:
        """The same as the only expert of a mixture, and the router that always takes it."""
        router = np.zeros((1, self.spec.d_model), np.float32)
        plans = [self.floats(naming.names["router"].format(layer), router.shape, "F32", lambda: router)]
        for slot in ("gate", "up", "down"):
            name, shape = f"{naming.names[slot].format(layer)}_exps", (1, *shape_of(self.spec, slot, layer))
            load = partial(self.weights.floats, slot, layer)
            plans.append(self.floats(name, shape, self.types.body, lambda load=load: load()[np.newaxis]))
        return plans
