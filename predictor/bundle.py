"""The predictor bundle: a folder that looks like a Hugging Face repository.

`config.json`, `model.safetensors` and a model card. This is the one reader of it: numpy only, so that the
exporter reads it without torch, and mapped, so that gigabytes cost memory only where they are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hotcold import storage
from hotcold.errors import FormatError, InputError
from hotcold.files.safetensors import SafetensorsFile
from hotcold.predictor.card import model_card
from hotcold.predictor.hub import downloaded, pushed
from hotcold.predictor.kinds.table import BIAS, FC1, FC2, KINDS, LOWRANK_MLP, Kind, Weights, kind_named
from hotcold.predictor.parsing import check_header, from_fields, parse_json
from hotcold.predictor.training.metrics import LayerMetrics

__all__ = ["FILES", "FREQUENCY", "LayerPredictor", "PredictorBundle"]

FILES = ("config.json", "model.safetensors", "README.md")
FREQUENCY = "firing_frequency"
_FORMAT, _VERSION = "hotcold-predictor", 2


@dataclass(frozen=True, slots=True)
class LayerPredictor:
    """The predictor of one layer. A neuron is predicted active iff its score reaches the threshold.

    What hotcold has not trained itself may lack frequency and metrics: they are None where nobody has
    measured them.
    """

    fc1: np.ndarray  # float32 [rank, d_model]
    fc2: np.ndarray  # float32 [d_ff, rank]
    threshold: float  # on raw scores
    firing_frequency: np.ndarray | None = None  # float32 [d_ff], share of training tokens it fired on
    metrics: LayerMetrics | None = None  # on test tokens, which chose nothing
    bias: np.ndarray | None = None  # float32 [d_ff], in kinds that have it
    kind: Kind = KINDS[LOWRANK_MLP]

    @property
    def rank(self) -> int:
        """Width of the hidden layer."""
        return self.fc1.shape[0]

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Raw scores float32 [tokens, d_ff] of x [tokens, d_model], which is what the kind reads."""
        return self.kind.scores(Weights(self.fc1, self.fc2, self.bias), x)

    def weights(self) -> dict[str, np.ndarray]:
        """Its matrices, and the bias if there is one, by name."""
        arrays = {FC1: self.fc1, FC2: self.fc2, BIAS: self.bias}
        return {name: array for name, array in arrays.items() if array is not None}

    def tensors(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Its arrays by name."""
        frequency = {} if self.firing_frequency is None else {FREQUENCY: self.firing_frequency}
        return {prefix + name: array for name, array in (self.weights() | frequency).items()}


@dataclass(frozen=True, slots=True)
class _Config:
    """`config.json`, checked."""

    kind: str
    model_fingerprint: str
    n_layers: int
    d_model: int
    d_ff: int
    ranks: list
    thresholds: list
    target_recall: float
    metrics: list
    training: dict

    def layer_metrics(self, path: Path) -> list[LayerMetrics | None]:
        """One entry per layer; FormatError names a field of the file `path` that is wrong."""
        parsed = [from_fields(LayerMetrics, m, path, f"metrics[{n}].") for n, m in enumerate(self.metrics)]
        return parsed or [None] * self.n_layers


@dataclass(slots=True)
class PredictorBundle:
    """One predictor per FFN layer, all of one kind, of the model with this fingerprint."""

    model_fingerprint: str
    layers: list[LayerPredictor]
    target_recall: float = 0.0  # 0: the thresholds were not chosen for one
    training: dict[str, Any] = field(default_factory=dict)  # how they were made, for people
    path: Path | None = field(default=None, compare=False)  # where they come from, for messages

    @property
    def kind(self) -> Kind:
        """What they compute."""
        return self.layers[0].kind

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
        """Threshold of each layer, on raw scores."""
        return [layer.threshold for layer in self.layers]

    @property
    def metrics(self) -> list[LayerMetrics]:
        """Metrics of each layer on test tokens; none where not all were measured."""
        known = [layer.metrics for layer in self.layers if layer.metrics is not None]
        return known if len(known) == len(self.layers) else []

    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            "format": _FORMAT, "version": _VERSION, "kind": self.kind.name,
            "model_fingerprint": self.model_fingerprint,
            "n_layers": self.n_layers, "d_model": self.d_model, "d_ff": self.d_ff,
            "ranks": self.ranks, "thresholds": self.thresholds, "target_recall": self.target_recall,
            "metrics": [metrics.to_json() for metrics in self.metrics], "training": self.training,
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the folder, which appears as a whole.

        StorageError if the disk does not take it, or if something else than such a folder is there.
        """
        with storage.atomic_directory(path, "predictors") as folder:
            self.write_files(folder)

    def write_files(self, folder: Path) -> None:
        """Write the `FILES` into a folder that is being made, such as that of a whole bundle."""
        tensors: dict[str, np.ndarray] = {}
        for number, layer in enumerate(self.layers):
            tensors |= layer.tensors(f"layers.{number}.")
        storage.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        storage.write_json(folder / "config.json", self.config())
        storage.write_bytes(folder / "README.md", model_card(self).encode())

    @classmethod
    def load(cls, path: str | Path) -> PredictorBundle:
        """Read a folder. InputError if there is none, FormatError naming file and field if it is broken.

        Its arrays are read-only views of the file: whoever deletes or replaces that leaves them as they are.
        """
        path = Path(path)
        config = read_config(path)
        file = path / "model.safetensors"
        if not file.is_file():
            raise InputError(
                "no model.safetensors in this folder", where=path, fix="train the predictors again"
            )
        tensors = SafetensorsFile(file)
        metrics = enumerate(config.layer_metrics(path / "config.json"))
        layers = [_layer(config, number, tensors, measured) for number, measured in metrics]
        return cls(config.model_fingerprint, layers, config.target_recall, config.training, path)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> PredictorBundle:
        """Read a folder, or a repository of the Hugging Face hub when there is no such folder.

        `hub` is passed on to `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir`,
        `force_download`, `local_files_only`. Raises as `load` does, InputError where the hub has none.
        """
        return cls.load(downloaded(pretrained_model_name_or_path, FILES, **hub))

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **hub: Any
    ) -> None:
        """Write the folder and, if wished, upload it as `repo_id`, which is else the folder's name.

        `hub` is passed on to `huggingface_hub`: `token`, `private`, `commit_message`. StorageError if
        the disk does not take it, InputError if the hub does not.
        """
        self.save(save_directory)
        if push_to_hub:
            pushed(Path(save_directory), FILES, repo_id or Path(save_directory).resolve().name, **hub)


