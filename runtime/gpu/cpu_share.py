"""What one sequence of a hybrid engine has the CPU compute: cold neurons, and whole layers.

It has the keys and values of these layers, and counts what it computes.
"""

from __future__ import annotations

import numpy as np

from hotcold.runtime.cpu import _cpu
from hotcold.runtime.gpu.cpu_side import CpuSide

__all__ = ["MAX_BLOCK", "CpuShare"]

MAX_BLOCK = 64  # tokens that the native engine computes together
_NO_MASKS = np.empty(0, np.uint64)  # one token wants whatever is listed


class CpuShare:
    """A sequence's share of work on the weights of `side`."""

    def __init__(self, side: CpuSide, n_ctx: int) -> None:
        self.side, self.first, self.n_cold, self.any_layers = side, side.first, side.n_cold, side.any_layers
        self._native = _cpu.Sequence(side.model, n_ctx)

    def run_layers(self, x: np.ndarray, position: int) -> None:
        """The layers from `first` on, on the residual stream x float32 [tokens, d_model], in place."""
        _cpu.parts.run_layers(self._native, x, self.first, self.side.n_layers, position)

    def cold(self, layer: int, normed: np.ndarray, wanted: np.ndarray, y: np.ndarray) -> tuple[int, int]:
        """y float32 [tokens, d_model] = what a layer's wanted cold neurons add; how many ran, and fired.

        `normed` float32 [tokens, d_model] is the FFN's input, `wanted` bool [tokens, n_cold].
        """
        index = np.flatnonzero(wanted.any(0)).astype(np.int32)
        masks = _token_masks(wanted[:, index]) if len(wanted) > 1 else _NO_MASKS
        return int(wanted.sum()), _cpu.parts.run_neurons(self._native, layer, normed, index, masks, y)

    def cold_of_one(self, layer: int, normed: np.ndarray, index: np.ndarray, y: np.ndarray) -> None:
        """`cold` for one token: y [1, d_model] = what the listed ones add, `index` being int32 [n]."""
        _cpu.parts.run_neurons(self._native, layer, normed, index, _NO_MASKS, y)

    def stats(self) -> np.ndarray:
        """int64 [3, n_layers]: fired, predicted, missed, since the last reset."""
        counts = self._native.stats()
        return np.array([counts[name] for name in ("fired", "predicted", "missed")], np.int64)

    def inputs(self) -> dict[str, tuple[int, int]]:
        """By site where inputs may be left out: how many the layers here had, and how many counted."""
        counts = self._native.stats()["inputs"]
        return {site: (seen, kept) for site, (_, seen, kept) in counts.items() if seen}

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._native.reset_stats()

    def set_audit(self, on: bool) -> None:
        """Whether layers that are here as a whole count what their predictors missed."""
        self._native.audit = on


def _token_masks(wanted: np.ndarray) -> np.ndarray:
    """uint64 per column of bool [tokens, n]: bit t for token t."""
    bits = np.uint64(1) << np.arange(len(wanted), dtype=np.uint64)
    return (wanted * bits[:, None]).sum(0, dtype=np.uint64)
