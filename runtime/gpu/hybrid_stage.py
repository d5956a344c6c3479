"""A stage that shares its layers' neurons with the CPU: hot ones on the device, cold ones there, at once.

A layer with cold neurons is a hand-over: the device computes attention and the predictor, sends the FFN's
input and which cold neurons are wanted to the CPU, and goes on with the hot neurons while the CPU computes
the cold ones. A decoded token is two recorded steps per hand-over: its hot neurons, if it has any; and all
from there to the next one, which begins by adding up both shares, and runs through layers that have no cold
neurons. If no cold neuron is wanted, nothing is sent back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hotcold.runtime.gpu.cpu_share import CpuShare
from hotcold.runtime.gpu.layers import plus
from hotcold.runtime.gpu.stage import Stage
from hotcold.runtime.gpu.staging import Staging
from hotcold.runtime.gpu.telemetry import Telemetry
from hotcold.runtime.gpu.weights import DeviceLayer, DeviceWeights

__all__ = ["HybridStage"]


@dataclass(slots=True)
class _Buffers:
    """Tensors of one token that stay where they are, on the device; float32 [1, d_model]."""

    attended: Tensor  # the residual stream after attention
    normed: Tensor  # the FFN's input
    hot: Tensor  # what hot neurons add
    cold: Tensor  # what cold neurons add
    scores: Tensor  # of the predictor, [1, d_ff]


class HybridStage(Stage):
    """Layers on a device, of whose neurons `cpu` has the others. Times and counts go to `telemetry`."""

    def __init__(self, weights: DeviceWeights, mode: str, n_ctx: int, cpu: CpuShare) -> None:
        """Allocate as a stage does, and the hand-overs' buffers."""
        self._cpu, self.telemetry = cpu, Telemetry()
        super().__init__(weights, mode, n_ctx)
        self._n_cold = cpu.n_cold[weights.first :][: len(weights.layers)]
        self._steps = _steps(self._n_cold)
        d, d_ff = weights.shape.d_model, weights.shape.d_ff
        self._one = _Buffers(*(torch.zeros(1, size, device=self.device) for size in [d] * 4 + [d_ff]))
        self._logits = self._out.new_zeros(1, weights.shape.n_vocab)
        self._staging = Staging(self.device, len(self._steps) - 1, d, max(self._n_cold, default=0))

    @property
    def _ends(self) -> bool:
        return super()._ends and not self._cpu.any_layers

    # ---- one token

    def finish(self) -> None:
        """Wait for the token, and add its times up."""
        self._staging.finish(self.telemetry)

    def logits_of_one(self, x: Tensor) -> Tensor:
        """`logits` of one token, recorded: after layers that are on the CPU as a whole."""
        self._out.copy_(x)
        self._graphs.run("logits", lambda: self._logits.copy_(self._layers.logits(self._out)))
        return self._logits

    def _run(self, seen: int) -> None:
        returned, (*handing_over, last) = False, self._steps
        for handover, layers in enumerate(handing_over):
            self._run_step(layers, seen, returned)
            returned = self._hand_over(handover, layers[-1])
        self._run_step(last, seen, returned)

    def _run_step(self, layers: range, seen: int, returned: bool) -> None:
        self._graphs.run((layers, seen, returned), lambda: self._step(layers, seen, returned))

    def _step(self, layers: range, seen: int, returned: bool) -> None:
        """From the beginning or a hand-over to the next one, or the end; `returned`: with the CPU's share."""
        x, h = self._since_handover(layers.start, returned) if layers.start else self._begin()
        if layers and self._n_cold[layers[-1]]:
            self._attend_and_send(layers[-1], *self._through(layers[:-1], x, h, seen), seen)
        else:
            self._end(*self._through(layers, x, h, seen))

    def _since_handover(self, i: int, returned: bool) -> tuple[Tensor, Tensor]:
        """The residual stream before layer i, the one before having cold neurons; and its norm."""
        one, norm, before = self._one, self._norm_before(i), self.weights.layers[i - 1]
        shares = [one.hot] if before.n_hot else [] if before.down_bias is None else [before.down_bias[None]]
        if returned:
            self._staging.send_back(one.cold)
            shares.append(one.cold)
        if shares:
            return self._layers.add_norm(one.attended, sum(shares[1:], shares[0]), norm)
        return one.attended, self._layers.norm(one.attended, norm)

    def _attend_and_send(self, i: int, x: Tensor, h: Tensor, seen: int) -> None:
        """Attention and predictor; the FFN's input and the wanted cold neurons go to the host."""
        one, layer, wanted = self._one, self.weights.layers[i], None
        stream, x, h = self._attended(i, x, h, self._position, seen)
        if self.mode == "predicted":
            dot, predictor = self._ops.dot_rows, layer.predictor
            hidden = dot(predictor.input(x, h), predictor.fc1, relu=predictor.relu)
            one.scores.copy_(dot(hidden, predictor.fc2, predictor.bias))
            wanted = ((one.scores >= predictor.threshold) | predictor.always)[:, layer.n_hot :]
        one.attended.copy_(stream)  # x may be it: read before
        one.normed.copy_(h)
        self._staging.send(one.normed, wanted)

    def _hot_of_one(self, i: int) -> None:
        layer = self.weights.layers[i]
        if self.mode == "predicted":
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
        staging, telemetry, n_cold = self._staging, self.telemetry, self._n_cold[i]
        staging.mark_sent(handover)
        if self.weights.layers[i].n_hot:
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
        self._cpu.cold_of_one(self.weights.first + i, staging.normed, wanted, staging.share)
        staging.cold_took(handover, time.perf_counter() - sent)
        telemetry.cold_computed += len(wanted)
        telemetry.handovers += 1
        telemetry.bytes_to_device += staging.share.nbytes
        return True

    # ---- prompts

    def _ffn_of_many(self, i: int, layer: DeviceLayer, x: Tensor, h: Tensor, positions: Tensor) -> Tensor:
        """Both sides on a block of tokens: the device's products are under way while the CPU works."""
        n_cold, number = self._n_cold[i], self.weights.first + i
        computed = self._layers.predictions(layer, x, h, positions) if self.mode == "predicted" else None
        hot = None if computed is None else computed[:, : layer.n_hot]
        y = (
            plus(torch.zeros_like(x), layer.down_bias)
            if layer.ffn is None
            else self._masked(i, layer, h, positions, hot)
        )
        if not n_cold:
            return y
        normed = h.cpu().numpy()
        wanted = np.ones((len(x), n_cold), bool) if hot is None else computed[:, layer.n_hot :].cpu().numpy()
        cold = np.zeros_like(normed)
        _, fired = self._cpu.cold(number, normed, wanted, cold)
        if self.audit and not wanted.all():
            self._counts[2, i] += self._missed_cold(i, normed, n_cold) - fired
        return y + torch.from_numpy(cold).to(self.device)

    def _missed_cold(self, i: int, normed: np.ndarray, n_cold: int) -> int:
        """How many of all cold neurons would fire; they are not counted as computed."""
        everything, number = np.ones((len(normed), n_cold), bool), self.weights.first + i
        before = self._cpu.stats()[:2, number]
        _, fired = self._cpu.cold(number, normed, everything, np.zeros_like(normed))
        self._counts[:2, i] -= torch.from_numpy(self._cpu.stats()[:2, number] - before).to(self.device)
        return fired


def _steps(n_cold: Sequence[int]) -> list[range]:
    """Layers by hand-overs: each range ends with a layer that has cold neurons, but for the last."""
    ends = [i + 1 for i, n in enumerate(n_cold) if n]
    return [range(start, stop) for start, stop in pairwise([0, *ends, len(n_cold)])]
