"""Hot neurons on devices, cold ones on the CPU, at the same time.

How a device and the CPU share a layer is in hybrid_stage.py. Layers that do not fit the devices at all run on
the CPU engine, after the others. In `dense` mode layers are on one side or the other as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from pathlib import Path
from typing import Self

import torch

from hotcold.cpus import thread_count
from hotcold.errors import MismatchError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model.spec import ModelSpec
from hotcold.model.weights import FileWeights
from hotcold.runtime.gpu.cpu_share import MAX_BLOCK
from hotcold.runtime.gpu.cpu_side import CpuSide
from hotcold.runtime.gpu.device import open_devices
from hotcold.runtime.gpu.engine import GpuEngine, file_and_mode
from hotcold.runtime.gpu.hybrid_sequence import HybridSequence
from hotcold.runtime.gpu.layers import MAX_TOKENS
from hotcold.runtime.gpu.telemetry import Telemetry
from hotcold.runtime.gpu.weights import DeviceWeights, host_embedding, read_weights
from hotcold.runtime.placement.plan import Placement
from hotcold.runtime.placement.problem import part_bytes

__all__ = ["HybridEngine"]


class HybridEngine(GpuEngine):
    """A model on devices and the CPU."""

    _first: HybridSequence

    def __init__(
        self,
        path: str | Path,
        mode: str,
        devices: Many[torch.device],
        placement: Placement,
        n_threads: int | None = None,
        n_ctx: int = 2048,
    ) -> None:
        """Load the GGUF file `path` as `placement` says. Raises InputError, FormatError, UnsupportedError."""
        self.placement, self._threads = placement, n_threads
        super().__init__(path, mode, devices, n_ctx)
        self.n_threads = n_threads or self.n_threads

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        placement: Placement,
        mode: str = "auto",
        device: str = "cuda",
        n_threads: int | None = None,
        n_ctx: int = 2048,
    ) -> Self:
        """Open a bundle folder or one GGUF file; `auto` is the most sparse mode there is."""
        path, mode = file_and_mode(bundle, mode)
        return cls(path, mode, open_devices(device), placement, n_threads, n_ctx)

    def _load(self, file: GGUFFile) -> None:
        _check_inputs(file, self.shape)
        _check_placement(self.placement, self.shape, self.mode, len(self.devices))
        self.sizes = part_bytes(file)
        n_threads = thread_count(self._threads)
        self.cpu = CpuSide(file, self.placement, self.mode, n_threads)
        # One row of it is read per token: device memory is for what every token reads as a whole.
        self.embedding = None if FileWeights.read(file).head_is_embedding() else host_embedding(file)
        self._read_parts(file, self.placement.spans)
        # Decoding a quantized matrix for a dense product would take memory that the plan has no room for.
        layers = [layer for weights in self.parts for layer in weights.layers]
        quantized = any(not layer.o.data.is_floating_point() for layer in layers)
        self.block = MAX_TOKENS if quantized else MAX_BLOCK

    def _read_part(self, file: GGUFFile, device: torch.device, layers: range, last: bool) -> DeviceWeights:
        hot, predicted = [self.placement.layers[i].hot for i in layers], self.mode == "predicted"
        parts = {"with_embedding": self.embedding is None, "with_head": last}
        return read_weights(file, device, layers, hot, with_predictors=predicted, **parts)

    def _converted(self) -> set[str]:
        return super()._converted() | self.cpu.converted

    def _open(self, engine: Self, n_ctx: int) -> HybridSequence:
        return HybridSequence(engine, n_ctx)

    def measured(self) -> Telemetry:
        """The first sequence's telemetry."""
        return self._first.measured()


def _check_inputs(file: GGUFFile, shape: ModelSpec) -> None:
    """A neuron on the CPU does not know which token it is computed for, and the first one keeps all."""
    if any(rule.site == "down" for rule in shape.inputs):
        what = "the hybrid backend leaves out no inputs of down, as this model's rules want it"
        raise UnsupportedError(what, where=file.path, fix="use --backend cpu or gpu")


def _check_placement(placement: Placement, shape: ModelSpec, mode: str, n_devices: int) -> None:
    got = (len(placement.layers), placement.layers[0].d_ff)
    if got != (shape.n_layers, shape.d_ff):
        raise MismatchError("this plan is for another model", got=got, expected=(shape.n_layers, shape.d_ff))
    split = [i for i, layer in enumerate(placement.layers) if layer.on_device and len(layer.cold)]
    if mode == "dense" and split:
        raise MismatchError("dense mode needs a plan with whole layers", got=f"layer {split[0]} is split")
    if placement.spans[-1][0] >= n_devices:
        got, fix = f"{n_devices} here", "list as many with --device"
        raise MismatchError(
            "this plan is for more devices", got=got, expected=len(placement.budgets), fix=fix
        )
