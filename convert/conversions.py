"""The formats in which models, predictors and firing statistics come: how each is told, read and written.

A conversion reads *parts* out of its sources, and writes the target from the parts that this needs. So a
format has one reader and one writer, and any source that has what the target needs can become it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hotcold.convert.gguf.parts import Options, Parts
from hotcold.convert.model_formats import (
    bytes_per_neuron,
    read_bundle,
    read_checkpoint,
    read_gguf,
    write_bundle,
    write_dense,
    write_sparse,
)
from hotcold.convert.powerinfer.firing_counts import counts_of_traces, read_firing_counts, write_firing_counts
from hotcold.convert.powerinfer.gpu_index import GpuIndex, hottest_neurons, neurons_that_fit
from hotcold.convert.powerinfer.model_pt import read_model_pt, write_model_pt
from hotcold.errors import InputError
from hotcold.files.gguf_split import open_gguf
from hotcold.identify import identify
from hotcold.ownership import check_file, check_replaceable
from hotcold.predictor.bundle import PredictorBundle
from hotcold.predictor.traces.reader import Traces

__all__ = ["FORMATS", "Format", "convert", "format_of"]

Reader = Callable[[Path, Parts, Options, ExitStack], None]  # adds to the parts what is in the file or folder
Writer = Callable[[Parts, Path, Options], None]


@dataclass(frozen=True, slots=True)
class Format:
    """One format: what it is, how it is read and, unless it is a source only, how it is written."""

    what: str
    read: Reader
    write: Writer | None


def _read_predictors(path: Path, parts: Parts, options: Options, stack: ExitStack) -> None:
    parts.bundle = PredictorBundle.load(path)


def _write_predictors(parts: Parts, out: Path, options: Options) -> None:
    parts.need_predictors(options).save(out)


def _read_model_pt(path: Path, parts: Parts, options: Options, stack: ExitStack) -> None:
    fingerprint = parts.model.fingerprint if parts.model else None
    parts.bundle = read_model_pt(path, fingerprint, pickles_allowed=options.pickles_allowed)


def _write_model_pt(parts: Parts, out: Path, options: Options) -> None:
    write_model_pt(parts.need_predictors(options), out)


def _read_firing_counts(path: Path, parts: Parts, options: Options, stack: ExitStack) -> None:
    parts.firing, parts.firing_tokens = (
        read_firing_counts(path, pickles_allowed=options.pickles_allowed),
        None,
    )


def _write_firing_counts(parts: Parts, out: Path, options: Options) -> None:
    write_firing_counts(parts.need_firing(), out)


def _read_traces(path: Path, parts: Parts, options: Options, stack: ExitStack) -> None:
    traces = Traces(path)
    parts.firing, parts.firing_tokens = counts_of_traces(traces), traces.run.n_tokens


def _read_gpu_index(path: Path, parts: Parts, options: Options, stack: ExitStack) -> None:
    parts.gpu = GpuIndex.read(open_gguf(path))


def _write_gpu_index(parts: Parts, out: Path, options: Options) -> None:
    if options.vram_budget is None and parts.gpu is not None:
        parts.gpu.write(out)
        return
    if options.vram_budget is None:
        raise InputError("the GPU memory for neurons is unknown", fix="set --vram-budget, in GiB")
    firing = parts.need_firing()
    n_neurons = neurons_that_fit(options.vram_budget, bytes_per_neuron(parts.need_model()))
    GpuIndex(hottest_neurons(firing, n_neurons), len(firing[0]), int(options.vram_budget)).write(out)


FORMATS = {
    "bundle": Format("a bundle's folder", read_bundle, write_bundle),
    "powerinfer": Format("PowerInfer's sparse GGUF file", read_gguf, write_sparse),
    "gguf": Format("a dense GGUF file for stock llama.cpp", read_gguf, write_dense),
    "predictors": Format("a predictor bundle's folder", _read_predictors, _write_predictors),
    "model-pt": Format("PowerInfer's folder of model_N.pt", _read_model_pt, _write_model_pt),
    "activation": Format("PowerInfer's folder of activation_N.pt", _read_firing_counts, _write_firing_counts),
    "gpuidx": Format("PowerInfer's .generated.gpuidx file", _read_gpu_index, _write_gpu_index),
    "traces": Format("a folder of traces", _read_traces, None),
    "checkpoint": Format("a Hugging Face checkpoint's folder", read_checkpoint, None),
}
# Read after the models, whose own predictors they replace, and which tell of which model they are.
_LATER = ("predictors", "model-pt", "activation", "traces", "gpuidx")
_FILES = ("powerinfer", "gguf", "gpuidx")  # what is a file; the others are folders


def format_of(path: str | Path) -> str:
    """The format that a file or folder has. InputError for none, FormatError for a broken GGUF file."""
    kind = identify(path).kind
    if kind not in FORMATS:
        raise InputError("unknown format", where=path, got=kind, expected=" | ".join(FORMATS))
    return kind


def convert(sources: Sequence[str | Path], to: str, out: str | Path, options: Options) -> None:
    """Write `out` in the format `to`, from what the sources hold together.

    Raises InputError (no such format, a part that no source has, pickles that are not allowed), StorageError
    (an `out` that hotcold did not write, or that is a source) and what the readers and writers of the formats
    raise. `out` is then as it was.
    """
    writer = FORMATS[to].write if to in FORMATS else None
    if writer is None:
        targets = [name for name, format in FORMATS.items() if format.write]
        raise InputError("cannot write this format", where="--to", got=to, expected=" | ".join(targets))
    (check_file if to in _FILES else check_replaceable)(out, to, sources)
    formats = [(format_of(source), Path(source)) for source in sources]
    with ExitStack() as stack:
        parts = Parts()
        for format, path in sorted(formats, key=lambda entry: entry[0] in _LATER):
            FORMATS[format].read(path, parts, options, stack)
        writer(parts, Path(out), options)
