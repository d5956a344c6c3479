"""Training all layers: one after the other, each kept as soon as it is finished, a bundle at the end.

Finished layers wait in `OUT.partial`, which also says what they were trained on and how. A rerun takes up
those that were made in the same way, and drops the others.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hotcold import storage
from hotcold.errors import FormatError
from hotcold.json_file import read_json
from hotcold.ownership import check_growing
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle
from hotcold.predictor.exclusive import exclusive
from hotcold.predictor.metrics import LayerMetrics
from hotcold.predictor.out_folder import check_out
from hotcold.predictor.traces import Traces
from hotcold.predictor.train import LayerData, TrainOptions, compute_dtype, train_layer
from hotcold.progress import Progress, log
from hotcold.text import PARTS

__all__ = ["train_bundle"]

_FORMAT, _VERSION = "hotcold-partial", 1
_DESCRIPTION = "training.json"


def train_bundle(traces: Traces, out: str | Path, options: TrainOptions) -> PredictorBundle:
    """Train the predictor of every layer of `traces` and save the bundle as `out`.

    FormatError for damaged traces, StorageError if the disk fails; finished layers are kept in both cases.
    StorageError also, and at once, where something else than predictors is in the way.
    """
    partial = check_out(out, traces.folder)
    with exclusive(partial):
        check_growing(partial, "partial")
        _begin(partial, _description(traces, options), traces.run.n_layers)
        layers = _train_layers(traces, partial, options)
        bundle = PredictorBundle(
            traces.run.model_fingerprint, layers, options.target_recall, _training(traces, options)
        )
        bundle.save(out)
        storage.remove_files(partial, [*map(_layer_file, range(traces.run.n_layers)), _DESCRIPTION])
    return bundle


def _train_layers(traces: Traces, partial: Path, options: TrainOptions) -> list[LayerPredictor]:
    run, layers = traces.run, []
    with Progress("train", total=run.n_layers * options.epochs, unit="epoch") as progress:
        for number in range(run.n_layers):
            file = partial / _layer_file(number)
            if not file.exists():
                starts = traces.starts() if number == 0 else None
                data = LayerData(*traces.layer(number), traces.part, run.d_ff, starts)
                layer = train_layer(
                    data, options, lambda loss, n=number: progress.advance(1, layer=str(n), loss=loss)
                )
                _write_layer(file, layer)
            layers.append(_read_layer(file))
            progress.advance((number + 1) * options.epochs - progress.done)
    return layers


def _training(traces: Traces, options: TrainOptions) -> dict[str, Any]:
    """What `config.json` tells people about the training."""
    tokens = np.bincount(traces.part, minlength=len(PARTS))
    return {
        "model": traces.run.model,
        "activation": traces.run.activation,
        "text": Path(traces.run.text).name,
        **{f"{part}_tokens": int(n) for part, n in zip(PARTS, tokens, strict=True)},
        "dtype": str(compute_dtype()).removeprefix("torch."),
        **asdict(options),
    }


def _description(traces: Traces, options: TrainOptions) -> dict[str, Any]:
    shards = [shard.sha256 for shard in traces.shards]
    return {
        "format": _FORMAT,
        "version": _VERSION,
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
        log(f"{partial}: of other traces or options, so that training begins anew")
    for layer in finished:
        storage.fs.unlink(partial / layer)
    storage.write_json(path, description)


def _write_layer(file: Path, layer: LayerPredictor) -> None:
    figures = {"threshold": layer.threshold, "metrics": layer.metrics.to_json()}
    storage.write_tensors(file, layer.tensors(), {"figures": json.dumps(figures)})


def _read_layer(file: Path) -> LayerPredictor:
    """A finished layer; FormatError if the file is damaged."""
    try:
        with safe_open(file, framework="numpy") as content:
            arrays = [content.get_tensor(name) for name in ("fc1.weight", "fc2.weight", "firing_frequency")]
            figures = json.loads(content.metadata()["figures"])
        metrics = LayerMetrics(**figures["metrics"])
        return LayerPredictor(arrays[0], arrays[1], float(figures["threshold"]), arrays[2], metrics)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        fix = "delete this file: only its layer is trained again"
        raise FormatError(f"a damaged layer of unfinished training ({error})", where=file, fix=fix) from error
