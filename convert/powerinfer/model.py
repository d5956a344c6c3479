"""PowerInfer's model files: GGUF v3 with the magic `PWRI`, neuron-major FFN matrices, a predictor per layer.

What differs from a dense `llama` file (PowerInfer's convert.py and its loader of sparse tensors in
llama.cpp): ffn_down is written transposed as `ffn_down_t`, so that a neuron is one row of gate, up and
down; `fc1` and `fc2` are the predictor; `output.weight` must be there even when it is the embedding;
any other tensor is an error. Other metadata is ignored there, so what PowerInfer cannot say stands
under `hotcold.`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hotcold.convert.bundle.tensor_plans import Planner
from hotcold.convert.gguf.write import TensorPlan
from hotcold.errors import FormatError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.files.quantize import dequantize
from hotcold.model.families import ARCHITECTURES, names_in
from hotcold.model.metadata import hyper_parameters
from hotcold.model.spec import ModelSpec
from hotcold.model.tensors import ROWS, Naming
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle
from hotcold.predictor.kinds.table import KIND_KEY, KINDS, kind_of_file

__all__ = [
    "MAGIC",
    "architecture_of",
    "check_in_powerinfer",
    "hot_sets",
    "predictor_thresholds",
    "runs_in_powerinfer",
    "sparse_metadata",
    "sparse_plans",
    "sparse_predictors",
]

MAGIC = "PWRI"
_DOWN_TYPES = ("F16", "Q4_0")  # PowerInfer's axpy kernels read any other type as F16: NaN or zero logits


def architecture_of(spec: ModelSpec) -> str:
    """What the sparse file calls itself. PowerInfer knows llama, bamboo (dReLU), opt and falcon."""
    llama = spec.family.sparse == "llama"
    return "bamboo" if llama and spec.activation == "drelu" and not spec.biases else spec.family.sparse


def sparse_metadata(
    spec: ModelSpec, predictors: PredictorBundle | None, hot: list[np.ndarray]
) -> dict[str, Any]:
    """Architecture, hyper-parameters, predictors and hot neurons (`hot[layer]`: ascending indices).

    PowerInfer knows one threshold for all layers; the least one keeps every neuron that ours keep. It knows
    one kind of predictor too, which is what is meant where the metadata does not name one.
    """
    architecture = architecture_of(spec)
    model = {"general.architecture": architecture, **hyper_parameters(spec, architecture)}
    if predictors is None:
        return model
    if predictors.kind.in_powerinfer:
        model["powerinfer.sparse_threshold"] = np.float32(min(predictors.thresholds))
    else:
        model[KIND_KEY] = predictors.kind.name
    return model | {
        "hotcold.predictor.thresholds": np.asarray(predictors.thresholds, np.float32),
        "hotcold.predictor.ranks": np.asarray(predictors.ranks, np.uint32),
        "hotcold.hot.counts": np.asarray([len(indices) for indices in hot], np.uint32),
        "hotcold.hot.neurons": np.concatenate(hot).astype(np.int32),
    }


def sparse_plans(planner: Planner, predictors: PredictorBundle | None) -> list[TensorPlan]:
    """All tensors of the sparse form; without predictors it serves `exact` mode alone."""
    name = architecture_of(planner.spec)
    architecture = ARCHITECTURES[name]
    plans = planner.embeddings(architecture, copy_tied=name != "opt")
    for layer in range(planner.spec.n_layers):
        plans += planner.attention(layer, architecture.naming)
        plans += planner.ffn(layer, architecture.naming, "down" + ROWS)
        plans += (
            _predictor(planner, architecture.naming, predictors.layers[layer], layer) if predictors else []
        )
    return plans


def _predictor(planner: Planner, naming: Naming, predictor: LayerPredictor, layer: int) -> list[TensorPlan]:
    return [planner.predictor(naming, name, layer, values) for name, values in predictor.weights().items()]


def sparse_predictors(file: GGUFFile, fingerprint: str) -> PredictorBundle | None:
    """The predictors of a sparse file, decoded to float32; None where it has none.

    A file of PowerInfer's converter has one threshold for all layers, or none at all, which is 0. Raises
    FormatError where a layer's predictor, or its threshold, is missing; UnsupportedError for an unknown kind.
    """
    last, kind = names_in(file)["fc1"].partition("{}")[2], kind_of_file(file)
    n_layers = sum(name.endswith(f"{last}.weight") for name in file.tensors)

    def layer(number: int, threshold: float) -> LayerPredictor:
        fc1, fc2 = (_floats(file, slot, number, "weight", 2) for slot in ("fc1", "fc2"))
        bias = _floats(file, "fc2", number, "bias", 1) if kind.bias else None
        return LayerPredictor(fc1, fc2, threshold, bias=bias, kind=kind)

    layers = [layer(*entry) for entry in enumerate(predictor_thresholds(file, n_layers))]
    training = {"converted_from": file.path.name}
    return PredictorBundle(fingerprint, layers, training=training, path=file.path) if layers else None


def check_in_powerinfer(predictors: PredictorBundle) -> None:
    """UnsupportedError for predictors that PowerInfer's files cannot hold."""
    if not predictors.kind.in_powerinfer:
        what, fix = "PowerInfer knows no such predictors", "train them with --kind, or convert to a bundle"
        known = " | ".join(kind.name for kind in KINDS.values() if kind.in_powerinfer)
        raise UnsupportedError(what, where=predictors.path, got=predictors.kind.name, expected=known, fix=fix)


