"""The CPU's half of a hybrid engine: the cold neurons of device layers, and layers that are here as a whole.

It is the CPU engine's own native model, of which only these parts are loaded.
"""

from __future__ import annotations

import numpy as np

from hotcold.errors import UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.cpu.load import Source, load_layers, new_model
from hotcold.runtime.placement.plan import Placement
from hotcold.runtime.shape import ModelShape

__all__ = ["MAX_BLOCK", "CpuSide"]

MAX_BLOCK = 64  # tokens that the native engine computes together
_NO_MASKS = np.empty(0, np.uint64)  # one token wants whatever is listed


class CpuSide:
    """What `placement` leaves to the CPU: `n_cold` neurons per layer. `converted`: types that became F16."""

    def __init__(self, file: GGUFFile, placement: Placement, mode: str, n_threads: int, n_ctx: int) -> None:
        """Pack these weights. Raises what loading the CPU engine raises."""
        shape = ModelShape.read(file)
        whole = [i for i, layer in enumerate(placement.layers) if not layer.on_device]
        self.first = whole[0] if whole else shape.n_layers
        self.n_layers, self.d_model = shape.n_layers, shape.d_model
        self.n_cold = [layer.d_ff - len(layer.hot) if layer.on_device else 0 for layer in placement.layers]
        source = Source(file)
        try:
            # The cache is that of layers that are here as a whole.
            model = new_model(file, shape, mode, n_threads, n_ctx if whole else 1)
            load_layers(model, source, file, shape, mode, whole)
            for i, layer in enumerate(placement.layers):
                if self.n_cold[i]:
                    _load_cold(model, source, shape, i, layer.cold)
        except ValueError as error:
            raise UnsupportedError(str(error), where=file.path) from error
        self._model, self.converted = model, source.converted

    @property
    def any_layers(self) -> bool:
        """Whether there are layers here as a whole."""
        return self.first < self.n_layers

    def run_layers(self, x: np.ndarray, position: int) -> None:
        """The layers from `first` on, on the residual stream x float32 [tokens, d_model], in place."""
        _cpu.parts.run_layers(self._model, x, self.first, self.n_layers, position)

    def cold(self, layer: int, normed: np.ndarray, wanted: np.ndarray, y: np.ndarray) -> tuple[int, int]:
        """y float32 [tokens, d_model] = what a layer's wanted cold neurons add; how many ran, and fired.

        `normed` float32 [tokens, d_model] is the FFN's input, `wanted` bool [tokens, n_cold].
        """
        index = np.flatnonzero(wanted.any(0)).astype(np.int32)
        masks = _token_masks(wanted[:, index]) if len(wanted) > 1 else _NO_MASKS
        return int(wanted.sum()), _cpu.parts.run_neurons(self._model, layer, normed, index, masks, y)

    def cold_of_one(self, layer: int, normed: np.ndarray, index: np.ndarray, y: np.ndarray) -> None:
        """`cold` for one token: y [1, d_model] = what the listed ones add, `index` being int32 [n]."""
        _cpu.parts.run_neurons(self._model, layer, normed, index, _NO_MASKS, y)

    def stats(self) -> np.ndarray:
        """int64 [3, n_layers]: fired, predicted, missed, since the last reset."""
        counts = self._model.stats()
        return np.array([counts[name] for name in ("fired", "predicted", "missed")], np.int64)

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._model.reset_stats()

    def set_audit(self, on: bool) -> None:
        """Whether layers that are here as a whole count what their predictors missed."""
        self._model.audit = on


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
    thresholds = shape.firing.kernel_thresholds(layer)
    model.set_firing(layer, thresholds if len(thresholds) == 1 else thresholds[cold])


def _token_masks(wanted: np.ndarray) -> np.ndarray:
    """uint64 per column of bool [tokens, n]: bit t for token t."""
    bits = np.uint64(1) << np.arange(len(wanted), dtype=np.uint64)
    return (wanted * bits[:, None]).sum(0, dtype=np.uint64)
