"""Sizes, constants and structure of a model, from the metadata of its GGUF file. No torch, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from hotcold.errors import FormatError, InputError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model.firing import FiringRule
from hotcold.model.forms import FORMS, Form, read_windows, vocabulary_size
from hotcold.model.rope import Rope
from hotcold.model.rope_factors import check_pairs, read_rope, rope_divisors
from hotcold.progress import log
from hotcold.runtime.layer_tensors import check_layers_alike

__all__ = [
    "ModelShape",
    "Predictor",
    "check_context",
    "check_positions",
    "read_predictors",
]

_MAX_LAYERS = 1 << 12  # lists are made of that length before any weight is looked at
_MAX_HEADS, _MAX_HEAD, _MAX_WIDTH = 1 << 10, 1 << 12, 1 << 20


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
    firing: FiringRule

    @classmethod
    def read(cls, file: GGUFFile) -> Self:
        """Raises UnsupportedError for an unknown architecture or activation, FormatError for missing keys.

        FormatError too for tensors that some layers have and some have not.
        """
        arch = file.require("general.architecture", str)
        if arch not in FORMS:
            known = ", ".join(FORMS)
            raise UnsupportedError("unknown model architecture", where=file.path, got=arch, expected=known)
        form, key = FORMS[arch], _Keys(file, arch)
        d_model, n_heads = key.count("embedding_length"), key.count("attention.head_count", most=_MAX_HEADS)
        n_layers = key.count("block_count", most=_MAX_LAYERS)
        d_ff, n_vocab = key.count("feed_forward_length", most=_MAX_WIDTH), vocabulary_size(file)
        head_dim = key.count("attention.key_length", max(d_model // n_heads, 1), _MAX_HEAD)
        rope, frequencies = Rope(), np.empty(0, np.float32)
        if not form.positions:
            check_pairs(file, head_dim)
            rope, divisors = read_rope(file, arch), rope_divisors(file, head_dim)
            frequencies = rope.frequencies(head_dim)
            frequencies = frequencies if divisors is None else frequencies / divisors
        shape = cls(
            form=form,
            n_layers=n_layers,
            d_model=d_model,
            d_ff=d_ff,
            n_heads=n_heads,
            n_kv_heads=key.count("attention.head_count_kv", n_heads, _MAX_HEADS),
            head_dim=head_dim,
            n_vocab=n_vocab,
            norm_eps=key.number(form.eps_key, form.default_eps, most=1.0),
            rope_frequencies=frequencies,
            rope_scale=rope.attention_factor,
            windows=read_windows(file, n_layers) or [0] * n_layers,
            firing=FiringRule.from_gguf(file, form.activation, n_layers, d_ff, gated=form.gated),
        )
        check_layers_alike(file, n_layers)
        return shape


def check_context(file: GGUFFile, shape: ModelShape, n_ctx: int) -> None:
    """Raise InputError for more context than the model has learned positions for; say where it is more than
    it was trained on."""
    check_positions(file, f"{shape.form.positions}.weight", shape.form.first_position, n_ctx)
    trained = file.find(f"{file.require('general.architecture', str)}.context_length", int, n_ctx)
    if n_ctx > trained:
        log(f"{file.path.name}: a context of {n_ctx} tokens, where the model was trained on {trained}")


def check_positions(file: GGUFFile, table: str, first: int, n_ctx: int) -> None:
    """Raise InputError for a longer context than the rows of `table`, whose row `first` is position 0."""
    if table in file.tensors and n_ctx > (most := file.tensors[table].shape[0] - first):
        what, limit = "the model has no positions for so long a context", f"at most {most}"
        raise InputError(what, where=file.path, got=n_ctx, expected=limit, fix="lower it with -c")


class _Keys:
    """The numbers of one architecture in a file's metadata."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self._file, self._arch = file, arch

    def number(self, name: str, default: float | None, most: float) -> float:
        """A number from 0 to `most`."""
        key, kinds = f"{self._arch}.{name}", (int, float)
        value = self._file.require(key, kinds) if default is None else self._file.find(key, kinds, default)
        if not 0 <= value <= most:
            raise FormatError(
                "bad value", where=self._file.path, field=key, got=value, expected=f"0 to {most:g}"
            )
        return float(value)

    def count(self, name: str, default: int | None = None, most: int = (1 << 31) - 1) -> int:
        """A positive integer, at most `most`."""
        return self._file.count(f"{self._arch}.{name}", default, most)


def _per_layer(file: GGUFFile, field: str, n_layers: int, default: float) -> list[Any]:
    values = file.find(field, np.ndarray)
    if values is None:
        return [default] * n_layers
    if len(values) != n_layers:
        raise FormatError(
            "one value per layer", where=file.path, field=field, got=len(values), expected=n_layers
        )
    if np.isnan(values).any():  # infinite ones say that all or none fire
        raise FormatError("not a number", where=file.path, field=field, got=values.tolist())
    return values.tolist()


@dataclass(frozen=True, slots=True)
class Predictor:
    """What the metadata says of one layer's predictor: the threshold on raw logits, and the hot neurons."""

    threshold: float
    hot: np.ndarray  # bool [d_ff]: always computed


def read_predictors(file: GGUFFile, shape: ModelShape) -> list[Predictor]:
    """One per layer. PowerInfer's own files have one threshold for all layers and no hot neurons."""
    n, one_for_all = shape.n_layers, file.find("powerinfer.sparse_threshold", float, 0.0)
    thresholds = _per_layer(file, "hotcold.predictor.thresholds", n, one_for_all)
    counts = _per_layer(file, "hotcold.hot.counts", n, 0)
    neurons = _hot_neurons(file, counts, shape.d_ff)
    predictors = []
    for threshold, indices in zip(thresholds, np.split(neurons, np.cumsum(counts)), strict=False):
        hot = np.zeros(shape.d_ff, bool)
        hot[indices] = True
        predictors.append(Predictor(threshold, hot))
    return predictors


def _hot_neurons(file: GGUFFile, counts: list[Any], d_ff: int) -> np.ndarray:
    """The indices of all layers; FormatError unless they are as many as `counts` says, and below d_ff."""
    neurons = file.find("hotcold.hot.neurons", np.ndarray, np.empty(0, np.int32))
    whole = neurons.dtype.kind in "iu" and all(type(n) is int and n >= 0 for n in counts)
    neurons = neurons[: sum(counts)] if whole and neurons.ndim == 1 else neurons
    if not whole or len(neurons) != sum(counts) or (neurons < 0).any() or (neurons >= d_ff).any():
        raise FormatError("hot neurons do not fit the model", where=file.path, field="hotcold.hot.neurons")
    return neurons
