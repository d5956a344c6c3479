"""PowerInfer's GPU index: the split is the best one, and the file what its reader expects."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotcold.convert.gguf.write import TensorPlan, write_gguf
from hotcold.convert.powerinfer.gpu_index import GpuIndex, hottest_neurons, neurons_that_fit
from hotcold.errors import FormatError, InputError
from hotcold.files.gguf import GGUFFile

FIRING = st.lists(st.lists(st.integers(0, 99), min_size=6, max_size=6), min_size=1, max_size=3)


@given(FIRING, st.integers(0, 20))
def test_no_other_choice_of_groups_fires_more(counts, n_neurons):
    """Against all choices there are, as an integer program would see them: groups of 2 by falling count."""
    firing = [np.array(layer, np.float32) for layer in counts]
    kept = hottest_neurons(firing, n_neurons, group=2)
    got = sum(layer[neurons].sum() for layer, neurons in zip(firing, kept, strict=True))
    falling = [sorted(layer, reverse=True) for layer in counts]
    best = max(
        sum(sum(layer[: 2 * n]) for layer, n in zip(falling, groups, strict=True))
        for groups in itertools.product(range(4), repeat=len(counts))
        if 2 * sum(groups) <= n_neurons
    )
    assert got == best
    assert all((np.diff(neurons) > 0).all() and neurons.dtype == np.int32 for neurons in kept)


def test_a_last_group_may_be_smaller():
    kept = hottest_neurons([np.arange(5, dtype=np.float32)], 5, group=2)
    assert kept[0].tolist() == [0, 1, 2, 3, 4]


@pytest.fixture
def index() -> GpuIndex:
    """Twelve layers, so that an order by text would differ; one of them has nothing on the GPU."""
    buckets = [np.flatnonzero(np.arange(8) % 12 >= n).astype(np.int32) for n in range(12)]
    return GpuIndex(buckets, 8, 1 << 33)


def test_the_file_byte_by_byte(tmp_path):
    """Written out from the description of the format, not with our writer."""
    GpuIndex([np.array([1, 2], np.int32)], 4, 1 << 33).write(tmp_path / "i")

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"PWRI" + struct.pack("<IQQ", 3, 2, 4)
    head += text("general.architecture") + struct.pack("<I", 8) + text("generic.gpu_index")
    head += text("generic.gpu_index.block_count") + struct.pack("<II", 4, 1)
    head += text("split.vram_capacity") + struct.pack("<IQ", 10, 1 << 33)
    head += text("hotcold.version") + struct.pack("<II", 4, 1)
    head += text("blk.0.gpu_idx") + struct.pack("<IQIQ", 1, 4, 18, 0)
    head += text("blk.0.gpu_bucket") + struct.pack("<IQIQ", 1, 2, 18, 32)
    head += bytes(-len(head) % 32)
    data = struct.pack("<4i", 0, 1, 1, 0) + bytes(16) + struct.pack("<2i", 1, 2) + bytes(24)
    assert (tmp_path / "i").read_bytes() == head + data


def test_out_and_back_in_the_order_of_layers(index, tmp_path):
    index.write(tmp_path / "i")
    again = GpuIndex.read(GGUFFile(tmp_path / "i"))
    assert [bucket.tolist() for bucket in again.buckets] == [list(range(n, 8)) for n in range(8)] + [[]] * 4
    assert (again.d_ff, again.vram_capacity) == (8, 1 << 33)
    assert [mask.tolist() for mask in again.masks()][2] == [0, 0, 1, 1, 1, 1, 1, 1]


def plan(name: str, values: list[int], kind: str = "I32") -> TensorPlan:
    array = np.array(values, {"I32": np.int32, "F32": np.float32}[kind])
    return TensorPlan(name, array.shape, kind, lambda: array)


GOOD = (plan("blk.0.gpu_idx", [0, 1]), plan("blk.0.gpu_bucket", [1]))
BROKEN = {
    "turned": ((GOOD[1], GOOD[0]), "blk.0.gpu_bucket: wrong order of tensors"),
    "order of text": (
        (*GOOD, plan("blk.10.gpu_idx", [0]), plan("blk.10.gpu_bucket", [])),
        "blk.10",
    ),
    "odd": ((GOOD[0],), "blk.0.gpu_idx|tensors"),
    "other type": ((plan("blk.0.gpu_idx", [0, 1], "F32"), GOOD[1]), "not an I32 vector .got F32"),
    "other bucket": ((GOOD[0], plan("blk.0.gpu_bucket", [0])), "gpu_bucket: not the ascending indices"),
    "not a mask": ((plan("blk.0.gpu_idx", [0, 2]), GOOD[1]), "gpu_bucket: not the ascending indices"),
    "other width": ((*GOOD, plan("blk.1.gpu_idx", [1]), plan("blk.1.gpu_bucket", [0])), "d_ff differs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_name_the_tensor(tmp_path, name):
    plans, message = BROKEN[name]
    metadata = {"general.architecture": "generic.gpu_index", "split.vram_capacity": np.uint64(1)}
    write_gguf(tmp_path / "i", metadata, plans, magic="PWRI")
    with pytest.raises(FormatError, match=message):
        GpuIndex.read(GGUFFile(tmp_path / "i"))


def test_broken_metadata(tmp_path):
    for metadata, field in (
        ({"general.architecture": "llama"}, "general.architecture"),
        ({"general.architecture": "generic.gpu_index"}, "split.vram_capacity"),
    ):
        write_gguf(tmp_path / "i", metadata, GOOD, magic="PWRI")
        with pytest.raises(FormatError) as caught:
            GpuIndex.read(GGUFFile(tmp_path / "i"))
        assert caught.value.field == field


def test_budget():
    assert neurons_that_fit(1e6, 1000) == 1000
    with pytest.raises(InputError, match="no neuron fits"):
        neurons_that_fit(999, 1000)
