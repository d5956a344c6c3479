"""The kinds of predictors, one row each: what a kind computes, and the module that trains it.

All of them are two thin matrices, `scores = fc2 · act(fc1 · x) + bias`, and a neuron is predicted active
iff its score reaches the layer's threshold. A kind says which x it reads, whether there is a ReLU between
the matrices, and whether there is a bias per neuron: that is all that storage and kernels need to know of
it. numpy alone; the trainers are imported when something is trained.

To add a kind: a module in this folder with `train` and `settings` (see `Trainer`), and a row of `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np

from hotcold.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    from hotcold.files.gguf import GGUFFile
    from hotcold.predictor.training.data import LayerData
    from hotcold.predictor.training.train import TrainOptions

__all__ = [
    "BIAS",
    "FC1",
    "FC2",
    "KINDS",
    "KIND_KEY",
    "LOWRANK_MLP",
    "Kind",
    "Trainer",
    "Weights",
    "kind_named",
    "kind_of_file",
]

FC1, FC2, BIAS = "fc1.weight", "fc2.weight", "fc2.bias"  # in safetensors as in GGUF, after the layer's prefix
KIND_KEY = "hotcold.predictor.kind"  # of GGUF metadata


class Weights(NamedTuple):
    """What is trained, float32. `bias` is None in kinds without."""

    fc1: np.ndarray  # [rank, d_model]
    fc2: np.ndarray  # [d_ff, rank]
    bias: np.ndarray | None = None  # [d_ff]


class Trainer(Protocol):
    """What the module of a kind holds."""

    def train(
        self,
        data: LayerData,
        frequency: np.ndarray,
        options: TrainOptions,
        on_epoch: Callable[[float], None],
    ) -> Weights:
        """The weights of one layer, from its train and calibrate tokens alone.

        `frequency` float32 [d_ff] is how often each neuron fired; `on_epoch` is told a loss after each step
        of the progress bar. The result MUST depend on these arguments alone, so that resumed training is
        the same.
        """

    def settings(self, options: TrainOptions) -> dict[str, Any]:
        """What `config.json` tells people beside rank and target, by the names of the options."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind: `fc2 · act(fc1 · x) + bias`."""

    name: str
    module: str
    relu: bool  # between the matrices; else there is nothing
    bias: bool  # one per neuron
    normed: bool  # x is the FFN's input, after its norm; else the residual stream before that
    needs_model: bool = False  # training needs the model's gates beside its traces
    in_powerinfer: bool = False  # whether PowerInfer itself runs it

    @property
    def trainer(self) -> Trainer:
        """Its module."""
        return cast("Trainer", import_module(self.module))

    @property
    def formula(self) -> str:
        """For people."""
        hidden = "relu(fc1 · x)" if self.relu else "fc1 · x"
        return f"fc2 · {hidden}{' + bias' if self.bias else ''}"

    def scores(self, weights: Weights, x: np.ndarray) -> np.ndarray:
        """float32 [tokens, d_ff] of x [tokens, d_model]."""
        hidden = x.astype(np.float32) @ weights.fc1.T
        scores = (np.maximum(hidden, 0) if self.relu else hidden) @ weights.fc2.T
        return scores if weights.bias is None else scores + weights.bias

    def shapes(self, rank: int, d_model: int, d_ff: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of the tensors of a layer, all of which every predicted token reads."""
        shapes: dict[str, tuple[int, ...]] = {FC1: (rank, d_model), FC2: (d_ff, rank)}
        return shapes | {BIAS: (d_ff,)} if self.bias else shapes


LOWRANK_MLP = "lowrank-mlp"
KINDS = {
    kind.name: kind
    for kind in (
        Kind(LOWRANK_MLP, "hotcold.predictor.kinds.lowrank_mlp", True, False, False, in_powerinfer=True),
        Kind("svd", "hotcold.predictor.kinds.svd", False, True, True, needs_model=True),
    )
}


def kind_of_file(file: GGUFFile) -> Kind:
    """What the predictors of a GGUF file compute: PowerInfer's own where it does not say."""
    return kind_named(file.find(KIND_KEY, str, LOWRANK_MLP), file.path)


def kind_named(name: str, where: str | Path) -> Kind:
    """The kind that a file names; UnsupportedError for one that this hotcold does not know."""
    if name not in KINDS:
        known = " | ".join(KINDS)
        raise UnsupportedError("unknown kind of predictor", where=where, got=name, expected=known)
    return KINDS[name]
