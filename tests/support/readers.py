"""Every reader of hotcold with a good folder for it, and the files in there that may be hostile.

`read` reads all that hotcold ever reads of such a folder. Whatever the files hold, it must return or raise a
HotcoldError: that is what the tests of malformed files, and the fuzzer, hold it to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import handmade

from hotcold.convert.bundle.inspect import describe, render
from hotcold.convert.bundle.manifest import Manifest
from hotcold.convert.bundle.verify import verify_bundle
from hotcold.convert.powerinfer.gpu_index import GpuIndex
from hotcold.errors import HotcoldError
from hotcold.files.gguf import GGUFFile
from hotcold.files.gguf_split import open_gguf
from hotcold.files.quantize import dequantize
from hotcold.files.safetensors import SafetensorsFile
from hotcold.model.gguf_checkpoint import GGUFCheckpoint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.model.spec import ModelSpec
from hotcold.model.tokenizer.files import tokenizer_metadata
from hotcold.model.tokenizer.gguf import build_tokenizer
from hotcold.model.weights import check_weights
from hotcold.predictor.bundle import PredictorBundle
from hotcold.predictor.traces.reader import Traces
from hotcold.runtime.engine import Engine
from hotcold.runtime.generation.vocabulary import Vocabulary
from hotcold.runtime.shape import ModelShape
from hotcold.text import documents

Step = Callable[[Path], None]


def _nothing(folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Reader:
    """`make` writes a good folder; `sign` makes hashes agree with what lies there, as an attacker would."""

    make: Step
    files: tuple[str, ...]
    read: Step
    sign: Step = _nothing
    seeds: tuple[bytes, ...] = ()  # more contents of the first file, to begin fuzzing with


def _file(name: str, content: Callable[[], bytes]) -> Step:
    return lambda folder: void((folder / name).write_bytes(content()))


def void(_: object) -> None:
    pass


def read_gguf(folder: Path) -> None:
    file = GGUFFile(folder / "m.gguf")
    for tensor in file.tensors.values():
        if tensor.data.size < 1 << 16:
            with suppress(HotcoldError):
                dequantize(tensor)
    render(describe(folder / "m.gguf"))


def read_model(folder: Path) -> None:
    """What the runtime and the exporter make of the metadata."""
    file = GGUFFile(folder / "m.gguf")
    with suppress(HotcoldError):
        ModelShape.read(file)
    source = GGUFCheckpoint(folder / "m.gguf")
    for name in source.names():
        source.load(name)
    check_weights(source, ModelSpec.from_config(source.config))


def read_engine(folder: Path) -> None:
    """Load a file into the native engine and run three tokens through it."""
    sparse = (folder / "m.gguf").read_bytes()[:4] == b"PWRI"
    Engine.load(folder / "m.gguf", "predicted" if sparse else "dense", 1, 8).prefill([0, 1, 2])
    if "tokenizer.ggml.tokens" in GGUFFile(folder / "m.gguf").metadata:
        Vocabulary.load(folder / "m.gguf").encode_chat("ab")


def read_attention(folder: Path) -> None:
    """The same with the attention matrices by input, of which half are left out."""
    engine = Engine(folder / "m.gguf", "exact", 1, 8, attention=folder / "a.gguf", input_sparsity=0.5)
    engine.prefill([0, 1, 2])
    engine.decode(3)


def read_vocabulary(folder: Path) -> None:
    build_tokenizer(GGUFFile(folder / "m.gguf")).encode("ab a<s>b")


def read_gpu_index(folder: Path) -> None:
    GpuIndex.read(GGUFFile(folder / "m.gguf")).masks()


def read_safetensors(folder: Path) -> None:
    file = SafetensorsFile(folder / "t.safetensors")
    for name in file:
        file.shape(name)
        with suppress(HotcoldError):
            file.load(name)


def read_checkpoint(folder: Path) -> None:
    source = HFCheckpoint(folder)
    check_weights(source, ModelSpec.from_config(source.config, folder / "config.json"))
    for name in source.names():
        source.load(name)


def read_predictor_bundle(folder: Path) -> None:
    for layer in PredictorBundle.load(folder).layers:
        layer.logits(layer.fc1[:1])
    render(describe(folder))


def read_traces(folder: Path) -> None:
    traces = Traces(folder)
    for layer in range(traces.run.n_layers):
        traces.layer(layer)
    traces.starts()
    traces.sparsity()


def read_bundle(folder: Path) -> None:
    Manifest.read(folder)
    verify_bundle(folder)
    describe(folder)


def sign_bundle(folder: Path) -> None:
    with suppress(ValueError, RecursionError, OSError):
        values = json.loads((folder / "manifest.json").read_bytes())
        if isinstance(values, dict):
            (folder / "manifest.json").write_bytes(handmade.as_json(handmade.signed(values)))


def sign_bundle_files(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(handmade.as_json(handmade.manifest_of(folder)))


def read_tokenizer(folder: Path) -> None:
    tokenizer_metadata(folder, 8, {"bos_token_id": 0})


def read_text(folder: Path) -> None:
    list(documents(str(folder / "t.jsonl")))


SHARD = "layer-001/shard-000000.safetensors"

READERS: dict[str, Reader] = {
    "gguf": Reader(_file("m.gguf", handmade.model_gguf), ("m.gguf",), read_gguf),
    "gguf model": Reader(_file("m.gguf", handmade.model_gguf), ("m.gguf",), read_model),
    "pwri": Reader(_file("m.gguf", lambda: handmade.model_gguf(magic=b"PWRI")), ("m.gguf",), read_model),
    "engine": Reader(
        _file("m.gguf", lambda: handmade.engine_gguf(True)),
        ("m.gguf",),
        read_engine,
        seeds=(handmade.engine_gguf(False),),
    ),
    "attention": Reader(handmade.attention, ("a.gguf",), read_attention),
    "gguf vocabulary": Reader(
        _file("m.gguf", lambda: handmade.model_gguf(handmade.vocabulary_kvs())), ("m.gguf",), read_vocabulary
    ),
    "gpuidx": Reader(_file("m.gguf", handmade.gpu_index_bytes), ("m.gguf",), read_gpu_index),
    "split": Reader(
        handmade.split,
        ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"),
        lambda folder: void(open_gguf(folder / "m-00001-of-00002.gguf")),
    ),
    "safetensors": Reader(
        _file("t.safetensors", lambda: handmade.safetensors(handmade.predictor_tensors())),
        ("t.safetensors",),
        read_safetensors,
    ),
    "checkpoint": Reader(
        handmade.checkpoint,
        ("config.json", "model.safetensors.index.json", "model-1.safetensors"),
        read_checkpoint,
        seeds=tuple(map(handmade.as_json, handmade.other_configs())),
    ),
    "manifest": Reader(handmade.bundle, ("manifest.json",), read_bundle, sign_bundle),
    "bundle": Reader(handmade.bundle, ("config.json", "m.gguf"), read_bundle, sign_bundle_files),
    "predictors": Reader(handmade.predictors, ("config.json", "model.safetensors"), read_predictor_bundle),
    "traces": Reader(handmade.traces, ("run.json", "tokens.safetensors", "manifest.jsonl"), read_traces),
    "trace shard": Reader(handmade.traces, (SHARD,), read_traces, handmade.trace_manifest),
    "tokenizer": Reader(handmade.tokenizer, ("tokenizer.json", "tokenizer_config.json"), read_tokenizer),
    "sentencepiece": Reader(
        _file("tokenizer.json", lambda: handmade.as_json(handmade.tokenizer_json("byte-fallback"))),
        ("tokenizer.json",),
        read_tokenizer,
    ),
    "text": Reader(_file("t.jsonl", lambda: b'{"text": "a"}\n'), ("t.jsonl",), read_text),
}
