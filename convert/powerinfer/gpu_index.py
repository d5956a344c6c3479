"""`MODEL.generated.gpuidx`: which neurons PowerInfer keeps on the GPU.

A GGUF file with the magic `PWRI` and two I32 tensors per layer, which PowerInfer finds by their position
(llama.cpp's `load_gpu_idx_for_layers`): `blk.N.gpu_idx` [d_ff], 1 for a neuron on the GPU, and
`blk.N.gpu_bucket`, the ascending indices of those. Its own exporter sorts the activation files as strings,
so that with more than ten layers `blk.2` gets the neurons of layer 10; here layers are in the order of
their numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hotcold.convert.gguf.write import TensorPlan, write_gguf
from hotcold.errors import FormatError, InputError
from hotcold.files.gguf import GGUFFile
from hotcold.identify import GPU_INDEX

__all__ = ["GpuIndex", "hottest_neurons", "neurons_that_fit"]

_CAPACITY = "split.vram_capacity"
_GROUP = 256  # neurons that PowerInfer's solver moves together


def hottest_neurons(firing: list[np.ndarray], n_neurons: int, group: int = _GROUP) -> list[np.ndarray]:
    """Per layer the ascending indices int32 of the neurons to keep on the GPU, `n_neurons` of all at most.

    What PowerInfer's integer program comes to with its threshold of 0 (powerinfer-py's solver.py): each
    layer's neurons in groups by falling count, and of all groups those with the greatest sums. Ties go to
    the lower layer and index.
    """
    orders = [np.argsort(-counts, kind="stable") for counts in firing]
    groups = [
        (float(counts[order[start : start + group]].sum()), layer, start)
        for layer, (counts, order) in enumerate(zip(firing, orders, strict=True))
        for start in range(0, len(order), group)
    ]
    kept, left = [0] * len(firing), n_neurons
    for _, layer, start in sorted(groups, key=lambda entry: (-entry[0], entry[1], entry[2])):
        size = min(group, len(orders[layer]) - start)
        if size > left:
            break
        kept[layer], left = start + size, left - size
    return [np.sort(order[:n]).astype(np.int32) for order, n in zip(orders, kept, strict=True)]


@dataclass(frozen=True, slots=True)
class GpuIndex:
    """The neurons of each layer that lie on the GPU: ascending int32 indices below `d_ff`.

    PowerInfer makes its own split unless `vram_capacity`, in bytes, is within what it has for the FFN.
    """

    buckets: list[np.ndarray]
    d_ff: int
    vram_capacity: int

    def write(self, path: str | Path) -> None:
        """Write the file atomically. StorageError if the write fails."""
        metadata = {
            "general.architecture": GPU_INDEX,
            "generic.gpu_index.block_count": np.uint32(len(self.buckets)),
            _CAPACITY: np.uint64(self.vram_capacity),
            "hotcold.version": np.uint32(1),
        }
        plans = [plan for layer in range(len(self.buckets)) for plan in self._plans(layer)]
        write_gguf(path, metadata, plans, magic="PWRI")

    def masks(self) -> list[np.ndarray]:
        """Per layer int32 [d_ff], 1 for the neurons on the GPU."""
        masks = [np.zeros(self.d_ff, np.int32) for _ in self.buckets]
        for mask, bucket in zip(masks, self.buckets, strict=True):
            mask[bucket] = 1
        return masks

    def _plans(self, layer: int) -> list[TensorPlan]:
        mask, bucket = self.masks()[layer], self.buckets[layer]
        return [
            TensorPlan(f"blk.{layer}.gpu_idx", mask.shape, "I32", lambda: mask),
            TensorPlan(f"blk.{layer}.gpu_bucket", bucket.shape, "I32", lambda: bucket),
        ]

    @classmethod
    def read(cls, file: GGUFFile) -> GpuIndex:
        """Raises FormatError if tensors are missing, out of order, or contradict each other."""
        if file.require("general.architecture", str) != GPU_INDEX:
            got = file.metadata["general.architecture"]
            raise FormatError("not a GPU index", where=file.path, field="general.architecture", got=got)
        names = list(file.tensors)
        n_layers = len(names) // 2
        expected = [f"blk.{n}.{name}" for n in range(n_layers) for name in ("gpu_idx", "gpu_bucket")]
        if names != expected or not names:
            wrong = next((a for a, b in zip(names, expected, strict=False) if a != b), "tensors")
            raise FormatError("wrong order of tensors", where=file.path, field=wrong)
        buckets = [_bucket(file, layer) for layer in range(n_layers)]
        return cls(buckets, len(_int32(file, "blk.0.gpu_idx")), file.require(_CAPACITY, int))


def _bucket(file: GGUFFile, layer: int) -> np.ndarray:
    mask, bucket = _int32(file, f"blk.{layer}.gpu_idx"), _int32(file, f"blk.{layer}.gpu_bucket")
    if len(mask) != len(_int32(file, "blk.0.gpu_idx")):
        raise FormatError("d_ff differs from layer 0", where=file.path, field=f"blk.{layer}.gpu_idx")
    if not np.array_equal(np.flatnonzero(mask), bucket) or not np.isin(mask, (0, 1)).all():
        what = "not the ascending indices of the ones in gpu_idx"
        raise FormatError(what, where=file.path, field=f"blk.{layer}.gpu_bucket")
    return bucket


def _int32(file: GGUFFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    if tensor.type != "I32" or len(tensor.shape) != 1:
        got = f"{tensor.type} {list(tensor.shape)}"
        raise FormatError("not an I32 vector", where=file.path, field=name, got=got)
    return tensor.data.view("<i4")


def neurons_that_fit(vram: float, bytes_per_neuron: int) -> int:
    """How many neurons of `bytes_per_neuron` fit into `vram` bytes; InputError for none."""
    n_neurons = int(vram // bytes_per_neuron)
    if n_neurons < 1:
        raise InputError("no neuron fits", where="--vram-budget", got=f"{vram:.0f} bytes")
    return n_neurons
