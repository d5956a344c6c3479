"""The traces of one layer as a trainer takes them: some rows at a time, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hotcold.errors import InputError
from hotcold.model.gates import LayerGates
from hotcold.text import PARTS, Part

__all__ = ["LayerData", "chunks"]

_TOKENS = 4096  # whose logits, labels and their copies are held at a time


@dataclass(frozen=True, slots=True)
class LayerData:
    """The traces of one layer, and which part each token is of."""

    x: np.ndarray  # float16 [tokens, d_model], the residual stream
    active: np.ndarray  # uint8 [tokens, ceil(d_ff / 8)]
    part: np.ndarray  # uint8 [tokens], an index into `hotcold.text.PARTS`
    d_ff: int
    starts: np.ndarray | None = None  # bool [tokens]: see `choose_threshold`
    gates: LayerGates | None = None  # of kinds that need the model

    def __post_init__(self) -> None:
        for part in PARTS:
            if not self.rows(part).size:
                raise InputError(f"the traces hold no {part} tokens", fix="collect traces of more text")

    def rows(self, part: Part) -> np.ndarray:
        """The tokens of a part, ascending."""
        return np.flatnonzero(self.part == PARTS.index(part))

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """Which neurons fired, uint8 0 or 1 [rows, d_ff]."""
        return np.unpackbits(self.active[rows], axis=1, count=self.d_ff, bitorder="little")

    def inputs(self, rows: np.ndarray, *, normed: bool) -> np.ndarray:
        """The residual stream or, with `normed`, what the FFN's norm makes of it; float32 [rows, d_model]."""
        if normed and self.gates is None:
            raise ValueError("only the model knows its norm")
        return self.gates.normed(self.x[rows]) if normed and self.gates else self.x[rows].astype(np.float32)

    def firing_frequency(self) -> np.ndarray:
        """Share of training tokens on which each neuron fired, float32 [d_ff]."""
        counts, rows = np.zeros(self.d_ff), self.rows("train")
        for chunk in chunks(rows):
            counts += self.labels(chunk).sum(axis=0)
        return (counts / len(rows)).astype(np.float32)


def chunks(rows: np.ndarray, size: int | None = None) -> Iterator[np.ndarray]:
    """Consecutive pieces of `rows`, of `size` or of as many tokens as are held at a time."""
    size = size or _TOKENS
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
