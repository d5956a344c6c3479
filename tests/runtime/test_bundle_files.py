"""Finding a bundle's files. What a manifest may not hold is tested with `hotcold.convert.bundle.manifest`."""

from __future__ import annotations

import shutil

import pytest

from hotcold.errors import FormatError, InputError
from hotcold.runtime.bundle_files import ModelPath, file_of_role, find_model
from hotcold.runtime.cpu.engine import CpuEngine as Engine


def test_the_first_role_that_is_there(bundle, make_bundle):
    assert file_of_role(bundle.path, "sparse") == bundle.path / "tiny.powerinfer.gguf"
    assert file_of_role(bundle.path, "dense", "sparse") == bundle.path / "tiny.gguf"
    silu = make_bundle(activation="silu")
    assert file_of_role(silu.path, "sparse", "dense") == silu.path / "tiny.gguf"
    with pytest.raises(InputError, match="the bundle has no sparse file"):
        file_of_role(silu.path, "sparse")
    with pytest.raises(InputError, match="the bundle has no sparse or predictor file"):
        file_of_role(silu.path, "sparse", "predictor")


@pytest.mark.parametrize("place", [".", "nowhere"])
def test_no_bundle(tmp_path, place):
    with pytest.raises(
        InputError, match=r"not a bundle: no manifest\.json; create one with `hotcold export`"
    ):
        file_of_role(tmp_path / place, "dense")


def test_a_file_that_is_missing(bundle, tmp_path):
    folder = shutil.copytree(bundle.path, tmp_path / "copy")
    (folder / "tiny.gguf").unlink()
    with pytest.raises(InputError, match=r"tiny\.gguf: the manifest names a file that is missing"):
        file_of_role(folder, "dense")


def test_a_broken_manifest(bundle, tmp_path):
    folder = shutil.copytree(bundle.path, tmp_path / "copy")
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("tiny.gguf", "../tiny.gguf"))
    with pytest.raises(FormatError, match=r"manifest\.json, (sha256|files)"):
        file_of_role(folder, "dense")


def test_what_a_model_offers(bundle, make_bundle, tmp_path):
    assert ModelPath(bundle.path).modes == ["dense", "exact", "predicted"]
    assert ModelPath(bundle.path / "tiny.powerinfer.gguf").modes == ["exact", "predicted"]
    assert ModelPath(make_bundle(activation="silu").path).modes == ["dense"]
    odd = shutil.copy(bundle.path / "tiny.gguf", tmp_path / "a file without an ending")
    assert ModelPath(odd).modes == ["dense"]
    assert Engine.load(odd, "dense", 1).mode == "dense"


def test_a_mode_that_is_not_offered_says_what_is(bundle, make_bundle, tmp_path):
    silu = make_bundle(activation="silu")
    with pytest.raises(InputError, match=r"got exact, expected dense\); export a model with exact zeros"):
        ModelPath(silu.path).file_for("exact")
    with pytest.raises(InputError, match=r"got dense, expected exact or predicted\); add a dense file"):
        Engine.load(bundle.path / "tiny.powerinfer.gguf", "dense")
    with pytest.raises(
        InputError, match=r"unknown mode \(got fast, expected auto, dense, exact, predicted\)"
    ):
        ModelPath(bundle.path).file_for("fast")


def test_a_dense_file_runs_beside_a_broken_one(bundle, tmp_path):
    folder = shutil.copytree(bundle.path, tmp_path / "copy")
    (folder / "tiny.powerinfer.gguf").write_bytes(b"PWRI")
    assert ModelPath(folder).file_for("dense") == folder / "tiny.gguf"


def test_names_of_models(bundle, tmp_path):
    assert find_model(str(bundle.path)) == bundle.path
    assert find_model(bundle.path / "tiny.gguf") == bundle.path / "tiny.gguf"
    assert find_model("smollm2").suffix == ".gguf"
    with pytest.raises(InputError, match="no such model"):
        find_model(str(tmp_path / "nowhere.gguf"))
