"""Hot neurons on devices, cold ones on the CPU, at the same time.

How a device and the CPU share a layer is in hybrid_stage.py. Layers that do not fit the devices at all run on
the CPU engine, after the others. In `dense` mode layers are on one side or the other as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from hotcold.cpus import thread_count
from hotcold.errors import MismatchError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model.inputs import rules_of_file
from hotcold.runtime.gpu.cpu_side import MAX_BLOCK, CpuSide
from hotcold.runtime.gpu.device import on, open_devices
from hotcold.runtime.gpu.engine import GpuEngine, file_and_mode
from hotcold.runtime.gpu.hybrid_stage import HybridStage
from hotcold.runtime.gpu.layers import MAX_TOKENS
from hotcold.runtime.gpu.telemetry import Telemetry
from hotcold.runtime.gpu.weights import host_embedding, read_weights
from hotcold.runtime.head import EMBEDDING, head_name
from hotcold.runtime.placement.plan import Placement
from hotcold.runtime.placement.problem import part_bytes
from hotcold.runtime.shape import ModelShape
from hotcold.runtime.stats import Stats

__all__ = ["HybridEngine"]


class HybridEngine(GpuEngine):
    """One sequence of tokens through a model on devices and the CPU; the contract is the CPU engine's."""

    _stages: list[HybridStage]

    def __init__(
        self,
        path: str | Path,
        mode: str,
        devices: Sequence[torch.device],
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
        self._sizes = part_bytes(file)
        n_threads = thread_count(self._threads)
        self._cpu = CpuSide(file, self.placement, self.mode, n_threads, self.n_ctx)
        # One row of it is read per token: device memory is for what every token reads as a whole.
        self._embedding = None if head_name(file) == EMBEDDING else host_embedding(file, self.shape)
        self._open_stages(file, self.placement.spans)
        # Decoding a quantized matrix for a dense product would take memory that the plan has no room for.
        layers = [layer for stage in self._stages for layer in stage.weights.layers]
        quantized = any(not layer.o.data.is_floating_point() for layer in layers)
        self._block = MAX_TOKENS if quantized else MAX_BLOCK

    def _open_stage(self, file: GGUFFile, device: torch.device, layers: range, last: bool) -> HybridStage:
        hot, predicted = [self.placement.layers[i].hot for i in layers], self.mode == "predicted"
        parts = {"with_embedding": self._embedding is None, "with_head": last}
        weights = read_weights(file, device, layers, hot, with_predictors=predicted, **parts)
        return HybridStage(weights, self.mode, self.n_ctx, self._cpu)

    def _converted(self) -> set[str]:
        return super()._converted() | self._cpu.converted

    def _given(self, ids: np.ndarray) -> Tensor:
        """Tokens, or the residual stream before the first layer, float32 [n, d_model], in main memory."""
        tokens = super()._given(ids)
        return tokens if self._embedding is None else self._embedding.take(tokens).dequantize()

    # ---- counts

    def reset_stats(self) -> None:
        """Start counting anew, telemetry too."""
        super().reset_stats()
        self._cpu.reset_stats()
        self.telemetry = Telemetry()
        for stage in self._stages:
            stage.telemetry = self.telemetry

    def stats(self) -> Stats:
        """What was computed since `reset_stats()`, on both sides."""
        counts, on_devices = self._cpu.stats(), self._device_counts()
        counts[:, : on_devices.shape[1]] += on_devices
        fired, predicted, missed = counts
        return Stats(self._tokens, self.shape.d_ff, fired, predicted, missed, audit=self.audit)

    def bytes_per_token(self, position: int | None = None) -> dict[str, float]:
        """Bytes that one decoded token reads of both memories, by part; as `Engine.bytes_per_token`."""
        sizes, shape = self._sizes, self.shape
        predicted, fired = self._read_shares()
        position = self.position if position is None else position
        return {
            "attention": float(sizes["attention"]),
            "predictor": float(sizes["predictor"] if self.mode == "predicted" else 0),
            "ffn": float(predicted * sizes["gate"] + fired * (sizes["up"] + sizes["down"])),
            "head": float(sizes["head"]),
            "kv": float(2 * 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * position),
            "other": float(sizes["other"]),
        }

    def measured(self) -> Telemetry:
        """The telemetry, with the counts that are kept on the device."""
        self.telemetry.hot_fired = int(self._device_counts()[0].sum())
        self.telemetry.cold_fired = int(self._cpu.stats()[0, : self._cpu.first].sum())
        return self.telemetry

    def prefill(self, ids: Sequence[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Append tokens; logits after the last one, float32 [n_vocab], or after each, [len(ids), n_vocab]."""
        start = time.perf_counter()
        self._cpu.set_audit(self.audit)
        logits = super().prefill(ids, all_logits)
        self.telemetry.tokens = self._tokens
        self.telemetry.total_s += time.perf_counter() - start
        return logits

    def _decode(self, ids: np.ndarray) -> Tensor:
        start, position = time.perf_counter(), self.position
        x, last = super()._decode(ids), self._stages[-1]
        if self._cpu.any_layers:
            x = self._cpu_layers(x, position)
            with on(last.device):
                x = last.logits_of_one(x)
        for stage in self._stages:
            with on(stage.device):
                stage.finish()
        self.telemetry.decoded += 1
        self.telemetry.decode_s += time.perf_counter() - start
        return x

    def _after_stages(self, x: Tensor) -> Tensor:
        return self._cpu_layers(x, self.position) if self._cpu.any_layers else x

    def _cpu_layers(self, x: Tensor, position: int) -> Tensor:
        """x [tokens, d_model] after the layers that are on the CPU as a whole; it is there."""
        there = x.cpu().numpy().copy()
        start = time.perf_counter()
        self._cpu.run_layers(there, position)
        if len(x) == 1:
            self.telemetry.cpu_layers_s += time.perf_counter() - start
        return torch.from_numpy(there)


def _check_inputs(file: GGUFFile, shape: ModelShape) -> None:
    """A neuron on the CPU does not know which token it is computed for, and the first one keeps all."""
    if any(rule.site == "down" for rule in rules_of_file(file, shape.n_layers)):
        what = "the hybrid backend leaves out no inputs of down, as this model's rules want it"
        raise UnsupportedError(what, where=file.path, fix="use --backend cpu or gpu")


def _check_placement(placement: Placement, shape: ModelShape, mode: str, n_devices: int) -> None:
    got = (len(placement.layers), placement.layers[0].d_ff)
    if got != (shape.n_layers, shape.d_ff):
        raise MismatchError("a plan for another model", got=got, expected=(shape.n_layers, shape.d_ff))
    split = [i for i, layer in enumerate(placement.layers) if layer.on_device and len(layer.cold)]
    if mode == "dense" and split:
        raise MismatchError("dense mode needs a plan of whole layers", got=f"layer {split[0]} is split")
    if placement.spans[-1][0] >= n_devices:
        got, fix = f"{n_devices} here", "name as many with --device"
        raise MismatchError("a plan for more devices", got=got, expected=len(placement.budgets), fix=fix)
