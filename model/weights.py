"""The weights of a model, slot by slot, whatever they lie in: the one loader of GGUF files and of
checkpoints.

`hotcold.model.tensors` says what the slots are, and where a format has them. Who loads a model asks for a
slot as float32, or packed: as bytes of a type that it computes with. It knows no name, no family and no order
of rows. The constants that Granite and MiniCPM multiply by are folded into the weights of their checkpoints,
so that every program that runs a Llama runs them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from hotcold.files.gguf import GGUFFile, Tensor
from hotcold.files.gguf_split import forget_pages
from hotcold.files.quantize import as_f16, dequantize
from hotcold.files.stored import check_stored
from hotcold.files.tensor_check import check_tensors, misshapen_tensor, missing_tensor
from hotcold.finite import check_weight
from hotcold.model.families import ARCHITECTURES, names_in
from hotcold.model.firing import threshold_tensor
from hotcold.model.huggingface import WeightSource, shapes_of
from hotcold.model.spec import ModelSpec
from hotcold.model.tensors import (
    ALL,
    ROWS,
    Naming,
    Shape,
    parts_of,
    place,
    rows_of,
    shape_of,
    shapes_of_model,
    slots_of,
)

__all__ = [
    "KEPT",
    "CheckpointWeights",
    "FileWeights",
    "Packed",
    "Weights",
    "check_weights",
    "end_names",
]

KEPT = ("F32", "F16", "BF16", "Q8_0", "Q4_0")  # types that engines compute with, numbered as in csrc/layout.h
_PREDICTOR = (("fc1", "weight"), ("fc2", "weight"), ("fc2", "bias"))
_PASSED_OVER = (("router", "weight"), *_PREDICTOR)  # a router with one expert: no part of the function
_ONE = "_exps.weight"  # of a mixture, of which it must be the only expert
_GLANCE = 4096  # elements of a stored array


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [n, width] as uint8 `data` of a ggml type; row i is its row `order[i]`, if there is one."""

    type: str
    data: np.ndarray
    n: int
    width: int
    order: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Packed:
        """Some of its rows."""
        rows = rows if self.order is None else self.order[rows]
        picked = np.ascontiguousarray(self.data.reshape(-1, len(self.data) // self.n)[rows])
        return replace(self, data=picked.reshape(-1), n=len(rows), order=None)


class Weights(ABC):
    """The weights of one model. `converted`: types that became F16, as no engine computes with them."""

    def __init__(self, spec: ModelSpec, naming: Naming, path: Path | None) -> None:
        self.spec, self.naming, self.path = spec, naming, path
        self.converted: set[str] = set()

    @abstractmethod
    def tensor(self, slot: str, layer: int = 0, part: str = "weight") -> Tensor:
        """The tensor that holds a slot, maybe beside others; FormatError where it is missing."""

    @abstractmethod
    def held(self, slot: str) -> str:
        """The slot that a matrix is held as: by input or by output; for a tied head, the embedding."""

    def slots(self) -> list[tuple[str, int]]:
        """All slots with their layers, as they are held."""
        return [(self.held(slot), layer) for slot, layer in slots_of(self.spec)]

    def __iter__(self) -> Iterator[tuple[str, int, str, Tensor]]:
        """Every slot with its layer, part and tensor."""
        for slot, layer in self.slots():
            yield from (
                (slot, layer, part, self.tensor(slot, layer, part)) for part in parts_of(self.spec, slot)
            )

    def floats(self, slot: str, layer: int = 0, part: str = "weight") -> np.ndarray:
        """A slot as float32, by input or output as asked for; FormatError unless all of it is finite."""
        if (held := self.held(slot)) != slot:
            values = self.floats(held, layer, part)
            return values.T if slot.endswith(ROWS) != held.endswith(ROWS) and part == "weight" else values
        tensor, rows = self.tensor(slot, layer, part), rows_of(self.spec, self.naming, slot)
        return check_weight(dequantize(tensor), tensor.name, self.path)[rows]

    def vector(self, slot: str, layer: int = 0, part: str = "weight") -> np.ndarray | None:
        """A norm or a bias, float32 [n]; None where the model has none."""
        return self.floats(slot, layer, part).reshape(-1) if part in parts_of(self.spec, slot) else None

    def packed(self, slot: str, layer: int = 0, shape: Shape | None = None) -> Packed:
        """A slot in the type that it is stored in, or as F16 where that is none of KEPT.

        `shape` is for those whose size the model does not say. FormatError unless all values are finite.
        """
        tensor, rows, kind = self.tensor(slot, layer), rows_of(self.spec, self.naming, slot), "F16"
        if shape and tensor.shape != shape:
            raise misshapen_tensor(tensor.name, self.path, tensor.shape, shape)
        reordered = isinstance(rows, np.ndarray) and len(rows) == tensor.shape[0]  # which costs no copy here
        part, order = (ALL, rows) if reordered else (rows, None)
        if tensor.type in KEPT:
            kind, values = tensor.type, tensor.data.reshape(tensor.shape[0], -1)[part]
        else:
            self.converted.add(tensor.type)
            values = as_f16(dequantize(tensor)[part])
        data = check_stored(values, kind, tensor.name, self.path)
        return Packed(kind, data, *(shape or shape_of(self.spec, slot, layer)), order)


class CheckpointWeights(Weights):
    """Those of a Hugging Face checkpoint; `load(name)` gives a tensor, float32, under transformers' name."""

    def __init__(self, spec: ModelSpec, load: Callable[[str], np.ndarray], path: Path | None = None) -> None:
        super().__init__(spec, spec.family.naming, path)
        self._load = load

    def tensor(self, slot: str, layer: int = 0, part: str = "weight") -> Tensor:
        """One of transformers' tensors, times the constant that belongs to it."""
        name, _ = place(self.spec, self.naming, slot, layer, part)
        values, scale = self._load(name), self._scale(slot)
        values = values if scale == 1 else values * np.float32(scale)
        return Tensor(name, values.shape, "F32", values)

    def held(self, slot: str) -> str:
        """Every matrix is by output."""
        return "embedding" if slot == "head" and self.spec.tied else slot.removesuffix(ROWS)

    def _scale(self, slot: str) -> float:
        """A tied head holds the embedding's scale, so the norm before it takes that away again."""
        scales = self.spec.scales
        match slot:
            case "embedding":
                return scales.embedding
            case "output_norm":
                return scales.logits / (scales.embedding if self.spec.tied else 1.0)
            case "o" | "down":
                return scales.residual
            case "q":
                return scales.query
        return 1.0


class FileWeights(Weights):
    """Those of a GGUF file. `by_neuron`: it holds `down` by input, as `down_rows`."""

    def __init__(self, file: GGUFFile, spec: ModelSpec, naming: Naming) -> None:
        super().__init__(spec, naming, file.path)
        self.file = file
        for name, tensor in file.tensors.items():
            if name.endswith(_ONE) and tensor.shape[0] != 1:
                raise misshapen_tensor(name, self.path, tensor.shape, "one expert")
        self.by_neuron = any(self._name("down" + ROWS, i) in file.tensors for i in range(spec.n_layers))

    @classmethod
    def read(cls, file: GGUFFile) -> Self:
        """The weights of a whole file. Raises as `ModelSpec.from_gguf`, and for tensors that are not the
        model's.

        An unused tensor (a bias, a norm) means another function than the one that is computed, and so does
        one that some layers have and some have not.
        """
        spec = ModelSpec.from_gguf(file)
        spec.check_layers(file.path)
        weights = cls(file, spec, ARCHITECTURES[file.require("general.architecture", str)].naming)
        weights.check(weights.slots())
        return weights

    def check(self, slots: Collection[tuple[str, int]]) -> None:
        """Raise FormatError, ShapeError or UnsupportedError unless the file holds exactly these slots."""
        expected = {
            self._name(slot, layer, part): place(self.spec, self.naming, slot, layer, part)[1]
            for slot, layer in slots
            for part in parts_of(self.spec, slot)
        }
        check_tensors(expected, {name: self._shape(name) for name in self.weight_names()}, self.path)

    def stored_names(self, *, with_predictors: bool = False) -> dict[str, tuple[str, int, str]]:
        """The model's tensors that the file has, with the slot, layer and part of each."""
        all_parts = [
            (slot, layer, part) for slot, layer in self.slots() for part in parts_of(self.spec, slot)
        ]
        if with_predictors:
            all_parts += [(slot, i, part) for i in range(self.spec.n_layers) for slot, part in _PREDICTOR]
        names = {self._name(*one): one for one in all_parts}
        return {name: found for name, found in names.items() if name in self.file.tensors}

    def weight_names(self) -> set[str]:
        """The names of all tensors but a router's, those of predictors, thresholds, and rope factors."""
        names, layers = self.naming.names, range(self.spec.n_layers)
        over = {f"{names[slot].format(layer)}.{part}" for slot, part in _PASSED_OVER for layer in layers}
        over |= {threshold_tensor(layer) for layer in layers}  # which the firing rule has read
        return self.file.tensors.keys() - {*over, f"{names['rope_factors']}.weight"}

    def has(self, slot: str, layer: int = 0) -> bool:
        """Whether the file holds a slot that a model may lack."""
        return self._name(slot, layer) in self.file.tensors

    def tensor(self, slot: str, layer: int = 0, part: str = "weight") -> Tensor:
        """The tensor; that of a single expert without its first dimension."""
        name = self._name(slot, layer, part)
        if name not in self.file.tensors:
            raise missing_tensor(name, self.path)
        return replace(self.file.tensors[name], shape=self._shape(name))

    def held(self, slot: str) -> str:
        """As the file has it: `down` may be by neuron."""
        if slot.removesuffix(ROWS) == "down":
            return "down" + ROWS * self.by_neuron
        return "embedding" if slot == "head" and self.spec.tied else slot

    def head_is_embedding(self) -> bool:
        """Whether one matrix is enough for both."""
        embedding, head = end_names(self.file)
        return head == embedding

    def release(self) -> None:
        """Let go of the pages that were read."""
        forget_pages(self.file)

    def _name(self, slot: str, layer: int = 0, part: str = "weight") -> str:
        """A single expert's tensors bear the names of many."""
        name, _ = place(self.spec, self.naming, slot, layer, part)
        one = name.removesuffix(".weight") + _ONE
        return one if one in self.file.tensors and name not in self.file.tensors else name

    def _shape(self, name: str) -> Shape:
        shape = self.file.tensors[name].shape
        return shape[1:] if name.endswith(_ONE) and len(shape) > 1 else shape


def check_weights(source: WeightSource, spec: ModelSpec) -> None:
    """Refuse a checkpoint whose tensors are not those of its config; raises as `check_tensors`."""
    check_tensors(shapes_of_model(spec, spec.family.naming), shapes_of(source), source.path)


def end_names(file: GGUFFile) -> tuple[str, str]:
    """The embedding's tensor, and that of the logits: the same where a file has no head, or a copy."""
    embedding, head = (f"{names_in(file)[slot]}.weight" for slot in ("embedding", "head"))
    one, other = file.tensors.get(embedding), file.tensors.get(head)
    if other is None:
        return embedding, embedding
    if one is None or (one.type, one.data.size) != (other.type, other.data.size):
        return embedding, head
    a, b = (np.asarray(tensor.data).reshape(-1) for tensor in (one, other))
    # Two matrices differ from the first bytes on, so that hundreds of megabytes need not be read.
    same = np.array_equal(a[:_GLANCE], b[:_GLANCE]) and np.array_equal(a, b)
    return embedding, embedding if same else head
