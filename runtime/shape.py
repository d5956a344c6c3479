"""Sizes, constants and structure of a model, from the metadata of its GGUF file. No torch, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from hotcold.convert.forms import FORMS, WINDOWS, Form
from hotcold.convert.gguf_read import GGUFFile
from hotcold.convert.rope import Rope
from hotcold.convert.rope_factors import read_rope, rope_divisors
from hotcold.errors import FormatError, UnsupportedError

__all__ = ["ModelShape", "Predictor", "activation_thresholds", "read_predictors"]

ACTIVATIONS = ("relu", "fatrelu", "drelu", "silu", "gelu")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes and constants of a model. `form` is the structure that its architecture implies.

    `rope_frequencies` float32 [head_dim / 2] (empty where positions are learned) are in radians per position,
    `rope_scale` multiplies sine and cosine; `windows` per layer how many positions a query sees, 0 being all.
    """

    form: Form
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    norm_eps: float
    rope_frequencies: np.ndarray
    rope_scale: float
    windows: list[int]
    activation: str

    @classmethod
    def read(cls, file: GGUFFile) -> Self:
        """Raises UnsupportedError for an unknown architecture or activation, FormatError for missing keys."""
        arch = file.require("general.architecture", str)
        if arch not in FORMS:
            known = ", ".join(FORMS)
            raise UnsupportedError("unknown model architecture", where=file.path, got=arch, expected=known)
        form, key = FORMS[arch], _Keys(file, arch)
        d_model, n_heads, n_layers = key("embedding_length"), key("attention.head_count"), key("block_count")
        if "token_embd.weight" not in file.tensors:
            raise FormatError("missing tensor", where=file.path, field="token_embd.weight")
        head_dim = key("attention.key_length", d_model // max(n_heads, 1))
        rope, frequencies = Rope(), np.empty(0, np.float32)
        if not form.positions:
            rope, divisors = read_rope(file, arch), rope_divisors(file, head_dim)
            frequencies = rope.frequencies(head_dim)
            frequencies = frequencies if divisors is None else frequencies / divisors
        return cls(
            form=form,
            n_layers=n_layers,
            d_model=d_model,
            d_ff=key("feed_forward_length"),
            n_heads=n_heads,
            n_kv_heads=key("attention.head_count_kv", n_heads),
            head_dim=head_dim,
            n_vocab=file.tensors["token_embd.weight"].shape[0],
            norm_eps=key(form.eps_key, form.default_eps),
            rope_frequencies=frequencies,
            rope_scale=rope.attention_factor,
            windows=_per_layer(file, WINDOWS, n_layers, 0),
            activation=_activation(file, form),
        )


class _Keys:
    """The numbers of one architecture in a file's metadata."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self._file, self._arch = file, arch

    def __call__(self, name: str, default: Any = None) -> Any:
        key = f"{self._arch}.{name}"
        if default is not None and key not in self._file.metadata:
            return default
        return self._file.require(key, (int, float))


def _activation(file: GGUFFile, form: Form) -> str:
    """What the file says, else what llama.cpp does, or PowerInfer, whose files by neurons are ReLU models."""
    implied = form.activation
    if "blk.0.ffn_down_t.weight" in file.tensors and implied != "drelu":
        implied = "relu"
    name = file.metadata.get("hotcold.activation", implied)
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UnsupportedError("unknown activation", where=file.path, got=name, expected=known)
    return name


def _per_layer(file: GGUFFile, field: str, n_layers: int, default: float) -> list[Any]:
    values = file.metadata.get(field)
    if values is None:
        return [default] * n_layers
    if len(values) != n_layers:
        raise FormatError(
            "one value per layer", where=file.path, field=field, got=len(values), expected=n_layers
        )
    return [value.item() for value in np.asarray(values)]


def activation_thresholds(file: GGUFFile, n_layers: int) -> list[float]:
    """FATReLU thresholds per layer; 0 is plain ReLU."""
    return _per_layer(file, "hotcold.activation_thresholds", n_layers, 0.0)


@dataclass(frozen=True, slots=True)
class Predictor:
    """What the metadata says of one layer's predictor: the threshold on raw logits, and the hot neurons."""

    threshold: float
    hot: np.ndarray  # bool [d_ff]: always computed


def read_predictors(file: GGUFFile, shape: ModelShape) -> list[Predictor]:
    """One per layer. PowerInfer's own files have one threshold for all layers and no hot neurons."""
    n, d_ff = shape.n_layers, shape.d_ff
    one_for_all = float(file.metadata.get("powerinfer.sparse_threshold", 0.0))
    thresholds = _per_layer(file, "hotcold.predictor.thresholds", n, one_for_all)
    counts = _per_layer(file, "hotcold.hot.counts", n, 0)
    neurons = np.asarray(file.metadata.get("hotcold.hot.neurons", []), np.int64)
    neurons, missing = neurons[: sum(counts)], sum(counts) - len(neurons)
    if missing > 0 or (len(neurons) and not (neurons.min() >= 0 and neurons.max() < d_ff)):
        raise FormatError("hot neurons do not fit the model", where=file.path, field="hotcold.hot.neurons")
    predictors = []
    for threshold, indices in zip(thresholds, np.split(neurons, np.cumsum(counts)), strict=False):
        hot = np.zeros(d_ff, bool)
        hot[indices] = True
        predictors.append(Predictor(threshold, hot))
    return predictors
