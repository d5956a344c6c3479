"""Split models: read as one, and refused where the parts do not fit."""

from __future__ import annotations

import numpy as np
import pytest

from hotcold.cli import main
from hotcold.convert.gguf.write import planned, write_gguf
from hotcold.errors import FormatError, InputError
from hotcold.files.gguf_split import gguf_sha256, open_gguf


def part(folder, number: int, count: int = 3, **changes: object):
    """Write one part with one tensor; `changes` replace parts of its metadata, or the name `tensor`."""
    metadata = {
        "split.no": np.uint16(number),
        "split.count": np.uint16(count),
        "split.tensors.count": np.int32(3),
    }
    metadata |= {"general.architecture": "llama"} if number == 0 else {}
    metadata |= {key.replace("_", "."): value for key, value in changes.items() if key != "tensor"}
    name = str(changes.get("tensor", f"t{number}"))
    path = folder / f"m-{number + 1:05d}-of-{count:05d}.gguf"
    write_gguf(path, metadata, [planned(name, (32,), "F32", lambda: np.full(32, number))])
    return path


def test_all_parts_are_read_as_one(tmp_path, capsys):
    first, *_ = [part(tmp_path, number) for number in range(3)]
    file = open_gguf(first)
    assert file.metadata["general.architecture"] == "llama"
    assert [tensor.data.view("<f4")[0] for tensor in file.tensors.values()] == [0, 1, 2]
    assert main(["inspect", str(first)]) == 0
    assert "t2" in capsys.readouterr().out


def test_a_file_that_is_not_split_is_read_as_it_is(tmp_path):
    write_gguf(tmp_path / "m.gguf", {"split.count": np.uint16(1)}, [])
    assert open_gguf(tmp_path / "m.gguf").tensors == {}


def test_a_missing_part_is_named(tmp_path):
    part(tmp_path, 1)
    with pytest.raises(InputError, match=r"m-00003-of-00003\.gguf: cannot open the file: No such file"):
        open_gguf(part(tmp_path, 0))


def test_another_part_than_the_first(tmp_path):
    with pytest.raises(
        InputError, match="not the first part of the model; use the file whose name ends in -00001"
    ):
        open_gguf(part(tmp_path, 1))


def test_a_name_that_does_not_fit_the_count(tmp_path):
    path = part(tmp_path, 0).rename(tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match=r"got renamed\.gguf, expected NAME-00001-of-00003\.gguf"):
        open_gguf(path)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"split_no": np.uint16(2)}, "split.no"),
        ({"split_count": np.uint16(4)}, "split.count"),
        ({"split_count": "3"}, "split.count"),
        ({"tensor": "t0"}, "t0"),
    ],
)
def test_a_part_that_does_not_fit(tmp_path, changes, field):
    first = part(tmp_path, 0)
    part(tmp_path, 1, **changes)
    with pytest.raises(FormatError) as caught:
        open_gguf(first)
    assert caught.value.field == field


def test_tensors_that_no_part_has(tmp_path):
    first = part(tmp_path, 0, split_tensors_count=np.int32(4))
    part(tmp_path, 1)
    part(tmp_path, 2)
    with pytest.raises(FormatError, match=r"got 3, expected 4") as caught:
        open_gguf(first)
    assert caught.value.field == "split.tensors.count"


def test_a_part_under_the_name_of_the_first(tmp_path):
    other = part(tmp_path, 1, count=2)
    with pytest.raises(
        InputError, match=r"named like the first part of the model.*got split\.no 1, expected 0"
    ):
        open_gguf(other.rename(tmp_path / "m-00001-of-00002.gguf"))


def test_parts_that_were_joined_as_bytes(tmp_path):
    parts = [part(tmp_path, number) for number in range(3)]
    (tmp_path / "all.gguf").write_bytes(b"".join(path.read_bytes() for path in parts))
    with pytest.raises(InputError, match=r"not a valid name for a part of a split model \(got all\.gguf"):
        open_gguf(tmp_path / "all.gguf")


def test_the_hash_is_of_all_parts_and_not_of_their_names(tmp_path):
    (tmp_path / "other").mkdir()
    first, _, last = [part(tmp_path, number) for number in range(3)]
    digest = gguf_sha256(open_gguf(first))
    for number in range(3):
        name = f"m-{number + 1:05d}-of-00003.gguf"
        (tmp_path / "other" / name.replace("m-", "n-")).write_bytes((tmp_path / name).read_bytes())
    assert gguf_sha256(open_gguf(tmp_path / "other" / "n-00001-of-00003.gguf")) == digest
    changed = bytearray(last.read_bytes())
    changed[-1] ^= 1
    last.write_bytes(changed)
    assert gguf_sha256(open_gguf(first)) != digest


def test_no_other_way_to_open_a_model_file():
    """Who constructs a GGUFFile would see one part of a split model."""
    import ast
    from pathlib import Path

    root = Path(__file__).parents[3]
    folders = (
        root / name for name in ("src", "model", "convert", "runtime", "eval", "predictor", "sparsify")
    )
    calls = {
        path.name
        for folder in folders
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "GGUFFile"
    }
    assert calls == {"gguf_split.py"}
