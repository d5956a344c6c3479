"""How often neurons fire, from what knows it: a predictor bundle, traces, PowerInfer's activation files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hotcold.errors import InputError, ShapeError
from hotcold.identify import identify

__all__ = ["firing_frequencies"]


def firing_frequencies(
    source: str | Path, n_layers: int, d_ff: int, *, pickles: bool = False
) -> list[np.ndarray]:
    """Per layer float32 [d_ff], the share of tokens that each neuron fires on.

    `source` is a bundle (its `predictors/`), a predictor bundle, a trace folder, or a folder of
    `activation_N.pt`, whose counts are taken relative to the greatest. Those are pickles, read in a sandbox
    and only where `pickles` allows it. Raises InputError for a folder of another kind, ShapeError for another
    model's, and what the readers raise.
    """
    folder = Path(source)
    found = _read(folder / "predictors" if (folder / "predictors").is_dir() else folder, pickles)
    got = [len(layer) for layer in found]
    if got != [d_ff] * n_layers:
        shape = (len(found), *sorted(set(got)))
        raise ShapeError(
            "firing counts have the wrong (n_layers, d_ff)",
            where=folder,
            got=shape,
            expected=(n_layers, d_ff),
        )
    return found


def _read(folder: Path, pickles: bool) -> list[np.ndarray]:
    match identify(folder).kind:
        case "traces":
            return _of_traces(folder)
        case "predictors":
            return _of_predictors(folder)
        case "activation":
            return _of_activation_files(folder, pickles)
    fix = "give a bundle with predictors, a trace folder, or a folder of activation_N.pt"
    raise InputError("no firing frequencies found", where=folder, fix=fix)


def _of_predictors(folder: Path) -> list[np.ndarray]:
    from hotcold.predictor.bundle import PredictorBundle

    layers = PredictorBundle.load(folder).layers
    if any(layer.firing_frequency is None for layer in layers):
        raise InputError("these predictors have no firing frequencies", where=folder)
    return [np.asarray(layer.firing_frequency, np.float32) for layer in layers]


def _of_traces(folder: Path) -> list[np.ndarray]:
    from hotcold.convert.powerinfer.firing_counts import counts_of_traces
    from hotcold.predictor.traces.reader import Traces

    traces = Traces(folder)
    return [counts / np.float32(traces.run.n_tokens) for counts in counts_of_traces(traces)]


def _of_activation_files(folder: Path, pickles: bool) -> list[np.ndarray]:
    from hotcold.convert.powerinfer.firing_counts import firing_vectors
    from hotcold.convert.powerinfer.model_pt import numbered_files
    from hotcold.convert.powerinfer.pickles import read_pickles

    counts = firing_vectors(read_pickles(numbered_files(folder, "activation"), allowed=pickles), folder)
    most = max(float(layer.max(initial=0)) for layer in counts)
    return [layer / np.float32(most or 1) for layer in counts]
