"""A predictor bundle as the exporter reads it: checked against the model, then layer by layer.

A 7B model's predictors are gigabytes, so nothing is loaded before its turn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hotcold.convert.architectures import ModelSpec
from hotcold.convert.safetensors_read import SafetensorsFile, read_json
from hotcold.errors import FormatError, MismatchError, ShapeError

__all__ = ["Predictors"]

_FORMAT, _VERSION = "hotcold-predictor", 1


class Predictors:
    """One low-rank MLP per layer: neuron i is predicted active iff `(fc2 · relu(fc1 · x))[i] >= threshold`.

    Raises InputError or FormatError where the files cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        config_path = self.path / "config.json"
        config = read_json(config_path)
        for key, expected in (("format", _FORMAT), ("version", _VERSION)):
            if config.get(key) != expected:
                got = config.get(key)
                raise FormatError(
                    "not a predictor bundle", where=config_path, field=key, got=got, expected=expected
                )
        self.model_fingerprint: str = str(config.get("model_fingerprint"))
        self.shape = tuple(config.get(key) for key in ("n_layers", "d_model", "d_ff"))
        self.thresholds = [float(value) for value in _numbers(config, "thresholds", config_path)]
        self.ranks = [int(value) for value in _numbers(config, "ranks", config_path)]
        self._tensors = SafetensorsFile(self.path / "model.safetensors")

    def check(self, spec: ModelSpec, fingerprint: str) -> None:
        """Refuse predictors of another shape (ShapeError) or of another model (MismatchError)."""
        expected = (spec.n_layers, spec.d_model, spec.d_ff)
        if self.shape != expected:
            what = "predictors of another shape (n_layers, d_model, d_ff)"
            raise ShapeError(what, where=self.path, got=self.shape, expected=expected)
        if self.model_fingerprint != fingerprint:
            raise MismatchError(
                "predictors of another model", where=self.path, got=self.model_fingerprint[:12],
                expected=fingerprint[:12], fix="train them on traces of this very model",
            )  # fmt: skip
        for key in ("thresholds", "ranks"):
            if len(getattr(self, key)) != spec.n_layers:
                got = len(getattr(self, key))
                raise ShapeError(f"{key} per layer", where=self.path, got=got, expected=spec.n_layers)
        for layer in range(spec.n_layers):
            self._check_layer(layer, spec)

    def _check_layer(self, layer: int, spec: ModelSpec) -> None:
        rank = self.ranks[layer]
        shapes = {
            "fc1.weight": (rank, spec.d_model),
            "fc2.weight": (spec.d_ff, rank),
            "firing_frequency": (spec.d_ff,),
        }
        for name, expected in shapes.items():
            got = self._tensors.shape(f"layers.{layer}.{name}")
            if got != expected:
                raise ShapeError(f"layers.{layer}.{name}", where=self.path, got=got, expected=expected)

    def fc1(self, layer: int) -> np.ndarray:
        """float32 [rank, d_model]"""
        return self._tensors.load(f"layers.{layer}.fc1.weight")

    def fc2(self, layer: int) -> np.ndarray:
        """float32 [d_ff, rank]"""
        return self._tensors.load(f"layers.{layer}.fc2.weight")

    def files(self) -> list[Path]:
        """The files of the bundle, for copying."""
        names = ("config.json", "model.safetensors", "README.md")
        return [self.path / name for name in names if (self.path / name).is_file()]

    def hot(self, layer: int, frequency: float) -> np.ndarray:
        """The neurons that fired on at least this share of the tokens: ascending int32 indices."""
        fired = self._tensors.load(f"layers.{layer}.firing_frequency")
        return np.flatnonzero(fired >= frequency).astype(np.int32)


def _numbers(config: dict, key: str, path: Path) -> list[float]:
    values = config.get(key)
    if (
        not isinstance(values, list)
        or not values
        or not all(isinstance(v, int | float) and v == v for v in values)
    ):
        raise FormatError("bad value", where=path, field=key, got=values, expected="a list of numbers")
    return values
