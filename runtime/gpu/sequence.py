"""One text through the stages of a model on devices: its caches, its position and its counts.

A stage of a sequence shares its weights with those of others; its cache, buffers and recorded steps are its
own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hotcold.model.limits import check_tokens
from hotcold.runtime.engine import Sequence
from hotcold.runtime.gpu.device import memory_or_error, on
from hotcold.runtime.gpu.stage import Stage
from hotcold.runtime.gpu.weights import DeviceWeights
from hotcold.runtime.stats import Stats

if TYPE_CHECKING:
    from hotcold.runtime.gpu.engine import GpuEngine

__all__ = ["GpuSequence"]


class GpuSequence(Sequence):
    """One text on devices."""

    def __init__(self, engine: GpuEngine, n_ctx: int) -> None:
        """Allocate what stays where it is from token to token. UnsupportedError where it does not fit."""
        self._engine, self.mode, self.n_ctx, self.n_vocab = engine, engine.mode, n_ctx, engine.n_vocab
        self._turns, self._held = engine.turns, threading.Lock()
        self._position = self._tokens = 0
        self._audit = False
        self._stages: list[Stage] = []
        with self._turns.take(self._held):
            for weights in engine.parts:
                with memory_or_error(weights.device), on(weights.device):
                    self._stages.append(self._open_stage(weights))

    def _open_stage(self, weights: DeviceWeights) -> Stage:
        return Stage(weights, self.mode, self.n_ctx)

    @property
    def position(self) -> int:
        return self._position

    @property
    def audit(self) -> bool:
        return self._audit

    @audit.setter
    def audit(self, on: bool) -> None:
        self._audit = on

    def reset(self) -> None:
        with self._turns.take(self._held):
            self._position = 0

    def reset_stats(self) -> None:
        with self._turns.take(self._held):
            self._reset_counts()

    def _reset_counts(self) -> None:
        self._tokens = 0
        for stage in self._stages:
            stage.reset_counts()

    def stats(self) -> Stats:
        with self._turns.take(self._held):
            sizes, counts, inputs = (self._tokens, self._engine.shape.d_ff), self._counts(), self._inputs()
            return Stats(*sizes, *counts, audit=self._audit, inputs=inputs)

    def _counts(self) -> np.ndarray:
        """int64 [3, n_layers]: fired, predicted (all, where nothing predicts), missed."""
        return self._device_counts()

    def _device_counts(self) -> np.ndarray:
        """Those of the layers on devices."""
        return np.concatenate([stage.counts(self._tokens) for stage in self._stages], axis=1)

    def _inputs(self) -> dict[str, tuple[int, int]]:
        """As `Stats.inputs`."""
        of_stages = [stage.input_counts(self._tokens) for stage in self._stages]
        sums = {site: np.sum([counts[site] for counts in of_stages], axis=0) for site in of_stages[0]}
        return {site: (int(seen), int(kept)) for site, (seen, kept) in sums.items()}

    def prefill(self, ids: Many[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        tokens = np.ascontiguousarray(ids, np.int64)
        with self._turns.take(self._held), torch.inference_mode():
            check_tokens(tokens, self._position, self.n_ctx, self.n_vocab)
            return self._append(tokens, all_logits)

    def _append(self, tokens: np.ndarray, all_logits: bool) -> np.ndarray:
        for stage in self._stages:
            stage.audit = self._audit
        # Position 0 is computed in full, which is not what a recorded token does.
        if len(tokens) == 1 and self._position > 0 and not self._audit:
            logits = self._decode(tokens)
        else:
            size = self._engine.block
            blocks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
            last = len(blocks) - 1
            found = [
                self._prompt(block, len(block) if all_logits else int(i == last))
                for i, block in enumerate(blocks)
            ]
            logits = torch.cat(found) if all_logits else found[-1]
        return (logits if all_logits else logits[0]).cpu().numpy().copy()

    def _given(self, ids: np.ndarray) -> Tensor:
        """What the first stage begins with: tokens, int64 [n], which it has the embedding of."""
        return torch.from_numpy(ids)

    def _decode(self, ids: np.ndarray) -> Tensor:
        """One token after others; what the last stage makes of it, logits [1, n_vocab]."""
        x = self._given(ids)
        for stage in self._stages:
            with on(stage.device):
                x = stage.decode(x, self._position)
        self._position += 1
        self._tokens += 1
        return x

    def _prompt(self, ids: np.ndarray, logits_of: int) -> Tensor | None:
        """A block of tokens; logits of the last `logits_of` of them, [logits_of, n_vocab]."""
        x = self._given(ids)
        for stage in self._stages:
            with on(stage.device):
                x = stage.prompt(x, self._position)
        x = self._after_stages(x)
        self._position += len(ids)
        self._tokens += len(ids)
        with on(stage.device):
            return stage.logits(x[-logits_of:]) if logits_of else None

    def _after_stages(self, x: Tensor) -> Tensor:
        """The residual stream [tokens, d_model] after layers that are elsewhere, if there are any."""
        return x

    def _read_shares(self) -> tuple[float, float]:
        """Of all neurons: whose gates a token has read, and whose up and down rows."""
        stats, shape = self.stats(), self._engine.shape
        all_neurons = max(stats.tokens, 1) * shape.n_layers * shape.d_ff
        predicted = stats.predicted.sum() / all_neurons if self.mode == "predicted" else 1.0
        return predicted, stats.fired.sum() / all_neurons if self.mode != "dense" else 1.0

    def bytes_per_token(self, position: int | None = None) -> dict[str, float]:
        """Bytes of device memory that one decoded token reads, by part."""
        shape = self._engine.shape
        layers = [layer for stage in self._stages for layer in stage.weights.layers]
        predicted, fired = self._read_shares()
        position = self._position if position is None else position
        attention = sum(w.nbytes for layer in layers for w in (*layer.qkv, layer.o))
        predictors = [layer.predictor for layer in layers if layer.predictor]
        ffns = [layer.ffn for layer in layers if layer.ffn]
        return {
            "attention": float(attention),
            "predictor": float(sum(p.bytes_read for p in predictors)),
            "ffn": float(
                predicted * sum(f.gate.nbytes for f in ffns)
                + fired * sum(rows.nbytes for f in ffns for rows in (f.up, f.down) if rows)
            ),
            "head": float(self._stages[-1].weights.head.nbytes),
            "kv": float(2 * 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * position),
            "other": float(4 * shape.d_model * (2 * shape.n_layers + 1)),
        }
