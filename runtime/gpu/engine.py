"""The whole model on one device, in `dense`, `exact` or `predicted` mode; the contract is the CPU engine's.

A decoded token is one CUDA graph: nothing in it waits for the host, and the number of active neurons stays on
the device. Prompts are computed in blocks with dense products, and neurons that a mode leaves out are masked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from hotcold.convert.gguf_read import GGUFFile
from hotcold.errors import InputError, UnsupportedError
from hotcold.runtime.bundle_files import file_of_role
from hotcold.runtime.gpu.device import memory_or_error, open_device, operators
from hotcold.runtime.gpu.graphs import Graphs
from hotcold.runtime.gpu.layers import MAX_TOKENS, Layers
from hotcold.runtime.gpu.weights import DeviceLayer, DeviceWeights, read_weights
from hotcold.runtime.stats import Stats
from hotcold.runtime.triton.rows import Rows

__all__ = ["GpuEngine"]

_BLOCK = 512  # tokens of a prompt that are computed together


class GpuEngine:
    """One sequence of tokens through a model on a device."""

    _block = _BLOCK

    def __init__(self, path: str | Path, mode: str, device: torch.device, n_ctx: int = 2048) -> None:
        """Load the GGUF file `path`. Raises InputError, FormatError, UnsupportedError."""
        if n_ctx < 1:
            raise InputError("the context must hold at least one token", got=n_ctx)
        file = GGUFFile(path)
        self.mode, self.n_ctx, self.device, self.audit = mode, n_ctx, device, False
        self.n_threads = len(os.sched_getaffinity(0))
        with memory_or_error(device):
            self._load(file)
        _check_mode(file, self._weights, mode)
        self.n_vocab = self._weights.shape.n_vocab
        self.position = 0
        self.reset_stats()

    @classmethod
    def load(cls, bundle: str | Path, mode: str = "auto", device: str = "cuda", n_ctx: int = 2048) -> Self:
        """Open a bundle folder or one GGUF file; `auto` is `predicted` where there are predictors."""
        path, mode = file_and_mode(bundle, mode)
        return cls(path, mode, open_device(device), n_ctx)

    def _load(self, file: GGUFFile) -> None:
        self._weights = read_weights(file, self.device, with_predictors=self.mode == "predicted")
        self._prepare()

    def _prepare(self) -> None:
        """Everything that stays where it is from token to token."""
        shape, device = self._weights.shape, self.device
        self._layers = Layers(self._weights, self.n_ctx, device, operators(device))
        self._ops, self._clip = self._layers.ops, shape.activation == "drelu"
        if device.type == "cuda":
            from hotcold.runtime.gpu.tune import tune_weights

            tune_weights(self._weights, self.mode, self._ops, device)
        self._graphs = Graphs(device)
        self._counts = torch.zeros(3, shape.n_layers, dtype=torch.int64, device=device)
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._logits = torch.zeros(1, shape.n_vocab, device=device)

    def reset(self) -> None:
        """Forget all tokens."""
        self.position = 0

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._tokens = 0
        self._counts.zero_()

    def stats(self) -> Stats:
        """What was computed since `reset_stats()`."""
        fired, predicted, missed = self._device_counts()
        return Stats(self._tokens, self._weights.shape.d_ff, fired, predicted, missed, audit=self.audit)

    def _device_counts(self) -> np.ndarray:
        """int64 [3, n_layers]: fired, predicted (all, where nothing predicts), missed."""
        counts = self._counts.cpu().numpy().copy()
        if self.mode != "predicted":
            n_hot = [layer.n_hot for layer in self._weights.layers]
            counts[1, : len(n_hot)] = self._tokens * np.array(n_hot, np.int64)
        return counts

    def decode(self, token: int) -> np.ndarray:
        """Append one token; logits of the next one, float32 [n_vocab]."""
        return self.prefill([token])

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Append tokens; logits after the last one, float32 [n_vocab], or after each, [len(ids), n_vocab]."""
        tokens = np.ascontiguousarray(ids, np.int64)
        check_tokens(tokens, self.position, self.n_ctx, self.n_vocab)
        # Position 0 is computed in full, which is not what a recorded token does.
        if len(tokens) == 1 and self.position > 0 and not self.audit:
            logits = self._decode(int(tokens[0]))
        else:
            blocks = [tokens[i : i + self._block] for i in range(0, len(tokens), self._block)]
            last = len(blocks) - 1
            found = [
                self._prompt(block, len(block) if all_logits else int(i == last))
                for i, block in enumerate(blocks)
            ]
            logits = torch.cat(found) if all_logits else found[-1]
        return (logits if all_logits else logits[0]).cpu().numpy().copy()

    def _decode(self, token: int) -> Tensor:
        """One token after others, by the recorded step; logits [1, n_vocab]."""
        self._token.fill_(token)
        self._position.fill_(self.position)
        seen = self._layers.cache.bucket(self.position + 1)
        self._graphs.run(seen, lambda: self._logits.copy_(self._one_token(seen)))
        self.position += 1
        self._tokens += 1
        return self._logits

    def _one_token(self, seen: int) -> Tensor:
        _, h = self._through(range(len(self._weights.layers)), *self._embed_one(), seen)
        return self._layers.dot(h, self._weights.head)

    def _embed_one(self) -> tuple[Tensor, Tensor]:
        """The residual stream of the token, and its norm for the first layer."""
        x = self._layers.embed(self._token)
        return x, self._layers.norm(x, self._norm_before(0))

    def _through(self, which: range, x: Tensor, h: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """The residual stream x of one token, and its norm h, after these layers."""
        layers = self._layers
        for i in which:
            layer = self._weights.layers[i]
            x, h = layers.add_norm(x, layers.attention(i, h, self._position, seen), layer.ffn_norm)
            x, h = layers.add_norm(x, self._ffn_of_one(i, layer, x, h), self._norm_before(i + 1))
        return x, h

    def _norm_before(self, i: int) -> Tensor:
        """The norm's weight before layer i's attention, or before the head."""
        layers = self._weights.layers
        return layers[i].attn_norm if i < len(layers) else self._weights.output_norm

    def _ffn_of_one(self, i: int, layer: DeviceLayer, x: Tensor, h: Tensor) -> Tensor:
        """The FFN of one token by lists of active neurons; x is the residual stream, h its norm."""
        if self.mode == "dense":
            return self._ffn_of_many(i, layer, x, h, self._position)
        ops, ffn = self._ops, layer.ffn
        if self.mode == "exact":
            gate = ops.dot_rows(h, ffn.gate)
            index, count = ops.select(gate, layer.firing)
        else:
            gate, predictor = ffn.gate, layer.predictor
            index, count = ops.predict(
                x, predictor.fc1, predictor.fc2, predictor.threshold, predictor.always, self._counts[1, i]
            )
        return self._listed(i, layer, gate, h, index, count)

    def _listed(
        self, i: int, layer: DeviceLayer, gate: Rows | Tensor, h: Tensor, index: Tensor, count: Tensor
    ) -> Tensor:
        """What the listed neurons add, by their gate rows or known gate scores."""
        fired = self._counts[0, i]
        a = self._ops.ffn_listed(h, gate, layer.ffn.up, index, count, layer.firing, self._clip, fired)
        return self._ops.down_listed(a, layer.ffn.down, index, count)

    def _prompt(self, ids: np.ndarray, logits_of: int) -> Tensor | None:
        """A block of tokens; logits of the last `logits_of` of them, [logits_of, n_vocab]."""
        tokens = torch.from_numpy(ids).to(self.device)
        positions = torch.arange(self.position, self.position + len(ids), device=self.device)
        x, seen = self._layers.embed(tokens), self._layers.cache.bucket(self.position + len(ids))
        for i, layer in enumerate(self._weights.layers):
            h = self._layers.norm(x, layer.attn_norm)
            x, h = self._layers.add_norm(x, self._layers.attention(i, h, positions, seen), layer.ffn_norm)
            x = x + self._ffn_of_many(i, layer, x, h, positions)
        x = self._after_layers(x)
        self.position += len(ids)
        self._tokens += len(ids)
        return self._layers.logits(x[-logits_of:]) if logits_of else None

    def _after_layers(self, x: Tensor) -> Tensor:
        """The residual stream [tokens, d_model] after layers that are elsewhere, if there are any."""
        return x

    def _ffn_of_many(self, i: int, layer: DeviceLayer, x: Tensor, h: Tensor, positions: Tensor) -> Tensor:
        """The FFN with all gates and ups computed, and what the mode leaves out masked."""
        predicted = self.mode == "predicted"
        return self._masked(i, layer, h, self._layers.predictions(layer, x, positions) if predicted else None)

    def _masked(self, i: int, layer: DeviceLayer, h: Tensor, computed: Tensor | None) -> Tensor:
        """The neurons on the device, all of them or those that are `computed`, bool [tokens, n]."""
        ffn, dot = layer.ffn, self._layers.dot
        gate, up, fired = dot(h, ffn.gate), dot(h, ffn.up), self._counts[0, i]
        a = self._layers.activate(gate, up, layer.firing, fired if computed is None else None)
        if computed is not None:
            self._counts[1, i] += computed.sum()
            if self.audit:
                self._counts[2, i] += ((a != 0) & ~computed).sum()
            a = torch.where(computed, a, 0.0)
            fired += (a != 0).sum()
        return dot(a, ffn.down) if self._weights.dense_file else weighted(self._ops, a, ffn.down)

    def bytes_per_token(self, position: int | None = None) -> dict[str, float]:
        """Bytes of device memory that one decoded token reads, by part; as `Engine.bytes_per_token`."""
        weights, shape, stats = self._weights, self._weights.shape, self.stats()
        all_neurons = max(stats.tokens, 1) * shape.n_layers * shape.d_ff
        fired = stats.fired.sum() / all_neurons if self.mode != "dense" else 1.0
        predicted = stats.predicted.sum() / all_neurons if self.mode == "predicted" else 1.0
        position = self.position if position is None else position
        attention = sum(w.nbytes for layer in weights.layers for w in (*layer.qkv, layer.o))
        predictors = [layer.predictor for layer in weights.layers if layer.predictor]
        ffns = [layer.ffn for layer in weights.layers if layer.ffn]
        return {
            "attention": float(attention),
            "predictor": float(sum(p.fc1.nbytes + p.fc2.nbytes for p in predictors)),
            "ffn": float(
                predicted * sum(f.gate.nbytes for f in ffns)
                + fired * sum(f.up.nbytes + f.down.nbytes for f in ffns)
            ),
            "head": float(weights.head.nbytes),
            "kv": float(2 * 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * position),
            "other": float(4 * shape.d_model * (2 * shape.n_layers + 1)),
        }


def weighted(ops: object, a: Tensor, down: object) -> Tensor:
    """a · down over the rows of fired neurons, by the operator that suits the number of tokens."""
    if len(a) <= MAX_TOKENS:
        return ops.s3(a.contiguous(), down)
    if a.device.type == "cpu":
        return a @ down.dequantize()
    dtype = down.data.dtype if down.data.is_floating_point() else torch.float16
    return (a.to(dtype) @ down.dequantize(dtype)).float()


def file_and_mode(bundle: str | Path, mode: str) -> tuple[Path, str]:
    """The GGUF file that a mode reads. `auto` is `predicted` where the file has predictors, else `exact`."""
    if mode not in ("auto", "dense", "exact", "predicted"):
        raise InputError("unknown mode", got=mode, expected="auto, dense, exact, predicted")
    is_file = Path(bundle).suffix == ".gguf"
    path = Path(bundle) if is_file else file_of_role(bundle, "dense" if mode == "dense" else "sparse")
    if mode == "auto":
        mode = "predicted" if "blk.0.fc1.weight" in GGUFFile(path).tensors else "exact"
    return path, mode


def _check_mode(file: GGUFFile, weights: DeviceWeights, mode: str) -> None:
    if weights.dense_file != (mode == "dense"):
        form = "a dense down matrix" if weights.dense_file else "neuron rows"
        raise UnsupportedError(f"{mode} mode cannot run a file with {form}", where=file.path)


def check_tokens(tokens: np.ndarray, position: int, n_ctx: int, n_vocab: int) -> None:
    """Raise InputError for tokens [n] that cannot be appended at `position`."""
    if tokens.ndim != 1 or not len(tokens):
        raise InputError("no tokens to compute")
    if position + len(tokens) > n_ctx:
        got, limit = position + len(tokens), f"at most {n_ctx}"
        raise InputError("the context is full", got=got, expected=limit, fix="raise it with -c")
    if tokens.min() < 0 or tokens.max() >= n_vocab:
        worst = int(tokens.max() if tokens.min() >= 0 else tokens.min())
        raise InputError("token id outside of the vocabulary", got=worst, expected=f"0 to {n_vocab - 1}")
