"""The CPU's half of a hybrid engine: the cold neurons of device layers, and layers that are here as a whole.

It is the CPU engine's own native model, of which only these parts are loaded. What a sequence does with it is
in cpu_share.py.
"""

from __future__ import annotations

import numpy as np

from hotcold.errors import UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model.tensors import ROWS
from hotcold.model.weights import KEPT, FileWeights
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.cpu.load import load_layers, new_model
from hotcold.runtime.placement.plan import Placement

__all__ = ["CpuSide"]


class CpuSide:
    """What `placement` leaves to the CPU: `n_cold` neurons per layer. `converted`: types that became F16."""

    def __init__(self, file: GGUFFile, placement: Placement, mode: str, n_threads: int) -> None:
        """Pack these weights. Raises what loading the CPU engine raises."""
        weights = FileWeights.read(file)
        spec, whole = weights.spec, [i for i, layer in enumerate(placement.layers) if not layer.on_device]
        self.first = whole[0] if whole else spec.n_layers
        self.n_layers, self.d_model = spec.n_layers, spec.d_model
        self.n_cold = [layer.d_ff - len(layer.hot) if layer.on_device else 0 for layer in placement.layers]
        try:
            model = new_model(spec, [file], mode, n_threads)
            load_layers(model, weights, mode, whole)
            for i, layer in enumerate(placement.layers):
                if self.n_cold[i]:
                    _load_cold(model, weights, i, layer.cold)
        except ValueError as error:
            raise UnsupportedError(str(error), where=file.path) from error
        self.model, self.converted = model, weights.converted

    @property
    def any_layers(self) -> bool:
        """Whether there are layers here as a whole."""
        return self.first < self.n_layers


def _load_cold(model: _cpu.Model, weights: FileWeights, layer: int, cold: np.ndarray) -> None:
    """The rows of neurons."""
    slots = ("gate", "up" if weights.spec.structure.gated else None, "down" + ROWS)
    rows: list[object] = []
    for slot in slots:
        matrix = weights.packed(slot, layer).take(cold) if slot else None
        rows += [matrix.data, KEPT.index(matrix.type)] if matrix else [None, 0]
    bias = weights.vector("gate", layer, "bias")
    _cpu.parts.set_neurons(model, layer, len(cold), *rows, None if bias is None else bias[cold])
    thresholds = weights.spec.firing.kernel_thresholds(layer)
    model.set_firing(layer, thresholds if len(thresholds) == 1 else thresholds[cold])
