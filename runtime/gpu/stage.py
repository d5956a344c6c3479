"""Consecutive layers of a model on one device: what a token and a block of a prompt of one sequence do there.

A model on one device is one stage, on several devices it is one for each, and the residual stream is handed
on. A decoded token is one CUDA graph: nothing in it waits for the host, and the number of active neurons
stays on the device. Prompts are computed in blocks with dense products, and neurons that a mode leaves out
are masked.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hotcold.runtime.gpu.device import operators
from hotcold.runtime.gpu.graphs import Graphs
from hotcold.runtime.gpu.layers import MAX_TOKENS, Layers, plus
from hotcold.runtime.gpu.weights import DeviceLayer, DeviceNorm, DeviceWeights
from hotcold.runtime.triton.rows import Rows

__all__ = ["Stage"]


class Stage:
    """The layers of `weights`, numbered from 0 here; to be used while its device is the current one.

    What is given to it are tokens, int64 [n], where it has the embedding, else the residual stream, float32
    [n, d_model], from whatever device.
    """

    def __init__(self, weights: DeviceWeights, mode: str, n_ctx: int) -> None:
        """Allocate everything that stays where it is from token to token."""
        self.weights, self.mode, self.device, self.audit = weights, mode, weights.device, False
        shape, device = weights.shape, weights.device
        self._layers = Layers(weights, n_ctx, device, operators(device))
        self._ops = self._layers.ops
        self._graphs = Graphs(device)
        # 16 bytes apart, as Triton compiles a kernel anew for another alignment.
        self._counts = torch.zeros(3, len(weights.layers), 2, dtype=torch.int64, device=device)[..., 0]
        stream = torch.zeros(1, shape.d_model, device=device)
        self._given = stream if weights.embedding is None else stream.new_zeros(1, dtype=torch.int64)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._out = stream.new_zeros(1, shape.n_vocab if self._ends else shape.d_model)

    @property
    def _ends(self) -> bool:
        """Whether logits come out of it."""
        return self.weights.head is not None

    # ---- counts

    def reset_counts(self) -> None:
        """Start counting anew."""
        self._counts.zero_()
        for kept in self._layers.kept.values():
            kept.zero_()

    def input_counts(self, tokens: int) -> dict[str, tuple[int, int]]:
        """By site with a rule: how many inputs `tokens` tokens had in all layers, and how many counted."""
        kept, least = self._layers.kept, self.weights.least
        return {site: (tokens * least[site].numel(), int(counts.sum())) for site, counts in kept.items()}

    def counts(self, tokens: int) -> np.ndarray:
        """int64 [3, layers]: fired, predicted (all of `tokens` tokens, where nothing predicts), missed."""
        counts = self._counts.cpu().numpy().copy()
        if self.mode != "predicted":
            counts[1] = [tokens * layer.n_hot for layer in self.weights.layers]
        return counts

    # ---- one token

    def decode(self, given: Tensor, position: int) -> Tensor:
        """One token after others, by recorded steps: logits [1, n_vocab], or the residual stream."""
        self._given.copy_(given, non_blocking=True)
        self._position.fill_(position)
        self._run(self._layers.cache.bucket(position + 1))
        return self._out

    def _run(self, seen: int) -> None:
        self._graphs.run(seen, lambda: self._one_token(seen))

    def _one_token(self, seen: int) -> None:
        self._end(*self._through(range(len(self.weights.layers)), *self._begin(), seen))

    def _begin(self) -> tuple[Tensor, Tensor]:
        """The residual stream of the token before these layers, and its norm."""
        x = self._embedded(self._given, self._position)
        return x, self._layers.norm(x, self._norm_before(0))

    def _through(self, which: range, x: Tensor, h: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """The residual stream x of one token, and its norm h, after these layers."""
        for i in which:
            stream, x, h = self._attended(i, x, h, self._position, seen)
            added = self._ffn_of_one(i, self.weights.layers[i], x, h)
            x, h = self._layers.add_norm(stream, added, self._norm_before(i + 1))
        return x, h

    def _attended(
        self, i: int, x: Tensor, h: Tensor, positions: Tensor, seen: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The residual stream after layer i's attention, which reads h, the norm of x; and the FFN's x and h.

        That x is the stream after attention, in a parallel layer (Falcon) still the one before.
        """
        layers, layer = self._layers, self.weights.layers[i]
        added = layers.attention(i, h, positions, seen)
        if self.weights.shape.structure.parallel:
            one_norm = layer.ffn_norm is layer.attn_norm
            h = h if one_norm else layers.norm(x, layer.ffn_norm)
            return x + added, x, layers.counted("gate_up", i, h, positions)
        x, h = layers.add_norm(x, added, layer.ffn_norm)
        return x, x, layers.counted("gate_up", i, h, positions)

    def _end(self, x: Tensor, h: Tensor) -> None:
        self._out.copy_(self._layers.dot(h, self.weights.head) if self._ends else x)

    def _norm_before(self, i: int) -> DeviceNorm:
        """The norm before layer i's attention, or before the head."""
        layers = self.weights.layers
        return layers[i].attn_norm if i < len(layers) else self.weights.output_norm

    def _embedded(self, given: Tensor, positions: Tensor) -> Tensor:
        """The residual stream before these layers; learned positions are the first stage's to add."""
        embedding, learned = self.weights.embedding, self.weights.positions
        x = given if embedding is None else embedding.take(given).dequantize()
        return x if learned is None else x + learned.take(positions).dequantize()

    def _ffn_of_one(self, i: int, layer: DeviceLayer, x: Tensor, h: Tensor) -> Tensor:
        """The FFN of one token by lists of active neurons; x is the residual stream, h its norm."""
        ops, ffn = self._ops, layer.ffn
        if self.mode == "dense" or (self.mode == "exact" and ffn.up is None):
            return self._masked(
                i, layer, h, self._position, None
            )  # no rows but those of `down` can be left out
        if self.mode == "exact":
            gate = ops.dot_rows(h, ffn.gate)
            index, count = ops.select_fired(gate, layer.firing)
        else:
            gate, predictor = ffn.gate, layer.predictor
            index, count = ops.predict(
                predictor.input(x, h), predictor.fc1, predictor.fc2, predictor.threshold, predictor.always,
                self._counts[1, i], relu=predictor.relu, bias=predictor.bias,
            )  # fmt: skip
        return self._listed(i, layer, gate, h, index, count)

    def _listed(
        self, i: int, layer: DeviceLayer, gate: Rows | Tensor, h: Tensor, index: Tensor, count: Tensor
    ) -> Tensor:
        """What the listed neurons add, by their gate rows or known gate scores."""
        fired, ffn = self._counts[0, i], layer.ffn
        a = self._ops.ffn_listed(h, gate, ffn.up, index, count, layer.firing, fired, ffn.gate_bias)
        a = self._layers.listed_that_count(i, a, index, count, self._position)
        return plus(self._ops.down_listed(a, ffn.down, index, count), layer.down_bias)

    # ---- prompts

    def prompt(self, given: Tensor, position: int) -> Tensor:
        """A block of tokens from `position` on: the residual stream [tokens, d_model] after these layers."""
        given, end = given.to(self.device, non_blocking=True), position + len(given)
        positions, seen = torch.arange(position, end, device=self.device), self._layers.cache.bucket(end)
        x = self._embedded(given, positions)
        for i, layer in enumerate(self.weights.layers):
            h = self._layers.norm(x, layer.attn_norm)
            stream, x, h = self._attended(i, x, h, positions, seen)
            x = stream + self._ffn_of_many(i, layer, x, h, positions)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Logits [tokens, n_vocab] of the residual stream after all layers."""
        return self._layers.logits(x.to(self.device))

    def _ffn_of_many(self, i: int, layer: DeviceLayer, x: Tensor, h: Tensor, positions: Tensor) -> Tensor:
        """The FFN with all gates and ups computed, and what the mode leaves out masked."""
        predicted = self.mode == "predicted"
        computed = self._layers.predictions(layer, x, h, positions) if predicted else None
        return self._masked(i, layer, h, positions, computed)

    def _masked(
        self, i: int, layer: DeviceLayer, h: Tensor, positions: Tensor, computed: Tensor | None
    ) -> Tensor:
        """The neurons on the device, all of them or those that are `computed`, bool [tokens, n]."""
        ffn, dot = layer.ffn, self._layers.dot
        gate, fired = dot(h, ffn.gate, ffn.gate_bias), self._counts[0, i]
        up = None if ffn.up is None else dot(h, ffn.up)
        a = self._ops.activate(gate, up, layer.firing, fired if computed is None else None)
        if computed is not None:
            self._counts[1, i] += computed.sum()
            if self.audit:
                self._counts[2, i] += ((a != 0) & ~computed).sum()
            a = torch.where(computed, a, 0.0)
            fired += (a != 0).sum()
        a = self._layers.counted("down", i, a, positions)
        if self.weights.dense_file:
            return dot(a, ffn.down, layer.down_bias)
        return plus(weighted(self._ops, a, ffn.down), layer.down_bias)


def weighted(ops: object, a: Tensor, down: Rows) -> Tensor:
    """a · down over the rows of fired neurons, by the operator that suits the number of tokens."""
    if len(a) <= MAX_TOKENS:
        return ops.s3(a.contiguous(), down)
    if a.device.type == "cpu":
        return a @ down.dequantize()
    dtype = down.data.dtype if down.data.is_floating_point() else torch.float16
    return (a.to(dtype) @ down.dequantize(dtype)).float()
