"""One text through a model on devices and the CPU: each sequence has its share of both, and its telemetry."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hotcold.runtime.gpu.cpu_share import CpuShare
from hotcold.runtime.gpu.device import on
from hotcold.runtime.gpu.hybrid_stage import HybridStage
from hotcold.runtime.gpu.sequence import GpuSequence
from hotcold.runtime.gpu.telemetry import Telemetry
from hotcold.runtime.gpu.weights import DeviceWeights

if TYPE_CHECKING:
    from hotcold.runtime.gpu.hybrid import HybridEngine

__all__ = ["HybridSequence"]


class HybridSequence(GpuSequence):
    """One text on devices and the CPU."""

    _engine: HybridEngine
    _stages: list[HybridStage]

    def __init__(self, engine: HybridEngine, n_ctx: int) -> None:
        self._cpu, self._telemetry = CpuShare(engine.cpu, n_ctx), Telemetry()
        super().__init__(engine, n_ctx)

    def _open_stage(self, weights: DeviceWeights) -> HybridStage:
        stage = HybridStage(weights, self.mode, self.n_ctx, self._cpu)
        stage.telemetry = self._telemetry
        return stage

    def _given(self, ids: np.ndarray) -> Tensor:
        """Tokens, or the residual stream before the first layer, float32 [n, d_model], in main memory."""
        tokens, embedding = super()._given(ids), self._engine.embedding
        return tokens if embedding is None else embedding.take(tokens).dequantize()

    # ---- counts

    def _reset_counts(self) -> None:
        """Start counting anew, telemetry too."""
        super()._reset_counts()
        self._cpu.reset_stats()
        self._telemetry = Telemetry()
        for stage in self._stages:
            stage.telemetry = self._telemetry

    def _counts(self) -> np.ndarray:
        counts, on_devices = self._cpu.stats(), self._device_counts()
        counts[:, : on_devices.shape[1]] += on_devices
        return counts

    def _inputs(self) -> dict[str, tuple[int, int]]:
        found, on_devices = self._cpu.inputs(), super()._inputs()
        for site, (seen, kept) in on_devices.items():
            more_seen, more_kept = found.get(site, (0, 0))
            found[site] = seen + more_seen, kept + more_kept
        return found

    def measured(self) -> Telemetry:
        """The telemetry, with the counts that are kept on the device."""
        with self._turns.take(self._held):
            self._telemetry.hot_fired = int(self._device_counts()[0].sum())
            self._telemetry.cold_fired = int(self._cpu.stats()[0, : self._cpu.first].sum())
            return self._telemetry

    def bytes_per_token(self, position: int | None = None) -> dict[str, float]:
        """Bytes that one decoded token reads of both memories, by part."""
        sizes, shape = self._engine.sizes, self._engine.shape
        predicted, fired = self._read_shares()
        position = self._position if position is None else position
        return {
            "attention": float(sizes["attention"]),
            "predictor": float(sizes["predictor"] if self.mode == "predicted" else 0),
            "ffn": float(predicted * sizes["gate"] + fired * (sizes["up"] + sizes["down"])),
            "head": float(sizes["head"]),
            "kv": float(2 * 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * position),
            "other": float(sizes["other"]),
        }

    # ---- tokens

    def _append(self, tokens: np.ndarray, all_logits: bool) -> np.ndarray:
        start = time.perf_counter()
        self._cpu.set_audit(self._audit)
        logits = super()._append(tokens, all_logits)
        self._telemetry.tokens = self._tokens
        self._telemetry.total_s += time.perf_counter() - start
        return logits

    def _decode(self, ids: np.ndarray) -> Tensor:
        start, position = time.perf_counter(), self._position
        x, last = super()._decode(ids), self._stages[-1]
        if self._cpu.any_layers:
            x = self._cpu_layers(x, position)
            with on(last.device):
                x = last.logits_of_one(x)
        for stage in self._stages:
            with on(stage.device):
                stage.finish()
        self._telemetry.decoded += 1
        self._telemetry.decode_s += time.perf_counter() - start
        return x

    def _after_stages(self, x: Tensor) -> Tensor:
        return self._cpu_layers(x, self._position) if self._cpu.any_layers else x

    def _cpu_layers(self, x: Tensor, position: int) -> Tensor:
        """x [tokens, d_model] after the layers that are on the CPU as a whole; it is there."""
        there = x.cpu().numpy().copy()
        start = time.perf_counter()
        self._cpu.run_layers(there, position)
        if len(x) == 1:
            self._telemetry.cpu_layers_s += time.perf_counter() - start
        return torch.from_numpy(there)