def read_config(folder: Path) -> _Config:
    """Read `config.json` of a bundle; InputError where there is none, FormatError where it is broken."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            "no predictors in this folder (no config.json)",
            where=folder,
            fix="make them with train-predictors",
        )
    return parse_config(parse_json(path.read_bytes(), path), path)


def parse_config(values: dict[str, Any], path: Path) -> _Config:
    """Check the content of a `config.json`, which is in the file `path`; FormatError names what is wrong."""
    version = check_header(values, path, _FORMAT, 1, _VERSION)
    if version == 1:
        if "kind" in values:
            raise FormatError("version 1 has no such field", where=path, field="kind", got=values["kind"])
        values["kind"] = LOWRANK_MLP
    config = from_fields(_Config, {"training": {}} | values, path)
    kind_named(config.kind, path)
    for name in ("n_layers", "d_model", "d_ff"):
        if getattr(config, name) < 1:
            raise FormatError("must be positive", where=path, field=name, got=getattr(config, name))
    for name, kind in (("ranks", int), ("thresholds", float), ("metrics", dict)):
        values = getattr(config, name)
        if values or name != "metrics":
            _check_list(values, config.n_layers, kind, path, name)
    for number, threshold in enumerate(config.thresholds):
        if threshold != threshold:
            raise FormatError("not a number", where=path, field=f"thresholds[{number}]", got=threshold)
    return config


def _check_list(values: list[Any], length: int, kind: type, path: Path, name: str) -> None:
    if len(values) != length:
        raise FormatError("wrong length", where=path, field=name, got=len(values), expected=length)
    for number, value in enumerate(values):
        if type(value) is not kind:
            raise FormatError(
                "wrong type", where=path, field=f"{name}[{number}]", got=repr(value), expected=kind.__name__
            )


def _layer(
    config: _Config, number: int, tensors: SafetensorsFile, metrics: LayerMetrics | None
) -> LayerPredictor:
    kind, prefix = KINDS[config.kind], f"layers.{number}."
    shapes = kind.shapes(config.ranks[number], config.d_model, config.d_ff)
    found = {name: tensors.floats(prefix + name, shape) for name, shape in shapes.items()}
    frequency = None
    if prefix + FREQUENCY in tensors:
        frequency = tensors.floats(prefix + FREQUENCY, (config.d_ff,))
    return LayerPredictor(
        found[FC1], found[FC2], config.thresholds[number], frequency, metrics, found.get(BIAS), kind
    )