def predictor_thresholds(file: GGUFFile, n_layers: int) -> list[float]:
    """One per layer, on raw logits. FormatError where the metadata does not give that."""
    one_for_all = 0.0
    if "powerinfer.sparse_threshold" in file.metadata:
        one_for_all = float(file.require("powerinfer.sparse_threshold", float))
    field = "hotcold.predictor.thresholds"
    if field not in file.metadata:
        return [one_for_all] * n_layers
    values = file.require(field, np.ndarray)
    if len(values) != n_layers:
        raise FormatError(
            "one value per layer", where=file.path, field=field, got=len(values), expected=n_layers
        )
    return [float(value) for value in values]


def hot_sets(file: GGUFFile, n_layers: int) -> list[np.ndarray]:
    """The indices of the neurons of each layer that are always computed; none in a file of PowerInfer's own.

    FormatError where counts and indices do not fit each other.
    """
    if "hotcold.hot.counts" not in file.metadata:
        return [np.empty(0, np.int32)] * n_layers
    counts = file.require("hotcold.hot.counts", np.ndarray).astype(np.int64)
    neurons = file.require("hotcold.hot.neurons", np.ndarray)
    if len(counts) != n_layers or (counts < 0).any() or counts.sum() != len(neurons):
        got, expected = f"{len(counts)} layers, {counts.sum()} neurons", f"{n_layers}, {len(neurons)}"
        raise FormatError(
            "counts of hot neurons", where=file.path, field="hotcold.hot.counts", got=got, expected=expected
        )
    return np.split(neurons, np.cumsum(counts)[:-1])


def _floats(file: GGUFFile, slot: str, layer: int, part: str, n_dimensions: int) -> np.ndarray:
    name = f"{names_in(file)[slot].format(layer)}.{part}"
    tensor = file.tensors.get(name)
    if tensor is None or len(tensor.shape) != n_dimensions:
        what = "not a matrix" if n_dimensions == 2 else "not a vector"
        raise FormatError("missing tensor" if tensor is None else what, where=file.path, field=name)
    return dequantize(tensor)


def runs_in_powerinfer(spec: ModelSpec, type_name: str) -> bool:
    """Whether PowerInfer itself computes it rightly.

    It wants one of its architectures and its ReLU, head_dim · n_heads = d_model, F16 or Q4_0, and has neither
    sliding windows nor Llama 3's rope scaling nor rules for inputs.
    """
    architecture, biased = architecture_of(spec), bool(spec.biases) and spec.structure.gated
    known = architecture in ("llama", "bamboo", "opt", "falcon") and not biased
    firing = "relu" if spec.activation == "fatrelu" and not spec.firing.highest else spec.activation
    plain = firing == ("drelu" if architecture == "bamboo" else "relu")
    positions = not any(spec.windows) and not (spec.rope and spec.rope.kind == "llama3")
    fits = spec.head_dim * spec.n_heads == spec.d_model and type_name in _DOWN_TYPES
    return known and spec.is_sparse and plain and positions and fits and not spec.inputs
