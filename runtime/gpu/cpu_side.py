"""The CPU's half of a hybrid engine: the cold neurons of device layers, and layers that are here as a whole.

It is the CPU engine's own native model, of which only these parts are loaded. What a sequence does with it is
in cpu_share.py.
"""

from __future__ import annotations

import numpy as np

from hotcold.errors import UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.cpu.load import Source, load_layers, new_model
from hotcold.runtime.placement.plan import Placement
from hotcold.runtime.shape import ModelShape, activation_thresholds

__all__ = ["CpuSide"]


class CpuSide:
    """What `placement` leaves to the CPU: `n_cold` neurons per layer. `converted`: types that became F16."""

    def __init__(self, file: GGUFFile, placement: Placement, mode: str, n_threads: int) -> None:
        """Pack these weights. Raises what loading the CPU engine raises."""
        shape = ModelShape.read(file)
        whole = [i for i, layer in enumerate(placement.layers) if not layer.on_device]
        self.first = whole[0] if whole else shape.n_layers
        self.n_layers, self.d_model = shape.n_layers, shape.d_model
        self.n_cold = [layer.d_ff - len(layer.hot) if layer.on_device else 0 for layer in placement.layers]
        source = Source(file)
        try:
            model = new_model(file, shape, mode, n_threads)
            load_layers(model, source, file, shape, mode, whole)
            for i, layer in enumerate(placement.layers):
                if self.n_cold[i]:
                    _load_cold(model, source, shape, i, layer.cold)
            for i, threshold in enumerate(activation_thresholds(file, shape.n_layers)):
                model.set_activation_threshold(i, threshold)
        except ValueError as error:
            raise UnsupportedError(str(error), where=file.path) from error
        self.model, self.converted = model, source.converted

    @property
    def any_layers(self) -> bool:
        """Whether there are layers here as a whole."""
        return self.first < self.n_layers


def _load_cold(model: _cpu.Model, source: Source, shape: ModelShape, layer: int, cold: np.ndarray) -> None:
    """The rows of neurons; without gates, up's are in the gate's place, as they decide, and have a bias."""
    block = f"blk.{layer}"

    def rows(name: str) -> tuple[np.ndarray, int]:
        kind, data = source.packable(f"{block}.{name}.weight", shape.d_ff, shape.d_model)
        return np.ascontiguousarray(data.reshape(shape.d_ff, -1)[cold]).reshape(-1), kind

    up, down, name = rows("ffn_up"), rows("ffn_down_t"), f"{block}.ffn_up.bias"
    gate, up = (rows("ffn_gate"), up) if shape.form.gated else (up, (None, 0))
    bias = source.vector(name, shape.d_ff)[cold] if name in source and not shape.form.gated else None
    _cpu.parts.set_neurons(model, layer, len(cold), *gate, *up, *down, bias)
