"""Pickles: tensors come out, nothing else does, whatever is in the file."""

from __future__ import annotations

import os
import pickle  # noqa: TID251 - what attackers use
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hotcold.convert.powerinfer import pickle_child
from hotcold.convert.powerinfer.pickles import Limits, read_pickles
from hotcold.errors import FormatError, InputError


def crafted(path: Path, program: bytes) -> Path:
    """A PyTorch file whose pickle is this program."""
    torch.save({"a": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, program if name.endswith("data.pkl") else content)
    return path


def calling(function: object, *arguments: object) -> bytes:
    class Call:
        def __reduce__(self):
            return function, arguments

    return pickle.dumps(Call(), 2)


# bytearray(2**40), which weights_only allows
MEMORY_BOMB = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R."
# t = (); t = (t, t), 64 times; {t: 1}: to hash it takes 2**64 steps
ENDLESS = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 64 + b"}h\x00K\x01s."


def test_tensors_of_every_float_type_come_as_float32(tmp_path):
    values = {
        "half": torch.arange(6).half().view(2, 3),
        "b": torch.ones(2).bfloat16(),
        "d": torch.zeros(1).double(),
    }
    torch.save(values, tmp_path / "0.pt")
    torch.save(torch.tensor([3, 1, 4]), tmp_path / "1.pt")
    torch.save({"turned": torch.arange(6.0).view(2, 3).t()}, tmp_path / "2.pt")
    first, second, third = read_pickles([tmp_path / f"{n}.pt" for n in range(3)], allowed=True)
    assert set(first) == set(values)
    np.testing.assert_array_equal(first.load("half"), [[0, 1, 2], [3, 4, 5]])
    assert second.floats("tensor", (3,)).tolist() == [3, 1, 4]
    assert third.floats("turned", (3, 2)).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_without_the_flag_nothing_is_read(tmp_path):
    with pytest.raises(InputError, match=r"a pickle, which can run code.*--allow-pickle"):
        read_pickles([tmp_path / "not even there.pt"], allowed=False)


def test_code_in_a_pickle_does_not_run(tmp_path):
    file = crafted(tmp_path / "m.pt", calling(os.system, f"touch {tmp_path}/ran"))
    with pytest.raises(FormatError, match=r"m\.pt, pickle: .*it would run \w+\.system"):
        read_pickles([file], allowed=True)
    assert not (tmp_path / "ran").exists()


def test_a_memory_bomb_is_stopped(tmp_path):
    with pytest.raises(FormatError, match="needs more memory than a file of its size should"):
        read_pickles([crafted(tmp_path / "m.pt", MEMORY_BOMB)], allowed=True)


def test_a_tensor_that_claims_more_than_it_holds_is_stopped(tmp_path):
    torch.save(torch.ones(1).expand(1 << 40), tmp_path / "m.pt")
    assert (tmp_path / "m.pt").stat().st_size < 4096
    with pytest.raises(FormatError, match=r"not a file of tensors: .*can't allocate memory"):
        read_pickles([tmp_path / "m.pt"], allowed=True)


def test_an_endless_pickle_is_stopped_and_named(tmp_path):
    torch.save(torch.ones(1), tmp_path / "0.pt")
    files = [tmp_path / "0.pt", crafted(tmp_path / "1.pt", ENDLESS)]
    with pytest.raises(FormatError, match=r"1\.pt, pickle: .*needs more than 1 s"):
        read_pickles(files, allowed=True, limits=Limits(seconds=1))


@pytest.mark.parametrize(
    "value, message",
    [
        ([torch.ones(1)], "neither a tensor nor a dictionary of tensors, but list"),
        ({"a": torch.ones(1), "b": 3}, "the entry 'b' is not a tensor"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "the tensor 'a' does not hold plain numbers"),
    ],
)
def test_other_things_than_tensors_are_refused(tmp_path, value, message):
    with pytest.raises(TypeError, match=message):
        pickle_child._floats(value)


def test_no_file_and_no_pickle(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_pickles([tmp_path / "m.pt"], allowed=True)
    (tmp_path / "m.pt").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match=r"m\.pt, pickle: not a file of tensors"):
        read_pickles([tmp_path / "m.pt"], allowed=True)
