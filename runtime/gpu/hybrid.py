"""Hot neurons on the device, cold ones on the CPU, at the same time.

A layer with cold neurons is a hand-over: the device computes attention and the predictor, sends the FFN's
input and which cold neurons are wanted to the CPU, and goes on with the hot neurons while the CPU computes
the cold ones. A decoded token is two recorded steps per hand-over: its hot neurons; and all from there to the
next one, which begins by adding up both shares, and runs through layers that have no cold neurons. If no cold
neuron is wanted, nothing is sent back. Layers that do not fit the device at all run on the CPU engine, after
the others. In `dense` mode layers are on one side or the other as a whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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

    x: Tensor  # the residual stream, into the CPU's layers and out of them
    attended: Tensor  # the residual stream after attention
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
        n_cold = self._cpu.n_cold
        self._steps = _steps(n_cold[: self._cpu.first])
        self._staging = Staging(self.device, len(self._steps) - 1, d, max(n_cold))
        # Decoding a quantised matrix for a dense product would take memory that the plan has no room for.
        quantised = any(not layer.o.data.is_floating_point() for layer in self._weights.layers)
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
        returned, (*handing_over, last) = False, self._steps
        for handover, layers in enumerate(handing_over):
            self._run_step(layers, seen, returned)
            returned = self._hand_over(handover, layers[-1])
        self._run_step(last, seen, returned)
        if self._cpu.any_layers:
            self._cpu_layers(self._one.x, self.position)
            self._graphs.run("logits", lambda: self._logits.copy_(self._layers.logits(self._one.x)))
        self._staging.finish(self.telemetry)
        self.position += 1
        self._tokens += 1
        self.telemetry.decoded += 1
        self.telemetry.decode_s += time.perf_counter() - start
        return self._logits

    def _run_step(self, layers: range, seen: int, returned: bool) -> None:
        self._graphs.run((layers, seen, returned), lambda: self._step(layers, seen, returned))

    def _step(self, layers: range, seen: int, returned: bool) -> None:
        """From the embedding or a hand-over to the next one, or the end; `returned`: with the CPU's share."""
        hands_over = layers and self._cpu.n_cold[layers[-1]]
        x, h = self._before(layers.start, returned)
        x, h = self._through(layers[:-1] if hands_over else layers, x, h, seen)
        if hands_over:
            self._attend_and_send(layers[-1], x, h, seen)
        elif self._cpu.any_layers:
            self._one.x.copy_(x)
        else:
            self._logits.copy_(self._layers.dot(h, self._weights.head))

    def _before(self, i: int, returned: bool) -> tuple[Tensor, Tensor]:
        """The residual stream before layer i, which begins a step, and its norm."""
        if i == 0:
            return self._embed_one()
        one = self._one
        if not returned:
            return self._layers.add_norm(one.attended, one.hot, self._norm_before(i))
        self._staging.send_back(one.cold)
        return self._layers.add_norm(one.attended, one.hot + one.cold, self._norm_before(i))

    def _attend_and_send(self, i: int, x: Tensor, h: Tensor, seen: int) -> None:
        """Attention and predictor; the FFN's input and the wanted cold neurons go to the host."""
        one, layers, layer, wanted = self._one, self._layers, self._weights.layers[i], None
        x, h = layers.add_norm(x, layers.attention(i, h, self._position, seen), layer.ffn_norm)
        one.attended.copy_(x)
        one.normed.copy_(h)
        if self.mode == "predicted":
            dot, predictor = self._ops.dot_rows, layer.predictor
            one.scores.copy_(dot(dot(x, predictor.fc1, relu=True), predictor.fc2))
            wanted = ((one.scores >= predictor.threshold) | predictor.always)[:, layer.n_hot :]
        self._staging.send(one.normed, wanted)

    def _hot_of_one(self, i: int) -> None:
        layer = self._weights.layers[i]
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

    def _hand_over(self, handover: int, i: int) -> bool:
        """Layer i's hot neurons on the device, its cold ones here; whether any were wanted."""
        staging, telemetry, n_cold = self._staging, self.telemetry, self._cpu.n_cold[i]
        staging.mark_sent(handover)
        self._graphs.run(("hot", i), lambda: self._hot_of_one(i))
        staging.mark_hot_done(handover)
        start = time.perf_counter()
        staging.wait_sent(handover)
        sent = time.perf_counter()
        telemetry.wait_s += sent - start
        predicted = self.mode == "predicted"
        telemetry.bytes_to_host += staging.normed.nbytes + (n_cold if predicted else 0)
        wanted = staging.wanted(n_cold) if predicted else np.arange(n_cold, dtype=np.int32)
        if not len(wanted):
            telemetry.skipped_handovers += 1
            staging.cold_took(handover, 0.0)
            return False
        self._cpu.cold_of_one(i, staging.normed, wanted, staging.share)
        staging.cold_took(handover, time.perf_counter() - sent)
        telemetry.cold_computed += len(wanted)
        telemetry.handovers += 1
        telemetry.bytes_to_device += staging.share.nbytes
        return True

    def _cpu_layers(self, x: Tensor, position: int) -> None:
        """The layers that are on the CPU as a whole, in place on x [tokens, d_model]."""
        there = x.cpu().numpy().copy()
        start = time.perf_counter()
        self._cpu.run_layers(there, position)
        if len(x) == 1:
            self.telemetry.cpu_layers_s += time.perf_counter() - start
        x.copy_(torch.from_numpy(there))

    # ---- prompts

    def _after_layers(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if self._cpu.any_layers:
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


def _steps(n_cold: Sequence[int]) -> list[range]:
    """Layers by hand-overs: each range ends with a layer that has cold neurons, but for the last."""
    ends = [i + 1 for i, n in enumerate(n_cold) if n]
    return [range(start, stop) for start, stop in pairwise([0, *ends, len(n_cold)])]


def _check_placement(placement: Placement, shape: ModelShape, mode: str) -> None:
    got = (len(placement.layers), placement.layers[0].d_ff)
    if got != (shape.n_layers, shape.d_ff):
        raise MismatchError("a plan for another model", got=got, expected=(shape.n_layers, shape.d_ff))
    split = [i for i, layer in enumerate(placement.layers) if layer.on_device and len(layer.cold)]
    if mode == "dense" and split:
        raise MismatchError("dense mode needs a plan of whole layers", got=f"layer {split[0]} is split")
