"""Finding a bundle's files. What a manifest may not hold is tested with `hotcold.convert.manifest`."""

from __future__ import annotations

import shutil

import pytest

from hotcold.errors import FormatError, InputError
from hotcold.runtime.bundle_files import file_of_role


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
    with pytest.raises(InputError, match=r"not a bundle: no manifest\.json; `hotcold export` writes one"):
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
