"""What hotcold writes it reads back, whatever is in it. (GGUF and PWRI: tests/convert/gguf/test_write.py.)"""

from __future__ import annotations

import tempfile
from pathlib import Path

import handmade
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hotcold import storage
from hotcold.convert.bundle.manifest import MANIFEST, ROLES, BundleFile, Manifest
from hotcold.convert.powerinfer.gpu_index import GpuIndex
from hotcold.files.gguf import GGUFFile
from hotcold.files.safetensors import SafetensorsFile
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle
from hotcold.predictor.kinds import table
from hotcold.predictor.traces.reader import TraceRun, Traces, tokens_digest
from hotcold.predictor.traces.writer import TraceWriter
from hotcold.predictor.training.metrics import LayerMetrics

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
SHARE = st.floats(0, 1)
FILE_NAME = st.from_regex(r"(predictors/)?[\w][\w.+ -]{0,20}", fullmatch=True)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)

few = settings(deadline=None, max_examples=40)


def arrays(*shape: int, dtype: type = np.float32, elements: st.SearchStrategy = FLOATS):
    return hnp.arrays(dtype, shape, elements=elements)


def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@few
@given(data=st.data())
def test_manifests(data):
    entry = st.builds(BundleFile, st.sampled_from(ROLES), st.integers(0, 1 << 60), HEX)
    files = st.dictionaries(FILE_NAME, entry, max_size=5)
    kinds = {
        "hot_frequency": st.floats(allow_nan=False, allow_infinity=False),
        "llama_cpp_exact": st.booleans(), "files": files, "source_quantized": st.lists(TEXT, max_size=3),
    }  # fmt: skip
    chosen = {
        name: kinds.get(name, TEXT)
        for name, field in Manifest.__dataclass_fields__.items()
        if name in kinds or field.type == "str"
    }
    manifest = Manifest(**data.draw(st.fixed_dictionaries(chosen)))
    with folder() as out:
        storage.write_json(Path(out, MANIFEST), manifest.to_json())
        assert Manifest.read(out) == manifest


@st.composite
def bundles(draw: st.DrawFn) -> PredictorBundle:
    d_model, d_ff = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    metrics = st.builds(LayerMetrics, SHARE, SHARE, SHARE, SHARE)
    threshold = st.floats(allow_nan=False)
    layers, kind = [], draw(st.sampled_from([*table.KINDS.values()]))
    for _ in range(draw(st.integers(1, 3))):
        rank = draw(st.integers(1, 4))
        parts = (draw(arrays(rank, d_model)), draw(arrays(d_ff, rank)))
        bias = draw(arrays(d_ff)) if kind.bias else None
        layers.append(LayerPredictor(*parts, draw(threshold), draw(arrays(d_ff)), draw(metrics), bias, kind))
    training = draw(st.dictionaries(TEXT, st.one_of(TEXT, st.integers(), SHARE), max_size=3))
    return PredictorBundle(draw(HEX), layers, draw(SHARE), training)


@few
@given(bundle=bundles())
def test_predictor_bundles(bundle):
    with folder() as out:
        bundle.save(Path(out, "p"))
        again = PredictorBundle.load(Path(out, "p"))
        assert again.config() == bundle.config() and again.kind is bundle.kind
        for ours, theirs in zip(again.layers, bundle.layers, strict=True):
            for name, array in theirs.tensors().items():
                np.testing.assert_array_equal(ours.tensors()[name], array)


@few
@given(data=st.data())
def test_traces(data):
    integers = {"n_layers": 3, "d_model": 4, "d_ff": 17, "n_tokens": 9, "shard_tokens": 5, "window": 9}
    sizes = {name: data.draw(st.integers(1, most)) for name, most in integers.items()}
    n = sizes["n_tokens"]
    tokens = {
        "ids": data.draw(arrays(n, dtype=np.int32, elements=st.integers(0, 99))),
        "document": np.sort(data.draw(arrays(n, dtype=np.int32, elements=st.integers(0, 2)))),
        "part": data.draw(arrays(n, dtype=np.uint8, elements=st.integers(0, 2))),
    }
    names = {name: data.draw(TEXT) for name in ("model", "text", "activation")}
    run = TraceRun(
        **sizes, **names, model_fingerprint=handmade.FINGERPRINT, text_sha256=tokens_digest(tokens), threads=1
    )
    x = data.draw(arrays(run.n_layers, n, run.d_model, dtype=np.float16, elements=st.floats(-9, 9, width=16)))
    bits = data.draw(hnp.arrays(bool, (run.n_layers, n, run.d_ff)))
    active = np.packbits(bits, axis=-1, bitorder="little")
    with folder() as out:
        with TraceWriter.open(Path(out, "t"), run, tokens) as writer:
            for shard in range(run.n_shards):
                rows = run.shard_slice(shard)
                for layer in range(run.n_layers):
                    fired = int(bits[layer, rows].sum())
                    writer.write(layer, shard, x[layer, rows], active[layer, rows], fired=fired, clipped=0)
        traces = Traces(Path(out, "t"))
        assert traces.run == run
        np.testing.assert_array_equal(traces.ids, tokens["ids"])
        np.testing.assert_allclose(traces.sparsity(), 1 - bits.mean(axis=(1, 2)))
        for layer in range(run.n_layers):
            read_x, read_active = traces.layer(layer)
            np.testing.assert_array_equal(read_x, x[layer])
            np.testing.assert_array_equal(read_active, active[layer])


@few
@given(
    masks=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8)),
    capacity=st.integers(0, 2**63),
)
def test_gpu_indices(masks, capacity):
    buckets = [np.flatnonzero(mask).astype(np.int32) for mask in masks]
    with folder() as out:
        GpuIndex(buckets, masks.shape[1], capacity).write(Path(out, "g"))
        again = GpuIndex.read(GGUFFile(Path(out, "g")))
    assert (again.d_ff, again.vram_capacity) == (masks.shape[1], capacity)
    for ours, theirs in zip(again.buckets, buckets, strict=True):
        np.testing.assert_array_equal(ours, theirs)


KINDS = st.sampled_from([np.float32, np.float16, np.float64])
ARRAYS = hnp.array_shapes(max_side=4).flatmap(
    lambda shape: hnp.arrays(KINDS, shape, elements={"allow_nan": False})
)
NAMES = TEXT.filter(lambda name: name != "__metadata__")


@few
@given(tensors=st.dictionaries(NAMES, ARRAYS, max_size=4))
def test_safetensors(tensors):
    with folder() as out:
        storage.write_tensors(Path(out, "t.safetensors"), tensors)
        file = SafetensorsFile(Path(out, "t.safetensors"))
        assert set(file) == set(tensors)
        for name, array in tensors.items():
            with np.errstate(over="ignore"):
                np.testing.assert_array_equal(file.load(name), array.astype(np.float32))
