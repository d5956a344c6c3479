"""Training all layers: some at a time, each kept as soon as it is finished, a bundle at the end.

Finished layers wait in `OUT.partial`, which also says what they were trained on and how. A rerun takes up
those that were made in the same way, and drops the others.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hotcold import storage
from hotcold.cpuinfo import available_memory
from hotcold.cpus import in_threads
from hotcold.errors import FormatError
from hotcold.files.json import read_json
from hotcold.model.gates import Gates
from hotcold.ownership import check_growing
from hotcold.predictor.bundle import FREQUENCY, LayerPredictor, PredictorBundle
from hotcold.predictor.kinds.table import BIAS, FC1, FC2, KINDS, Kind
from hotcold.predictor.out_folder import check_out
from hotcold.predictor.traces.reader import Traces
from hotcold.predictor.training.exclusive import exclusive
from hotcold.predictor.training.metrics import LayerMetrics
from hotcold.predictor.training.train import LayerData, TrainOptions, train_layer
from hotcold.progress import Progress, log
from hotcold.text import PARTS

__all__ = ["train_bundle"]

_FORMAT, _VERSION = "hotcold-partial", 1
_DESCRIPTION = "training.json"
_WORKING_TOKENS = 4096  # whose logits, labels and their copies are in memory at a time
_GATE_BYTES = 32  # for each weight of a gate: in float32, and three times in float64


def train_bundle(
    traces: Traces, out: str | Path, options: TrainOptions, n_threads: int = 1, gates: Gates | None = None
) -> PredictorBundle:
    """Train the predictor of every layer of `traces`, `n_threads` at a time, and save the bundle as `out`.

    `gates` are the model's, of kinds that need them. FormatError for damaged traces, StorageError if the
    disk fails; finished layers are kept in both cases. StorageError also, and at once, where something else
    than predictors is in the way.
    """
    partial = check_out(out, traces.folder)
    with exclusive(partial):
        check_growing(partial, "partial")
        _begin(partial, _description(traces, options), traces.run.n_layers)
        layers = _train_layers(traces, partial, options, n_threads, gates)
        bundle = PredictorBundle(
            traces.run.model_fingerprint, layers, options.target_recall, _training(traces, options)
        )
        bundle.save(out)
        storage.remove_files(partial, [*map(_layer_file, range(traces.run.n_layers)), _DESCRIPTION])
    return bundle


def _train_layers(
    traces: Traces, partial: Path, options: TrainOptions, n_threads: int, gates: Gates | None
) -> list[LayerPredictor]:
    """Layers wait for nobody, so that each is trained by a thread of its own."""
    run, reporting, stopped = traces.run, threading.Lock(), threading.Event()
    n_epochs = KINDS[options.kind].trainer.settings(options).get("epochs", 1)

    def make(number: int) -> Path:
        file = partial / _layer_file(number)
        epochs = 0 if file.exists() else _train_layer(traces, number, file, options, report, gates)
        with reporting:
            progress.advance(n_epochs - epochs)
        return file

    def report(number: int, loss: float) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        with reporting:
            progress.advance(1, layer=str(number), loss=loss)

    n_threads = min(n_threads, _fitting(traces, gates))
    with Progress("train", total=run.n_layers * n_epochs, unit="epoch") as progress:
        return [
            _read_layer(file, KINDS[options.kind])
            for file in in_threads(make, range(run.n_layers), n_threads, stopped)
        ]


def _fitting(traces: Traces, gates: Gates | None) -> int:
    """How many layers' traces fit into half of the free memory, and copies of the gates; at least one."""
    run = traces.run
    layer = run.n_tokens * (2 * run.d_model + run.d_ff // 8) + _WORKING_TOKENS * run.d_ff * 16
    layer += 0 if gates is None else _GATE_BYTES * run.d_ff * run.d_model
    return max(1, available_memory() // (2 * layer))


def _train_layer(
    traces: Traces,
    number: int,
    file: Path,
    options: TrainOptions,
    report: Callable[[int, float], None],
    gates: Gates | None,
) -> int:
    """Train one layer and write it; returns how many epochs that took."""
    epochs = 0

    def on_epoch(loss: float) -> None:
        nonlocal epochs
        epochs += 1
        report(number, loss)

    starts = traces.starts() if number == 0 else None
    own = None if gates is None else gates.layer(number)
    data = LayerData(*traces.layer(number), traces.part, traces.run.d_ff, starts, own)
    _write_layer(file, train_layer(data, options, on_epoch))
    return epochs


def _training(traces: Traces, options: TrainOptions) -> dict[str, Any]:
    """What `config.json` tells people about the training."""
    tokens = np.bincount(traces.part, minlength=len(PARTS))
    return {
        "model": traces.run.model,
        "activation": traces.run.activation,
        "text": Path(traces.run.text).name,
        **{f"{part}_tokens": int(n) for part, n in zip(PARTS, tokens, strict=True)},
        "rank": options.rank,
        "target_recall": options.target_recall,
        **KINDS[options.kind].trainer.settings(options),
    }


def _description(traces: Traces, options: TrainOptions) -> dict[str, Any]:
    shards = [shard.sha256 for shard in traces.shards]
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "kind": options.kind,
        "model_fingerprint": traces.run.model_fingerprint,
        "shards": shards,
        **_training(traces, options),
    }


def _layer_file(number: int) -> str:
    return f"layer-{number:03d}.safetensors"


def _begin(partial: Path, description: dict[str, Any], n_layers: int) -> None:
    """Leave only layers that were trained on these traces in this way."""
    path = partial / _DESCRIPTION
    finished = [layer for layer in map(_layer_file, range(n_layers)) if (partial / layer).exists()]
    if path.exists():
        if read_json(path) == description:
            log(f"{partial}: {len(finished)} layers are finished")
            return
        log(f"{partial}: from other traces or options; training starts over")
    for layer in finished:
        storage.fs.unlink(partial / layer)
    storage.write_json(path, description)


def _write_layer(file: Path, layer: LayerPredictor) -> None:
    figures = {"threshold": layer.threshold, "metrics": layer.metrics.to_json()}
    storage.write_tensors(file, layer.tensors(), {"figures": json.dumps(figures)})


def _read_layer(file: Path, kind: Kind) -> LayerPredictor:
    """A finished layer; FormatError if the file is damaged."""
    try:
        with safe_open(file, framework="numpy") as content:
            fc1, fc2, frequency = (content.get_tensor(name) for name in (FC1, FC2, FREQUENCY))
            bias = content.get_tensor(BIAS) if kind.bias else None
            figures = json.loads(content.metadata()["figures"])
        metrics = LayerMetrics(**figures["metrics"])
        return LayerPredictor(fc1, fc2, float(figures["threshold"]), frequency, metrics, bias, kind)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        fix = "delete this file; only its layer will be trained again"
        raise FormatError(f"a damaged layer of unfinished training ({error})", where=file, fix=fix) from error
