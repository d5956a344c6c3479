"""The predictor bundle: a folder that looks like a Hugging Face repository.

`config.json`, `model.safetensors` and a model card. numpy only, so that a runtime reads it without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hotcold import storage
from hotcold.errors import FormatError, InputError
from hotcold.predictor.card import model_card
from hotcold.predictor.metrics import LayerMetrics
from hotcold.predictor.parsing import check_header, check_tensor, from_fields, parse_json, read_tensors

__all__ = ["LayerPredictor", "PredictorBundle", "raw_logits"]

_FORMAT, _VERSION = "hotcold-predictor", 1
_PARTS = ("fc1.weight", "fc2.weight", "firing_frequency")


def raw_logits(fc1: np.ndarray, fc2: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`fc2 · relu(fc1 · x)` float32 [tokens, d_ff] of the residual stream x [tokens, d_model]."""
    return np.maximum(x.astype(np.float32) @ fc1.T, 0) @ fc2.T


@dataclass(frozen=True, slots=True)
class LayerPredictor:
    """The predictor of one layer. A neuron is predicted active iff `fc2 · relu(fc1 · x) >= threshold`."""

    fc1: np.ndarray  # float32 [rank, d_model]
    fc2: np.ndarray  # float32 [d_ff, rank]
    firing_frequency: np.ndarray  # float32 [d_ff], share of training tokens on which a neuron fired
    threshold: float  # on raw logits
    metrics: LayerMetrics  # on the held-out tokens that the threshold was chosen on

    @property
    def rank(self) -> int:
        """Width of the hidden layer."""
        return self.fc1.shape[0]

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Raw logits float32 [tokens, d_ff] of the residual stream x [tokens, d_model]."""
        return raw_logits(self.fc1, self.fc2, x)

    def tensors(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Its arrays by name."""
        return {prefix + name: array for name, array in zip(_PARTS, self._arrays(), strict=True)}

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.fc1, self.fc2, self.firing_frequency


@dataclass(frozen=True, slots=True)
class _Config:
    """`config.json`, checked."""

    model_fingerprint: str
    n_layers: int
    d_model: int
    d_ff: int
    ranks: list
    thresholds: list
    target_recall: float
    metrics: list
    training: dict


@dataclass(slots=True)
class PredictorBundle:
    """One predictor per FFN layer, of the model with this fingerprint."""

    model_fingerprint: str
    layers: list[LayerPredictor]
    target_recall: float
    training: dict[str, Any] = field(default_factory=dict)  # how they were made, for people

    @property
    def n_layers(self) -> int:
        """FFN layers of the model."""
        return len(self.layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.layers[0].fc1.shape[1]

    @property
    def d_ff(self) -> int:
        """Neurons per layer."""
        return self.layers[0].fc2.shape[0]

    @property
    def ranks(self) -> list[int]:
        """Rank of each layer's predictor."""
        return [layer.rank for layer in self.layers]

    @property
    def thresholds(self) -> list[float]:
        """Threshold of each layer, on raw logits."""
        return [layer.threshold for layer in self.layers]

    @property
    def metrics(self) -> list[LayerMetrics]:
        """Metrics of each layer on held-out tokens."""
        return [layer.metrics for layer in self.layers]

    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            "format": _FORMAT, "version": _VERSION, "model_fingerprint": self.model_fingerprint,
            "n_layers": self.n_layers, "d_model": self.d_model, "d_ff": self.d_ff,
            "ranks": self.ranks, "thresholds": self.thresholds, "target_recall": self.target_recall,
            "metrics": [metrics.to_json() for metrics in self.metrics], "training": self.training,
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the folder, which appears as a whole. StorageError if the disk does not take it."""
        tensors: dict[str, np.ndarray] = {}
        for number, layer in enumerate(self.layers):
            tensors |= layer.tensors(f"layers.{number}.")
        with storage.atomic_directory(path) as folder:
            storage.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
            storage.write_json(folder / "config.json", self.config())
            storage.write_bytes(folder / "README.md", model_card(self).encode())

    @classmethod
    def load(cls, path: str | Path) -> PredictorBundle:
        """Read a folder. InputError if there is none, FormatError naming file and field if it is broken."""
        path = Path(path)
        config = read_config(path)
        file = path / "model.safetensors"
        if not file.is_file():
            raise InputError(
                "no model.safetensors in this folder", where=path, fix="train the predictors again"
            )
        tensors = read_tensors(file.read_bytes(), file)
        layers = [_layer(config, number, tensors, file) for number in range(config.n_layers)]
        return cls(config.model_fingerprint, layers, config.target_recall, config.training)

    save_pretrained = save
    from_pretrained = load


def read_config(folder: Path) -> _Config:
    """Read `config.json` of a bundle; InputError where there is none, FormatError where it is broken."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            "no predictors here (no config.json)", where=folder, fix="make them with train-predictors"
        )
    values = parse_json(path.read_bytes(), path)
    check_header(values, path, _FORMAT, _VERSION)
    config = from_fields(_Config, {"training": {}} | values, path)
    for name in ("n_layers", "d_model", "d_ff"):
        if getattr(config, name) < 1:
            raise FormatError("must be positive", where=path, field=name, got=getattr(config, name))
    for name, kind in (("ranks", int), ("thresholds", float), ("metrics", dict)):
        _check_list(getattr(config, name), config.n_layers, kind, path, name)
    return config


def _check_list(values: list[Any], length: int, kind: type, path: Path, name: str) -> None:
    if len(values) != length:
        raise FormatError("wrong length", where=path, field=name, got=len(values), expected=length)
    for number, value in enumerate(values):
        if type(value) is not kind:
            raise FormatError(
                "wrong type", where=path, field=f"{name}[{number}]", got=repr(value), expected=kind.__name__
            )


def _layer(config: _Config, number: int, tensors: Mapping[str, np.ndarray], file: Path) -> LayerPredictor:
    rank, prefix = config.ranks[number], f"layers.{number}."
    shapes = ((rank, config.d_model), (config.d_ff, rank), (config.d_ff,))
    arrays = [
        check_tensor(tensors, prefix + name, shape, np.dtype(np.float32), file)
        for name, shape in zip(_PARTS, shapes, strict=True)
    ]
    metrics = from_fields(
        LayerMetrics, config.metrics[number], file.with_name("config.json"), f"metrics[{number}]."
    )
    return LayerPredictor(*arrays, config.thresholds[number], metrics)
