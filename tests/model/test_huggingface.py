"""Weights of HF directories: every float dtype, shards, and what may be broken about them."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hotcold.errors import FormatError, InputError, UnsupportedError
from hotcold.files.json import read_json
from hotcold.files.safetensors import SafetensorsFile
from hotcold.model.huggingface import HFCheckpoint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype_reads_as_torch_does(dtype, tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(5, 7).to(dtype),
        "b": torch.tensor([], dtype=dtype),
        "c": torch.tensor(3.0).to(dtype),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert set(file) == set(tensors)
    for name, tensor in tensors.items():
        assert file.shape(name) == tuple(tensor.shape)
        loaded = file.load(name)
        assert loaded.dtype == np.float32
        np.testing.assert_array_equal(loaded, tensor.float().numpy())


def test_integers_and_missing_names_are_refused(tmp_path):
    save_file({"ids": torch.tensor([1])}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    with pytest.raises(UnsupportedError, match="dtype of ids"):
        file.load("ids")
    with pytest.raises(FormatError, match="weight: missing tensor"):
        file.load("weight")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff{}}",
    ],
)
def test_a_broken_file_is_a_format_error(data, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="not a safetensors file"):
        SafetensorsFile(tmp_path / "m.safetensors")


def test_truncated_weights_are_a_format_error(tmp_path):
    save_file({"a": torch.ones(99)}, tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:-1])
    with pytest.raises(FormatError, match="not a safetensors file"):
        SafetensorsFile(tmp_path / "m.safetensors")


def sharded(folder, weight_map):
    save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-2.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards(tmp_path):
    folder = sharded(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    checkpoint = HFCheckpoint(folder)
    assert checkpoint.names() == {"a", "b"}
    assert (checkpoint.load("a").tolist(), checkpoint.shape("b")) == ([1, 1], (3,))


@pytest.mark.parametrize(
    "weight_map, error, message",
    [
        ({"a": "model-9.safetensors"}, InputError, "no such file"),
        ({"a": "../model-1.safetensors"}, FormatError, "a shard outside of the folder"),
        (["a"], FormatError, "not a map of names to files"),
        ({"a": 1}, FormatError, "not a map of names to files"),
    ],
)
def test_a_broken_index_is_named(weight_map, error, message, tmp_path):
    with pytest.raises(error, match=message):
        HFCheckpoint(sharded(tmp_path, weight_map))


def test_an_index_that_names_a_tensor_its_shard_lacks(tmp_path):
    with pytest.raises(FormatError, match="b: missing tensor"):
        HFCheckpoint(sharded(tmp_path, {"b": "model-1.safetensors"}))


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no weights \(expected model\.safetensors or"):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_json_that_is_none(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match="not JSON"):
        read_json(tmp_path / "config.json")


def test_json_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(FormatError, match=r"not a JSON object \(got list, expected object\)"):
        read_json(tmp_path / "config.json")
    with pytest.raises(InputError, match="cannot read the file: No such file"):
        read_json(tmp_path / "none.json")
