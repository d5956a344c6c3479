"""Predictors of another kind than PowerInfer's on the way between formats."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hotcold import storage
from hotcold.cli import main
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.bundle.manifest import MANIFEST, BundleFile, Manifest
from hotcold.convert.bundle.verify import verify_bundle
from hotcold.files.gguf import GGUFFile
from hotcold.model.checkpoint import fingerprint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle
from hotcold.predictor.kinds.table import KINDS

N_LAYERS, D_MODEL, D_FF, RANK = 3, 64, 160, 32


@pytest.fixture(scope="module")
def bundle(make_model, tmp_path_factory) -> Path:
    model, rng = make_model("relu"), np.random.default_rng(0)
    shapes = [(RANK, D_MODEL), (D_FF, RANK), (D_FF,)]
    layers = []
    for _ in range(N_LAYERS):
        fc1, fc2, bias = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        layers.append(LayerPredictor(fc1, fc2, 0.25, None, None, bias, KINDS["svd"]))
    out = tmp_path_factory.mktemp("exported") / "bundle"
    digest = fingerprint(str(model))
    export_bundle(
        HFCheckpoint(model), out, name="m", fingerprint=digest, folder=model,
        predictors=PredictorBundle(digest, layers), options=ExportOptions("f16"),
    )  # fmt: skip
    return out


def test_the_sparse_file_names_the_kind(bundle, capsys):
    file = GGUFFile(bundle / "m.powerinfer.gguf")
    assert file.require("hotcold.predictor.kind", str) == "svd"
    assert "powerinfer.sparse_threshold" not in file.metadata
    bias, own = file.tensors["blk.1.fc2.bias"], PredictorBundle.load(bundle / "predictors").layers[1].bias
    assert bias.type == "F32" and bias.data.tobytes() == own.tobytes()
    assert file.tensors["blk.1.fc2.weight"].type == "Q8_0"
    assert verify_bundle(bundle) == []
    for path in (bundle, bundle / "predictors", bundle / "m.powerinfer.gguf"):
        assert main(["inspect", str(path), "--json"]) == 0
        described = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert described["predictor_kind"] == "svd" and described["layers"][1]["rank"] == RANK


@pytest.mark.parametrize("to", ["powerinfer", "model-pt"])
@pytest.mark.parametrize("source", ["", "m.powerinfer.gguf"])
def test_powerinfers_formats_are_refused(bundle, tmp_path, capsys, to, source):
    assert main(["convert", str(bundle / source), "--to", to, "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert "PowerInfer knows no such predictors (got svd, expected lowrank-mlp)" in error
    assert error.count("\n") == 1 and not (tmp_path / "o").exists()


def test_out_of_the_sparse_file_and_back(bundle, tmp_path):
    file = str(bundle / "m.powerinfer.gguf")
    assert main(["convert", file, "--to", "predictors", "--out", str(tmp_path / "p")]) == 0
    found, own = PredictorBundle.load(tmp_path / "p"), PredictorBundle.load(bundle / "predictors")
    assert found.kind is KINDS["svd"] and found.thresholds == own.thresholds
    for one, other in zip(found.layers, own.layers, strict=True):
        np.testing.assert_array_equal(one.bias, other.bias)
        np.testing.assert_allclose(one.fc2, other.fc2, atol=0.02)  # by way of Q8_0
    assert main(["convert", file, "--to", "bundle", "--out", str(tmp_path / "b")]) == 0
    assert verify_bundle(tmp_path / "b") == []
    tensors = [GGUFFile(path).tensors for path in (Path(file), tmp_path / "b/m.powerinfer.gguf")]
    for name in ("blk.1.fc1.weight", "blk.1.fc2.weight", "blk.1.fc2.bias"):
        assert tensors[0][name].data.tobytes() == tensors[1][name].data.tobytes()


def test_a_kind_that_the_tensors_contradict(bundle, tmp_path):
    """Predictors without their biases, in a manifest with right hashes, are not those of the sparse file."""
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    own = PredictorBundle.load(bundle / "predictors")
    plain = [LayerPredictor(layer.fc1, layer.fc2, layer.threshold) for layer in own.layers]
    PredictorBundle(own.model_fingerprint, plain).write_files(copy / "predictors")
    manifest = Manifest.read(copy)
    roles = {name: BundleFile.of(copy / name, file.role) for name, file in manifest.files.items()}
    storage.write_json(copy / MANIFEST, replace(manifest, files=roles).to_json())
    (error,) = verify_bundle(copy)
    assert "powerinfer.sparse_threshold: missing metadata key" in str(error)
