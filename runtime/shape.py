"""Sizes and constants of a model, from the metadata of its GGUF file. No torch, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from hotcold.convert.gguf_read import GGUFFile
from hotcold.errors import FormatError, UnsupportedError

__all__ = ["ModelShape", "Predictor", "activation_thresholds", "read_predictors"]

ARCHITECTURES = ("llama", "smallthinker")
ACTIVATIONS = ("relu", "fatrelu", "drelu", "silu")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes and constants of a Llama-like model."""

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    context_length: int
    rope_base: float
    norm_eps: float
    interleaved_rope: bool
    activation: str

    @classmethod
    def read(cls, file: GGUFFile) -> Self:
        """Raises UnsupportedError for an unknown architecture or activation, FormatError for missing keys."""
        arch = file.require("general.architecture", str)
        if arch not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UnsupportedError("unknown model architecture", where=file.path, got=arch, expected=known)

        def key(name: str, default: Any = None) -> Any:
            if default is not None and f"{arch}.{name}" not in file.metadata:
                return default
            return file.require(f"{arch}.{name}", (int, float))

        d_model, n_heads = key("embedding_length"), key("attention.head_count")
        if "token_embd.weight" not in file.tensors:
            raise FormatError("missing tensor", where=file.path, field="token_embd.weight")
        return cls(
            n_layers=key("block_count"),
            d_model=d_model,
            d_ff=key("feed_forward_length"),
            n_heads=n_heads,
            n_kv_heads=key("attention.head_count_kv", n_heads),
            head_dim=key("attention.key_length", d_model // max(n_heads, 1)),
            n_vocab=file.tensors["token_embd.weight"].shape[0],
            context_length=key("context_length"),
            rope_base=key("rope.freq_base", 10000.0),
            norm_eps=key("attention.layer_norm_rms_epsilon"),
            # llama.cpp permutes q and k of `llama` files so that the pairs to be rotated are neighbours.
            interleaved_rope=arch == "llama",
            activation=_activation(file, arch),
        )


def _activation(file: GGUFFile, arch: str) -> str:
    """Stock llama.cpp hard-codes SiLU in `llama` and ReLU in `smallthinker`; PowerInfer hard-codes ReLU."""
    implied = "relu" if arch == "smallthinker" or "blk.0.ffn_down_t.weight" in file.tensors else "silu"
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
