"""Predictors as GGUF files need them: of this very model, and with the neurons that are always computed.

The format and its reader are `hotcold.predictor.bundle`'s. What that reads is mapped, not loaded, so that a
layer costs memory only while it is written.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hotcold.errors import MismatchError, ShapeError
from hotcold.model.spec import ModelSpec
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle

__all__ = ["check_predictors", "hot_neurons"]


def check_predictors(
    predictors: PredictorBundle, spec: ModelSpec, fingerprint: str, where: str | Path | None = None
) -> None:
    """Refuse predictors of another shape (ShapeError) or of another model (MismatchError)."""
    got = (predictors.n_layers, predictors.d_model, predictors.d_ff)
    expected = (spec.n_layers, spec.d_model, spec.d_ff)
    if got != expected:
        what = "the predictors have the wrong (n_layers, d_model, d_ff)"
        raise ShapeError(what, where=where, got=got, expected=expected)
    if predictors.model_fingerprint != fingerprint:
        raise MismatchError(
            "predictors of another model", where=where, got=predictors.model_fingerprint[:12],
            expected=fingerprint[:12], fix="train them on traces of this model",
        )  # fmt: skip


def hot_neurons(layer: LayerPredictor, frequency: float) -> np.ndarray:
    """The neurons that fired on at least this share of the tokens: ascending int32 indices.

    None are where it is not known how often they fired.
    """
    if layer.firing_frequency is None:
        return np.empty(0, np.int32)
    return np.flatnonzero(layer.firing_frequency >= frequency).astype(np.int32)
