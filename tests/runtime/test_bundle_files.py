"""A manifest that is missing, broken or hostile is refused by name."""

from __future__ import annotations

import json

import pytest

from hotcold.errors import FormatError, InputError
from hotcold.runtime.bundle_files import file_of_role, read_manifest

GOOD = {"format": "hotcold-bundle", "version": 1, "files": {"a.gguf": {"role": "dense"}}}


def test_good(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(GOOD))
    (tmp_path / "a.gguf").touch()
    assert read_manifest(tmp_path) == GOOD
    assert file_of_role(tmp_path, "dense") == tmp_path / "a.gguf"


@pytest.mark.parametrize(
    "content,field,message",
    [
        ("{", None, "not JSON"),
        (b"\xff\xfe\xfd", None, "not JSON"),
        ("[]", "format", "got list, expected hotcold-bundle"),
        ("{}", "format", "not a bundle's manifest"),
        (GOOD | {"version": 2}, "version", "unknown version (got 2, expected 1); export the bundle again"),
        (GOOD | {"files": ["a.gguf"]}, "files", "no list of files"),
        (GOOD | {"files": {"a.gguf": "dense"}}, "files", "no list of files"),
        (
            GOOD | {"files": {"../a.gguf": {"role": "dense"}}},
            "files",
            "outside of the bundle (got ../a.gguf)",
        ),
        (GOOD | {"files": {"/etc/a": {"role": "dense"}}}, "files", "outside of the bundle (got /etc/a)"),
    ],
)
def test_broken(tmp_path, content, field, message):
    content = json.dumps(content) if isinstance(content, dict) else content
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(FormatError) as error:
        read_manifest(tmp_path)
    assert error.value.field == field and message in str(error.value)


def test_missing(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"not a bundle: no manifest\.json; `hotcold export` writes one"):
            read_manifest(path)
    (tmp_path / "manifest.json").write_text(json.dumps(GOOD))
    with pytest.raises(InputError, match="the manifest names a file that is missing"):
        file_of_role(tmp_path, "dense")
    with pytest.raises(InputError, match="the bundle has no sparse file"):
        file_of_role(tmp_path, "sparse")
