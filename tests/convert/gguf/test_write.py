"""What we write, we and the `gguf` package read back; a failed write leaves nothing."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hotcold import storage
from hotcold.convert.gguf.write import TensorPlan, copied, planned, write_gguf
from hotcold.errors import ShapeError, StorageError
from hotcold.files.gguf import GGUFFile
from hotcold.files.quantize import quantize

numbers = [
    np.uint8,
    np.int8,
    np.uint16,
    np.int16,
    np.uint32,
    np.int32,
    np.float32,
    np.uint64,
    np.int64,
    np.float64,
]
keys = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20)
arrays = st.sampled_from(numbers).flatmap(
    lambda kind: hnp.arrays(
        kind, st.integers(0, 5), elements={"allow_nan": False} if kind in (np.float32, np.float64) else None
    )
)
values = st.one_of(
    st.text(max_size=30), st.booleans(), st.lists(st.text(max_size=9), max_size=5), arrays,
    arrays.filter(len).map(lambda array: array[0]),
)  # fmt: skip
shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
half = st.floats(-65504, 65504, width=32)  # what float16 holds: others are refused
tensors = st.dictionaries(
    keys, shapes.flatmap(lambda shape: hnp.arrays(np.float32, (*shape, 32), elements=half)), max_size=4
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metadata=st.dictionaries(keys.map(lambda key: f"k.{key}"), values, max_size=6),
    tensors=tensors,
    kind=st.sampled_from(["F32", "F16", "Q8_0"]),
    magic=st.sampled_from(["GGUF", "PWRI"]),
)
def test_round_trip(metadata, tensors, kind, magic, tmp_path):
    path = tmp_path / "a.gguf"
    with np.errstate(all="ignore"):
        plans = [planned(name, array.shape, kind, lambda a=array: a) for name, array in tensors.items()]
        write_gguf(path, metadata, plans, magic=magic)
        expected = {name: quantize(array, kind) for name, array in tensors.items()}
    file = GGUFFile(path)
    assert (file.magic, file.version) == (magic, 3)
    assert list(file.metadata) == list(metadata)
    for key, value in metadata.items():
        got = file.metadata[key]
        if isinstance(value, np.ndarray):
            assert got.dtype == value.dtype
            np.testing.assert_array_equal(got, value)
        else:
            assert got == value
            assert not isinstance(value, bool) or got is value
    assert list(file.tensors) == list(tensors)
    for name, array in tensors.items():
        assert (file.tensors[name].shape, file.tensors[name].type) == (array.shape, kind)
        assert file.tensors[name].data.tobytes() == expected[name].tobytes()


def test_the_gguf_package_reads_the_same(tmp_path):
    rng = np.random.default_rng(0)
    plans = [
        planned("a", (3, 64), "Q4_0", lambda: rng.standard_normal((3, 64))),
        planned("b", (5,), "F32", lambda: np.arange(5.0)),
        planned("c", (2, 3, 32), "F16", lambda: rng.standard_normal((2, 3, 32))),
    ]
    metadata = {
        "general.architecture": "llama",
        "n": np.uint32(7),
        "words": ["x", "yé"],
        "f": np.float32(0.1),
    }
    metadata |= {"ids": np.arange(4, dtype=np.int32), "yes": True}
    write_gguf(tmp_path / "a.gguf", metadata, plans)
    ours, theirs = GGUFFile(tmp_path / "a.gguf"), GGUFReader(tmp_path / "a.gguf")
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (tuple(map(int, tensor.shape[::-1])), tensor.tensor_type.name) == (mine.shape, mine.type)
        assert tensor.data.tobytes() == mine.data.tobytes()
    for key in metadata:
        assert theirs.get_field(key).contents() == np.asarray(ours.metadata[key]).tolist()


def test_a_tensor_is_copied_byte_for_byte_under_another_name_and_shape(tmp_path):
    write_gguf(tmp_path / "a.gguf", {}, [planned("a", (1, 2, 32), "Q4_0", lambda: np.ones((1, 2, 32)))])
    tensor = GGUFFile(tmp_path / "a.gguf").tensors["a"]
    write_gguf(tmp_path / "b.gguf", {}, [copied(tensor, "b", (2, 32))])
    again = GGUFFile(tmp_path / "b.gguf").tensors["b"]
    assert (again.shape, again.type, again.data.tobytes()) == ((2, 32), "Q4_0", tensor.data.tobytes())


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_gguf(tmp_path / name, {"k": "v"}, [planned("t", (32,), "F32", lambda: np.ones(32))])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("value", [1, 0.5, None, ("a",)])
def test_inexact_metadata_types_are_refused(value, tmp_path):
    with pytest.raises(TypeError, match=r"general\.x: GGUF needs an exact type"):
        write_gguf(tmp_path / "a", {"general.x": value}, [])


def test_a_tensor_that_is_not_as_planned_leaves_no_file(tmp_path):
    bad = [planned("t", (2, 32), "F32", lambda: np.ones((32, 2)))]
    with pytest.raises(ShapeError, match=r"t: wrong tensor shape \(got \(32, 2\), expected \(2, 32\)\)"):
        write_gguf(tmp_path / "a", {}, bad)
    with pytest.raises(ShapeError, match="t: wrong tensor size"):
        write_gguf(tmp_path / "a", {}, [TensorPlan("t", (32,), "F32", lambda: np.ones(31, np.float32))])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"k": "old"}, [])
    plans = [planned("t", (32,), "F32", lambda: np.ones(32))]
    for fail_at in range(4):  # header, its padding, data, its padding
        calls = iter(range(10))

        class Full(storage.FileSystem):
            def write(self, file, data, calls=calls, fail_at=fail_at):
                if next(calls) == fail_at:
                    raise OSError(28, "No space left on device")
                super().write(file, data)

        monkeypatch.setattr(storage, "fs", Full())
        with pytest.raises(StorageError, match="No space left"):
            write_gguf(path, {"k": "new"}, plans)
        assert GGUFFile(path).metadata == {"k": "old"}
        assert list(tmp_path.iterdir()) == [path]
