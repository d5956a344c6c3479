"""One table of names: every format gives the same weights, and a family of new names is a new row of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_families import FAMILIES, IDS, SPARSE, random_predictors, write_model

from hotcold import storage
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.gguf.write import copied, write_gguf
from hotcold.errors import UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.files.safetensors import SafetensorsFile
from hotcold.model import families
from hotcold.model.checkpoint import fingerprint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.model.spec import LayerSpec, ModelSpec
from hotcold.model.tensors import GGUF, Naming, parts_of, slots_of
from hotcold.model.weights import CheckpointWeights, FileWeights
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.gpu.engine import GpuEngine


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint of a family and its bundle in F32, made once."""
    root, made = tmp_path_factory.mktemp("exported"), {}

    def make(name):
        if name not in made:
            model, bundle = root / name, root / f"{name}-bundle"
            write_model(model, FAMILIES[name])
            predictors = random_predictors(model, root / f"{name}-predictors") if name in SPARSE else None
            options = {"name": "m", "fingerprint": fingerprint(str(model)), "options": ExportOptions("f32")}
            export_bundle(HFCheckpoint(model), bundle, predictors=predictors, **options)
            made[name] = model, bundle
        return made[name]

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_every_format_holds_the_same_weights(name, exported):
    """Falcon's rows by heads and by parts, rotary pairs of either order, an expert, neuron rows, biases."""
    model, bundle = exported(name)
    source = HFCheckpoint(model)
    spec = ModelSpec.from_config(source.config)
    checkpoint = CheckpointWeights(spec, source.load)
    for path in sorted(bundle.glob("*.gguf")):
        weights = FileWeights.read(GGUFFile(path))
        assert weights.by_neuron == ("powerinfer" in path.name)
        assert (weights.spec.biases, weights.spec.layers) == (spec.biases, spec.layers)
        for slot, layer in slots_of(spec):
            for part in parts_of(spec, slot):
                expected = checkpoint.floats(slot, layer, part)
                np.testing.assert_array_equal(weights.floats(slot, layer, part), expected)
            rows = weights.floats("down_rows", layer)
            np.testing.assert_array_equal(rows, weights.floats("down", layer).T)


@pytest.mark.parametrize("name", ["llama", "qwen2-silu", "falcon-40b-relu", "opt"])
def test_packed_rows_are_those_of_the_floats(name, exported):
    weights = FileWeights.read(GGUFFile(exported(name)[1] / "m.gguf"))
    for slot, layer, part, tensor in weights:
        if part == "weight" and len(tensor.shape) > 1:
            matrix = weights.packed(slot, layer)
            values = matrix.data.view(np.float32).reshape(-1, matrix.width)
            values = values if matrix.order is None else values[matrix.order]
            np.testing.assert_array_equal(values, weights.floats(slot, layer))
            assert values.shape == (matrix.n, matrix.width)
            some = matrix.take(np.array([3, 1]))
            np.testing.assert_array_equal(some.data.view(np.float32), values[[3, 1]].reshape(-1))


# A llama.cpp and a transformers in which everything has another name, the layers too
OTHER_GGUF = {slot: name.replace("blk.{}", "b.{}.x") + "_other" for slot, name in GGUF.items()}


def renamed_model(name, like, exported, tmp_path):
    """The checkpoint of `like` under another family's names."""
    model, _ = exported(like)
    ours, theirs = families.FAMILIES[name].naming.names, families.FAMILIES["llama"].naming.names
    spec, folder, tensors = ModelSpec.from_config(FAMILIES[like]), tmp_path / "model", {}
    file = SafetensorsFile(model / "model.safetensors")
    for slot, layer in slots_of(spec):
        old, new = (f"{names[slot].format(layer)}.weight" for names in (theirs, ours))
        tensors[new] = file.load(old)
    folder.mkdir()
    storage.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    storage.write_json(folder / "config.json", FAMILIES[like] | {"model_type": name})
    return folder


def test_a_family_of_new_names_is_a_new_row(exported, tmp_path, monkeypatch):
    """Exported, read, and run by every engine in every mode, with the logits of the same Llama."""
    row, file_row = families.FAMILIES["llama"], families.ARCHITECTURES["llama"]
    names = {slot: f"net.{name.replace('layers', 'floors')}.w" for slot, name in row.naming.names.items()}
    family = replace(row, naming=Naming(names), dense="made-up", sparse="made-up")
    monkeypatch.setitem(families.FAMILIES, "made-up", family)
    naming = replace(file_row.naming, names=OTHER_GGUF)
    architecture = replace(file_row, naming=naming, model_type="made-up")
    monkeypatch.setitem(families.ARCHITECTURES, "made-up", architecture)
    model = renamed_model("made-up", "llama", exported, tmp_path)
    predictors = random_predictors(exported("llama")[0], tmp_path / "predictors")
    predictors.model_fingerprint = fingerprint(str(model))
    options = {"name": "m", "fingerprint": fingerprint(str(model)), "options": ExportOptions("f32")}
    export_bundle(HFCheckpoint(model), tmp_path / "bundle", predictors=predictors, **options)
    file = GGUFFile(tmp_path / "bundle" / "m.powerinfer.gguf")
    assert file.metadata["general.architecture"] == "made-up"
    assert "b.1.x.ffn_gate_other.weight" in file.tensors and not set(GGUF.values()) & set(file.tensors)
    for mode in ("exact", "predicted"):
        for load in (
            lambda *path: Engine.load(*path, 1, n_ctx=64),
            lambda *path: GpuEngine.load(*path, "cpu"),
        ):
            same, other = (load(bundle, mode) for bundle in (exported("llama")[1], tmp_path / "bundle"))
            logits = same.prefill(IDS, all_logits=True)
            np.testing.assert_array_equal(other.prefill(IDS, all_logits=True), logits)


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "changes, layers, message",
    [
        ({"intermediate_size": [128, 0]}, (LayerSpec(128), LayerSpec(0, ffn="none")), "layers that differ"),
        ({"intermediate_size": [128, 96]}, (LayerSpec(128), LayerSpec(96)), "got gated 96, expected .*128"),
        (EXPERTS, (LayerSpec(128, n_experts=4, n_used=2),) * 2, r"mixture of experts \(got 4"),
    ],
)
def test_layers_that_differ_are_described_and_refused_by_name(changes, layers, message, exported, tmp_path):
    spec = ModelSpec.from_config(FAMILIES["llama"] | changes)
    assert spec.layers == layers
    with pytest.raises(UnsupportedError, match=message):
        spec.check_layers()
    with pytest.raises(UnsupportedError, match=message):
        _ = spec.d_ff
    file = GGUFFile(exported("llama")[1] / "m.powerinfer.gguf")
    exact = {int: np.uint32, float: np.float32}
    metadata = {k: exact.get(type(v), lambda same: same)(v) for k, v in file.metadata.items()}
    sizes = [layer.d_ff for layer in layers]
    metadata["llama.feed_forward_length"] = np.array(sizes, np.uint32)
    metadata |= {"llama.expert_count": np.uint32(layers[0].n_experts)}
    metadata |= {"llama.expert_used_count": np.uint32(layers[0].n_used)}
    path = tmp_path / "m.gguf"
    write_gguf(path, metadata, [copied(tensor) for tensor in file.tensors.values()], magic="PWRI")
    assert ModelSpec.from_gguf(GGUFFile(path)).layers == layers
    for engine in (Engine, lambda path, mode, *rest: GpuEngine.load(path, mode, "cpu", n_ctx=16)):
        with pytest.raises(UnsupportedError, match=message):
            engine(path, "exact", 1, 16)
