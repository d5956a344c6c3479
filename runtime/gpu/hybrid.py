"""Hot neurons on the device, cold ones on the CPU, at the same time.

Per layer and token the device computes attention and the predictor, then sends the FFN's input and which
cold neurons are wanted to the CPU, and goes on with the hot neurons while the CPU computes the cold ones. The
CPU's share comes back and is added on the device. A layer without wanted cold neurons sends nothing back, and
one without any cold neurons never waits. Layers that do not fit the device at all run on the CPU engine,
after the others. In `dense` mode layers are on one side or the other as a whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from hotcold.convert.gguf_read import GGUFFile
from hotcold.errors import MismatchError
from hotcold.runtime.gpu.cpu_side import MAX_BLOCK, CpuSide
from hotcold.runtime.gpu.device import open_device
from hotcold.runtime.gpu.engine import GpuEngine, file_and_mode
from hotcold.runtime.gpu.layers import MAX_TOKENS
from hotcold.runtime.gpu.plan import part_bytes
from hotcold.runtime.gpu.staging import Staging
from hotcold.runtime.gpu.telemetry import Telemetry
from hotcold.runtime.gpu.weights import DeviceLayer, read_weights
from hotcold.runtime.placement import Placement
from hotcold.runtime.shape import ModelShape
from hotcold.runtime.stats import Stats

__all__ = ["HybridEngine"]


@dataclass(slots=True)
class _Buffers:
    """Tensors of one token that stay where they are, on the device; float32 [1, d_model]."""

    x: Tensor  # the residual stream, into a layer
    attended: Tensor  # after attention
    normed: Tensor  # the FFN's input
    hot: Tensor  # what hot neurons add
    cold: Tensor  # what cold neurons add
    scores: Tensor  # of the predictor, [1, d_ff]


class HybridEngine(GpuEngine):
    """One sequence of tokens through a model on a device and the CPU; the contract is the CPU engine's."""

    def __init__(
        self,
        path: str | Path,
        mode: str,
        device: torch.device,
        placement: Placement,
        n_threads: int | None = None,
        n_ctx: int = 2048,
    ) -> None:
        """Load the GGUF file `path` as `placement` says. Raises InputError, FormatError, UnsupportedError."""
        self.placement, self._threads = placement, n_threads
        super().__init__(path, mode, device, n_ctx)
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
        """Open a bundle folder or one GGUF file; `auto` is `predicted` where there are predictors."""
        path, mode = file_and_mode(bundle, mode)
        return cls(path, mode, open_device(device), placement, n_threads, n_ctx)

    def _load(self, file: GGUFFile) -> None:
        _check_placement(self.placement, ModelShape.read(file), self.mode)
        self._sizes = part_bytes(file)
        n_threads = self._threads or len(os.sched_getaffinity(0))
        self._cpu = CpuSide(file, self.placement, self.mode, n_threads, self.n_ctx)
        hot = [layer.hot for layer in self.placement.layers if layer.on_device]
        self._weights = read_weights(file, self.device, hot, with_predictors=self.mode == "predicted")
        self._prepare()

    def _prepare(self) -> None:
        super()._prepare()
        d, d_ff = self._weights.shape.d_model, self._weights.shape.d_ff
        sizes = [d] * 5 + [d_ff]
        self._one = _Buffers(*(torch.zeros(1, size, device=self.device) for size in sizes))
        most_cold = max(self._cpu.n_cold)
        self._staging = Staging(self.device, MAX_BLOCK, d, most_cold)
        # Decoding a quantised matrix for a dense product would take memory that the plan has no room for.
        quantised = any(not layer.q.data.is_floating_point() for layer in self._weights.layers)
        self._block = MAX_TOKENS if quantised else MAX_BLOCK
        self.telemetry = Telemetry()

    # ---- counts

    def reset_stats(self) -> None:
        """Start counting anew, telemetry too."""
        super().reset_stats()
        self._cpu.reset_stats()
        self.telemetry = Telemetry()

    def stats(self) -> Stats:
        """What was computed since `reset_stats()`, on both sides."""
        fired, predicted, missed = self._device_counts() + self._cpu.stats()
        return Stats(self._tokens, self._weights.shape.d_ff, fired, predicted, missed, audit=self.audit)

    def bytes_per_token(self, position: int | None = None) -> dict[str, float]:
        """Bytes that one decoded token reads of both memories, by part; as `Engine.bytes_per_token`."""
        sizes, shape, stats = self._sizes, self._weights.shape, self.stats()
        all_neurons = max(stats.tokens, 1) * shape.n_layers * shape.d_ff
        fired = stats.fired.sum() / all_neurons if self.mode != "dense" else 1.0
        predicted = stats.predicted.sum() / all_neurons if self.mode == "predicted" else 1.0
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
        n = len(self._weights.layers)
        self.telemetry.hot_fired = int(self._counts[0].sum())
        self.telemetry.cold_fired = int(self._cpu.stats()[0, :n].sum())
        return self.telemetry

    def prefill(self, ids: Sequence[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Append tokens; logits after the last one, float32 [n_vocab], or after each, [len(ids), n_vocab]."""
        start = time.perf_counter()
        self._cpu.set_audit(self.audit)
        logits = super().prefill(ids, all_logits)
        self.telemetry.tokens = self._tokens
        self.telemetry.total_s += time.perf_counter() - start
        return logits

    # ---- one token

    def _decode(self, token: int) -> Tensor:
        start = time.perf_counter()
        self._token.fill_(token)
        self._position.fill_(self.position)
        seen = self._layers.cache.bucket(self.position + 1)
        one, graphs = self._one, self._graphs
        graphs.run("embed", lambda: one.x.copy_(self._layers.embed(self._token)))
        for i, layer in enumerate(self._weights.layers):
            self._layer_of_one(i, layer, seen)
        self._cpu_layers(one.x, self.position)
        graphs.run("logits", lambda: self._logits.copy_(self._layers.logits(one.x)))
        self._staging.finish(self.telemetry)
        self.position += 1
        self._tokens += 1
        self.telemetry.decoded += 1
        self.telemetry.decode_s += time.perf_counter() - start
        return self._logits

    def _layer_of_one(self, i: int, layer: DeviceLayer, seen: int) -> None:
        one, n_cold = self._one, self._cpu.n_cold[i]
        self._graphs.run(("attend", i, seen), lambda: self._attend_one(i, layer, seen))
        if n_cold:
            self._staging.mark_sent()
        with self._staging.timed_hot():
            self._graphs.run(("hot", i), lambda: self._hot_of_one(i, layer))
        returned = n_cold > 0 and self._cold_of_one(i, n_cold)
        if returned:
            self._graphs.run(("add both", i), lambda: torch.add(one.attended + one.hot, one.cold, out=one.x))
        else:
            self._graphs.run(("add hot", i), lambda: torch.add(one.attended, one.hot, out=one.x))

    def _attend_one(self, i: int, layer: DeviceLayer, seen: int) -> None:
        """Attention and predictor; the FFN's input and the wanted cold neurons go to the host."""
        one, layers, n_cold = self._one, self._layers, self._cpu.n_cold[i]
        h = layers.norm(one.x, layer.attn_norm)
        added = layers.attention(i, h, self._position, seen)
        attended, normed = layers.add_norm(one.x, added, layer.ffn_norm)
        one.attended.copy_(attended)
        one.normed.copy_(normed)
        wanted = None
        if self.mode == "predicted":
            predictor = layer.predictor
            one.scores.copy_(layers.dot(layers.dot(one.attended, predictor.fc1).relu(), predictor.fc2))
            chosen = (one.scores >= predictor.threshold) | predictor.always
            wanted = chosen[:, layer.n_hot :]
        if n_cold:
            self._staging.send(one.normed, wanted)

    def _hot_of_one(self, i: int, layer: DeviceLayer) -> None:
        if layer.ffn is None:
            self._one.hot.zero_()
        elif self.mode == "predicted":
            self._one.hot.copy_(self._hot_by_scores(i, layer))
        else:
            self._one.hot.copy_(self._ffn_of_one(i, layer, self._one.attended, self._one.normed))

    def _hot_by_scores(self, i: int, layer: DeviceLayer) -> Tensor:
        """The hot neurons that the predictor has chosen, its scores being known."""
        ops, n, predictor = self._ops, layer.n_hot, layer.predictor
        scores, always = self._one.scores[:, :n].contiguous(), predictor.always[:n].contiguous()
        index, count = ops.select(scores, predictor.threshold, always, self._counts[1, i])
        return self._listed(i, layer, layer.ffn.gate, self._one.normed, index, count)

    def _cold_of_one(self, i: int, n_cold: int) -> bool:
        """The CPU's share, while the device is at work on the hot one; whether there was anything."""
        staging, telemetry = self._staging, self.telemetry
        start = time.perf_counter()
        staging.wait_sent()
        telemetry.wait_s += time.perf_counter() - start
        wanted = staging.wanted(1, n_cold) if self.mode == "predicted" else np.ones((1, n_cold), bool)
        telemetry.bytes_to_host += staging.bytes_sent(1, n_cold if self.mode == "predicted" else 0)
        if not wanted.any():
            telemetry.skipped_handovers += 1
            staging.no_cold()
            return False
        start = time.perf_counter()
        computed, _ = self._cpu.cold(i, staging.normed(1), wanted, staging.cold(1))
        staging.cold_took(time.perf_counter() - start)
        staging.send_back(self._one.cold)
        telemetry.cold_computed += computed
        telemetry.handovers += 1
        telemetry.bytes_to_device += self._one.cold.nbytes
        return True

    def _cpu_layers(self, x: Tensor, position: int) -> None:
        """The layers that are on the CPU as a whole, in place on x [tokens, d_model]."""
        if self._cpu.first == self._cpu.n_layers:
            return
        there = x.cpu().numpy().copy()
        start = time.perf_counter()
        self._cpu.run_layers(there, position)
        if len(x) == 1:
            self.telemetry.cpu_layers_s += time.perf_counter() - start
        x.copy_(torch.from_numpy(there))

    # ---- prompts

    def _after_layers(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._cpu_layers(x, self.position)
        return x

    def _ffn_of_many(self, i: int, layer: DeviceLayer, x: Tensor, h: Tensor, positions: Tensor) -> Tensor:
        """Both sides on a block of tokens: the device's products are under way while the CPU works."""
        n_cold = self._cpu.n_cold[i]
        computed = self._layers.predictions(layer, x, positions) if self.mode == "predicted" else None
        hot = None if computed is None else computed[:, : layer.n_hot]
        y = torch.zeros_like(x) if layer.ffn is None else self._masked(i, layer, h, hot)
        if not n_cold:
            return y
        normed = h.cpu().numpy()
        wanted = np.ones((len(x), n_cold), bool) if hot is None else computed[:, layer.n_hot :].cpu().numpy()
        cold = np.zeros_like(normed)
        _, fired = self._cpu.cold(i, normed, wanted, cold)
        if self.audit and not wanted.all():
            self._counts[2, i] += self._missed_cold(i, normed, n_cold) - fired
        return y + torch.from_numpy(cold).to(self.device)

    def _missed_cold(self, i: int, normed: np.ndarray, n_cold: int) -> int:
        """How many of all cold neurons would fire; they are not counted as computed."""
        everything = np.ones((len(normed), n_cold), bool)
        before = self._cpu.stats()[:2, i]
        _, fired = self._cpu.cold(i, normed, everything, np.zeros_like(normed))
        self._counts[:2, i] -= torch.from_numpy(self._cpu.stats()[:2, i] - before).to(self.device)
        return fired


def _check_placement(placement: Placement, shape: ModelShape, mode: str) -> None:
    got = (len(placement.layers), placement.layers[0].d_ff)
    if got != (shape.n_layers, shape.d_ff):
        raise MismatchError("a plan for another model", got=got, expected=(shape.n_layers, shape.d_ff))
    split = [i for i, layer in enumerate(placement.layers) if layer.on_device and len(layer.cold)]
    if mode == "dense" and split:
        raise MismatchError("dense mode needs a plan of whole layers", got=f"layer {split[0]} is split")
