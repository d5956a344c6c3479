"""Training all layers: one after the other, each kept as soon as it is finished, a bundle at the end.

Finished layers wait in `OUT.partial`, which also says what they were trained on and how. A rerun takes up
those that were made in the same way, and drops the others.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hotcold import storage
from hotcold.errors import FormatError, HotcoldError, InputError
from hotcold.json_file import read_json
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle, read_config
from hotcold.predictor.exclusive import exclusive
from hotcold.predictor.metrics import LayerMetrics
from hotcold.predictor.traces import Traces
from hotcold.predictor.train import LayerData, TrainOptions, compute_dtype, train_layer
from hotcold.progress import Progress, log

__all__ = ["train_bundle"]


def train_bundle(traces: Traces, out: str | Path, options: TrainOptions) -> PredictorBundle:
    """Train the predictor of every layer of `traces` and save the bundle as `out`.

    FormatError for damaged traces, StorageError if the disk fails; finished layers are kept in both cases.
    """
    out = Path(out)
    _refuse_foreign(out)
    partial = out.with_name(out.name + ".partial")
    with exclusive(partial):
        _begin(partial, _description(traces, options))
        layers = _train_layers(traces, partial, options)
        bundle = PredictorBundle(
            traces.run.model_fingerprint, layers, options.target_recall, _training(traces, options)
        )
        bundle.save(out)
        shutil.rmtree(partial)
    return bundle


def _refuse_foreign(out: Path) -> None:
    """Only another predictor bundle may be replaced; said before the training, not after it."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        try:
            read_config(out)
        except HotcoldError as error:
            fix = "give a new folder as --out, or delete this one"
            raise InputError("is there already, and is no predictor bundle", where=out, fix=fix) from error


def _train_layers(traces: Traces, partial: Path, options: TrainOptions) -> list[LayerPredictor]:
    run, layers = traces.run, []
    with Progress("train", total=run.n_layers * options.epochs, unit="epoch") as progress:
        for number in range(run.n_layers):
            file = partial / f"layer-{number:03d}.safetensors"
            if not file.exists():
                starts = traces.starts() if number == 0 else None
                data = LayerData(*traces.layer(number), traces.heldout, run.d_ff, starts)
                layer = train_layer(
                    data, options, lambda loss, n=number: progress.advance(1, layer=str(n), loss=loss)
                )
                _write_layer(file, layer)
            layers.append(_read_layer(file))
            progress.advance((number + 1) * options.epochs - progress.done)
    return layers


def _training(traces: Traces, options: TrainOptions) -> dict[str, Any]:
    """What `config.json` tells people about the training."""
    heldout = int(traces.heldout.sum())
    return {
        "model": traces.run.model,
        "activation": traces.run.activation,
        "text": Path(traces.run.text).name,
        "train_tokens": traces.run.n_tokens - heldout,
        "heldout_tokens": heldout,
        "dtype": str(compute_dtype()).removeprefix("torch."),
        **asdict(options),
    }


def _description(traces: Traces, options: TrainOptions) -> dict[str, Any]:
    shards = [shard.sha256 for shard in traces.shards]
    return {"model_fingerprint": traces.run.model_fingerprint, "shards": shards, **_training(traces, options)}


def _begin(partial: Path, description: dict[str, Any]) -> None:
    """Leave only layers that were trained on these traces in this way."""
    path = partial / "training.json"
    layers = sorted(partial.glob("layer-*.safetensors"))
    if path.exists() and read_json(path) == description:
        log(f"{partial}: {len(layers)} layers are finished")
        return
    for layer in layers:
        storage.fs.unlink(layer)
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
