"""How often each neuron fires: PowerInfer's `activation_N.pt`, a vector [d_ff] per layer.

PowerInfer's solver only compares the numbers with each other, within a layer and between layers, so that
counts and shares serve alike. hotcold's predictor bundles hold shares, its traces give counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hotcold import storage
from hotcold.convert.powerinfer.model_pt import numbered_files, tensor_file
from hotcold.convert.powerinfer.pickles import read_pickles
from hotcold.errors import FormatError, InputError, ShapeError
from hotcold.files.safetensors import SafetensorsFile
from hotcold.predictor.bundle import PredictorBundle
from hotcold.predictor.traces.reader import Traces
from hotcold.progress import Progress

__all__ = [
    "counts_of_traces",
    "firing_vectors",
    "read_firing_counts",
    "with_frequencies",
    "write_firing_counts",
]

Firing = list[np.ndarray]  # per layer float32 [d_ff]: counts or shares


def read_firing_counts(folder: str | Path, *, pickles_allowed: bool) -> Firing:
    """Read `activation_0.pt`, `activation_1.pt`, …

    Raises InputError (no such files, pickles not allowed), FormatError (no vectors of numbers >= 0),
    ShapeError (layers of different lengths).
    """
    paths = numbered_files(Path(folder), "activation")
    return firing_vectors(read_pickles(paths, allowed=pickles_allowed), Path(folder))


def firing_vectors(files: Sequence[SafetensorsFile], folder: Path) -> Firing:
    """The vector of each layer, out of the tensors of `activation_N.pt` in `folder`; raises as above."""
    vectors = [_vector(tensors, folder / f"activation_{number}.pt") for number, tensors in enumerate(files)]
    for number, vector in enumerate(vectors):
        if vector.shape != vectors[0].shape:
            what, where = "d_ff differs from layer 0", folder / f"activation_{number}.pt"
            raise ShapeError(what, where=where, got=len(vector), expected=len(vectors[0]))
    return vectors


def _vector(tensors: SafetensorsFile, path: Path) -> np.ndarray:
    if list(tensors) != ["tensor"] or len(tensors.shape("tensor")) != 1:
        got = ", ".join(f"{name} {list(tensors.shape(name))}" for name in tensors)
        raise FormatError("not a single vector", where=path, field="tensor", got=got, expected="[d_ff]")
    vector = tensors.floats("tensor", tensors.shape("tensor"))
    if not (np.isfinite(vector).all() and (vector >= 0).all()):
        raise FormatError("firing counts must be >= 0", where=path, field="tensor")
    return vector


def write_firing_counts(firing: Firing, out: str | Path) -> None:
    """Write the directory, which appears as a whole. No other file lies in it, as PowerInfer counts them."""
    with storage.atomic_directory(out, "activation") as folder:
        for number, vector in enumerate(firing):
            storage.write_bytes(folder / f"activation_{number}.pt", tensor_file(vector))


def counts_of_traces(traces: Traces) -> Firing:
    """How many tokens of the traces each neuron fired on. FormatError for damaged shards."""
    run, counts = traces.run, []
    with Progress("count", run.n_layers, "layer") as progress:
        for layer in range(run.n_layers):
            total = np.zeros(run.d_ff, np.int64)
            for active in traces.active(layer):
                bits = np.unpackbits(active, axis=1, count=run.d_ff, bitorder="little")
                total += bits.sum(axis=0, dtype=np.int64)
            counts.append(total.astype(np.float32))
            progress.advance(1)
    return counts


def with_frequencies(bundle: PredictorBundle, firing: Firing, n_tokens: int | None) -> PredictorBundle:
    """The predictors with these firing frequencies: shares as they are, counts divided by `n_tokens`.

    ShapeError if layers or neurons differ, InputError for counts of an unknown or too small number of
    tokens.
    """
    shape, expected = (len(firing), len(firing[0])), (bundle.n_layers, bundle.d_ff)
    if shape != expected:
        raise ShapeError(
            "firing counts have the wrong (n_layers, d_ff)", where=bundle.path, got=shape, expected=expected
        )
    most = max(float(vector.max()) for vector in firing)
    if n_tokens is None and most > 1:
        raise InputError(
            "these are counts, not shares",
            got=f"up to {most:g}",
            fix="set --counted-tokens to the number of tokens",
        )
    if n_tokens is not None and most > n_tokens:
        raise InputError(
            "a neuron fired more often than there are tokens", got=f"{most:g}", expected=f"<= {n_tokens}"
        )
    layers = [
        replace(layer, firing_frequency=vector / np.float32(n_tokens or 1))
        for layer, vector in zip(bundle.layers, firing, strict=True)
    ]
    return replace(bundle, layers=layers)
