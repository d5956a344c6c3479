"""Files that break the format: each is refused by the name of the broken field, without allocating for it."""

from __future__ import annotations

import contextlib
import os
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed_gguf import (
    BAD,
    BOOL,
    F32,
    F64,
    GOOD,
    I32,
    LLAMA_CPP,
    ONE,
    SIZES,
    TAKEN_BY_THE_GGUF_PACKAGE,
    U8,
    U64,
)  # fmt: skip

from hotcold.errors import FormatError, InputError
from hotcold.files.gguf import GGUFFile


@pytest.mark.parametrize("name", BAD)
def test_a_broken_file_is_refused_by_the_field_that_breaks(name, tmp_path):
    data, field = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            GGUFFile(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    error = caught.value
    assert error.field == field
    assert str(error).startswith(f"{path} at byte {error.offset}, {field}: ")
    assert 0 <= error.offset <= len(data)
    assert str(error).isprintable()
    assert peak < 1 << 20


def test_the_34_cases_of_llama_cpp_are_among_them():
    names = set(LLAMA_CPP.values())
    assert len(LLAMA_CPP) == len(names) == 34
    assert names <= BAD.keys() | GOOD.keys()
    assert sum(name in GOOD for name in names) == 7


@pytest.mark.parametrize("name", TAKEN_BY_THE_GGUF_PACKAGE)
def test_the_gguf_package_takes_what_we_refuse(name, tmp_path):
    """Why hotcold has a reader of its own. Once the package refuses one too, the list becomes shorter."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[name][0] + bytes(256))
    with contextlib.suppress(RuntimeWarning), np.errstate(all="ignore"):
        gguf.GGUFReader(path)
    with pytest.raises(FormatError):
        GGUFFile(path)


def test_every_prefix_of_a_good_file_is_refused_or_good(tmp_path):
    path = tmp_path / "cut.gguf"
    for n in range(len(ONE) - 16):  # the last 16 bytes are padding
        path.write_bytes(ONE[:n])
        with pytest.raises(FormatError):
            GGUFFile(path)
    for n in range(len(ONE) - 16, len(ONE) + 1):
        path.write_bytes(ONE[:n])
        assert GGUFFile(path).tensors["t"].data.size == 16


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mixture_of_the_files_above_is_refused_or_read(data, tmp_path):
    seeds = [*GOOD.values(), *(bad for bad, _ in BAD.values())]
    content = bytearray(data.draw(st.sampled_from(seeds)))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 16))
        piece = st.sampled_from(
            [*SIZES, data.draw(st.binary(max_size=16)), data.draw(st.sampled_from(seeds))[start:]]
        )
        content[start : start + length] = data.draw(piece)
    path = tmp_path / "mixed.gguf"
    path.write_bytes(content)
    try:
        file = GGUFFile(path)
    except FormatError as error:
        assert str(error).isprintable()
    else:
        assert all(tensor.data.nbytes <= len(content) for tensor in file.tensors.values())


def test_every_single_bit_flip_is_refused_or_read_without_another_error(tmp_path):
    path = tmp_path / "flip.gguf"
    refused = 0
    for bit in range(8 * len(ONE)):
        data = bytearray(ONE)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            GGUFFile(path)
        except FormatError:
            refused += 1
    assert refused > 8 * 24  # magic, version, counts at least


@pytest.mark.parametrize("name", GOOD)
def test_what_the_format_allows_is_read(name, tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(GOOD[name])
    file = GGUFFile(path)
    assert all(tensor.data.flags.writeable is False for tensor in file.tensors.values())


def test_values_have_python_types(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(GOOD["every value type"])
    metadata = GGUFFile(path).metadata
    assert (metadata["s"], metadata["strings"], metadata["empty"]) == ("ü", ["", "é"], [])
    assert metadata["bools"].tolist() == [False, True]
    kinds = {U8: int, I32: int, U64: int, F32: float, F64: float, BOOL: bool}
    assert all(type(metadata[f"k{kind}"]) is wanted for kind, wanted in kinds.items())


def test_a_missing_file_a_folder_and_a_pipe_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        GGUFFile(tmp_path / "none.gguf")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match="not a regular file"):
            GGUFFile(path)


def test_require_says_what_is_missing_or_of_another_type(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(GOOD["every value type"])
    file = GGUFFile(path)
    assert file.require("s", str) == "ü"
    with pytest.raises(FormatError, match=r"llama\.block_count: missing metadata key"):
        file.require("llama.block_count", int)
    with pytest.raises(FormatError, match=r"got str, expected int"):
        file.require("s", int)
    with pytest.raises(FormatError, match=r"got bool, expected int"):
        file.require(f"k{BOOL}", int)
