"""What decides whether the neurons of a layer fire, out of a checkpoint: the norm before the FFN, and the
gates.

One layer at a time and without torch, so that a model need not fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hotcold.model.checkpoint import open_checkpoint, resolve
from hotcold.model.spec import ModelSpec
from hotcold.model.weights import CheckpointWeights, check_weights

__all__ = ["Gates", "LayerGates"]


@dataclass(frozen=True, slots=True)
class LayerGates:
    """`weight · normed(x)`, x being the residual stream. In a model without gates it is up that decides."""

    weight: np.ndarray  # float32 [d_ff, d_model]
    norm_weight: np.ndarray  # [d_model]
    norm_bias: np.ndarray | None  # of a LayerNorm; None: RMSNorm
    norm_eps: float

    def normed(self, x: np.ndarray) -> np.ndarray:
        """The FFN's input, float32 [tokens, d_model]."""
        x = x.astype(np.float32)
        if self.norm_bias is not None:
            x = x - x.mean(axis=1, keepdims=True)
        scale = np.sqrt(np.square(x).mean(axis=1, keepdims=True) + np.float32(self.norm_eps))
        normed = x / scale * self.norm_weight
        return normed if self.norm_bias is None else normed + self.norm_bias


class Gates:
    """The gates of all layers of a model; raises as `load_model` where there is none."""

    def __init__(self, model: str) -> None:
        source = open_checkpoint(resolve(model))
        self.spec = ModelSpec.from_config(source.config)
        check_weights(source, self.spec)
        self._weights = CheckpointWeights(self.spec, source.load, source.path)

    def layer(self, number: int) -> LayerGates:
        """Those of one layer, loaded."""
        return LayerGates(
            self._weights.floats("gate", number),
            self._weights.floats("ffn_norm", number),
            self._weights.vector("ffn_norm", number, "bias"),
            self.spec.norm_eps,
        )
