"""The whole model on one device or several, in `dense`, `exact` or `predicted` mode.

The contract is the CPU engine's. Each device has some of the layers, in order; what it does is in stage.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from hotcold.cpus import available_cpus
from hotcold.errors import InputError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.files.gguf_split import open_gguf
from hotcold.model.limits import check_tokens
from hotcold.runtime.bundle_files import ModelPath
from hotcold.runtime.context import check_context
from hotcold.runtime.cpu.kept_types import log_converted
from hotcold.runtime.gpu.device import memory_or_error, on, open_devices, parse_budgets
from hotcold.runtime.gpu.stage import Stage
from hotcold.runtime.gpu.weights import DeviceWeights, read_shape, read_weights
from hotcold.runtime.placement.devices import spans
from hotcold.runtime.placement.problem import whole_model
from hotcold.runtime.stats import Stats

__all__ = ["GpuEngine"]

_BLOCK = 512  # tokens of a prompt that are computed together


class GpuEngine:
    """One sequence of tokens through a model on devices."""

    _block = _BLOCK

    def __init__(
        self,
        path: str | Path,
        mode: str,
        devices: Sequence[torch.device],
        n_ctx: int = 2048,
        budget: str = "auto",
    ) -> None:
        """Load the GGUF file `path`. Raises InputError, FormatError, UnsupportedError."""
        if n_ctx < 1:
            raise InputError("the context must hold at least one token", got=n_ctx)
        file = open_gguf(path)
        self.mode, self.n_ctx, self.devices, self.audit = mode, n_ctx, list(devices), False
        self._budget = budget
        self.n_threads = available_cpus()
        self.shape = read_shape(file)
        check_context(file, self.shape, n_ctx)
        self.n_vocab = self.shape.n_vocab
        self._stages: list[Stage] = []
        self._load(file)
        log_converted(file, self._converted())
        _check_mode(file, self._stages[0].weights, mode)
        self.position = 0
        self.reset_stats()

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        mode: str = "auto",
        device: str = "cuda",
        n_ctx: int = 2048,
        budget: str = "auto",
    ) -> Self:
        """Open a bundle folder or one GGUF file; `auto` is the most sparse mode there is.

        `device` and `budget` are what `open_devices` and `parse_budgets` take. As few devices are used as the
        model needs.
        """
        path, mode = file_and_mode(bundle, mode)
        return cls(path, mode, open_devices(device), n_ctx, budget)

    def _load(self, file: GGUFFile) -> None:
        homes = whole_model(file, self.mode, self.n_ctx, parse_budgets(self._budget, self.devices))
        rest = self.shape.n_layers - len(homes)
        if rest and self._budget != "auto":
            raise UnsupportedError(
                "the model does not fit --vram-budget",
                where=file.path,
                got=f"room for {len(homes)} layers",
                expected=self.shape.n_layers,
                fix="raise it, or use --backend hybrid",
            )
        # What is free is a guess: what is too much by it is tried on the last device.
        self._open_stages(file, spans([*homes, *[homes[-1] if homes else 0] * rest]))

    def _open_stages(self, file: GGUFFile, of: Sequence[tuple[int, range]]) -> None:
        """One stage for each of these, a device's number and its layers."""
        for home, layers in of:
            device = self.devices[home]
            with memory_or_error(device), on(device):
                self._stages.append(self._open_stage(file, device, layers, layers == of[-1][1]))

    def _open_stage(self, file: GGUFFile, device: torch.device, layers: range, last: bool) -> Stage:
        predicted = self.mode == "predicted"
        weights = read_weights(file, device, layers, with_predictors=predicted, with_head=last)
        return Stage(weights, self.mode, self.n_ctx)

    def _converted(self) -> set[str]:
        """Types of weights that became F16."""
        return set().union(*(stage.weights.converted for stage in self._stages))

    def reset(self) -> None:
        """Forget all tokens."""
        self.position = 0

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._tokens = 0
        for stage in self._stages:
            stage.reset_counts()

    def stats(self) -> Stats:
        """What was computed since `reset_stats()`."""
        fired, predicted, missed = self._device_counts()
        return Stats(self._tokens, self.shape.d_ff, fired, predicted, missed, audit=self.audit)

    def _device_counts(self) -> np.ndarray:
        """int64 [3, layers on devices]: fired, predicted (all, where nothing predicts), missed."""
        return np.concatenate([stage.counts(self._tokens) for stage in self._stages], axis=1)

    def decode(self, token: int) -> np.ndarray:
        """Append one token; logits of the next one, float32 [n_vocab]."""
        return self.prefill([token])

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Append tokens; logits after the last one, float32 [n_vocab], or after each, [len(ids), n_vocab]."""
        tokens = np.ascontiguousarray(ids, np.int64)
        check_tokens(tokens, self.position, self.n_ctx, self.n_vocab)
        for stage in self._stages:
            stage.audit = self.audit
        # Position 0 is computed in full, which is not what a recorded token does.
        if len(tokens) == 1 and self.position > 0 and not self.audit:
            logits = self._decode(tokens)
        else:
            blocks = [tokens[i : i + self._block] for i in range(0, len(tokens), self._block)]
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
                x = stage.decode(x, self.position)
        self.position += 1
        self._tokens += 1
        return x

    def _prompt(self, ids: np.ndarray, logits_of: int) -> Tensor | None:
        """A block of tokens; logits of the last `logits_of` of them, [logits_of, n_vocab]."""
        x = self._given(ids)
        for stage in self._stages:
            with on(stage.device):
                x = stage.prompt(x, self.position)
        x = self._after_stages(x)
        self.position += len(ids)
        self._tokens += len(ids)
        with on(stage.device):
            return stage.logits(x[-logits_of:]) if logits_of else None

    def _after_stages(self, x: Tensor) -> Tensor:
        """The residual stream [tokens, d_model] after layers that are elsewhere, if there are any."""
        return x

    def _read_shares(self) -> tuple[float, float]:
        """Of all neurons: whose gates a token has read, and whose up and down rows."""
        stats, shape = self.stats(), self.shape
        all_neurons = max(stats.tokens, 1) * shape.n_layers * shape.d_ff
        predicted = stats.predicted.sum() / all_neurons if self.mode == "predicted" else 1.0
        return predicted, stats.fired.sum() / all_neurons if self.mode != "dense" else 1.0

    def bytes_per_token(self, position: int | None = None) -> dict[str, float]:
        """Bytes of device memory that one decoded token reads, by part; as `Engine.bytes_per_token`."""
        shape = self.shape
        layers = [layer for stage in self._stages for layer in stage.weights.layers]
        predicted, fired = self._read_shares()
        position = self.position if position is None else position
        attention = sum(w.nbytes for layer in layers for w in (*layer.qkv, layer.o))
        predictors = [layer.predictor for layer in layers if layer.predictor]
        ffns = [layer.ffn for layer in layers if layer.ffn]
        return {
            "attention": float(attention),
            "predictor": float(sum(p.fc1.nbytes + p.fc2.nbytes for p in predictors)),
            "ffn": float(
                predicted * sum(f.gate.nbytes for f in ffns)
                + fired * sum(rows.nbytes for f in ffns for rows in (f.up, f.down) if rows)
            ),
            "head": float(self._stages[-1].weights.head.nbytes),
            "kv": float(2 * 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * position),
            "other": float(4 * shape.d_model * (2 * shape.n_layers + 1)),
        }


def file_and_mode(bundle: str | Path, mode: str) -> tuple[Path, str]:
    """The GGUF file that a mode reads. `auto` is the most sparse of those that the model offers."""
    model = ModelPath(bundle)
    mode = model.modes[-1] if mode == "auto" else mode
    return model.file_for(mode), mode


def _check_mode(file: GGUFFile, weights: DeviceWeights, mode: str) -> None:
    if weights.dense_file != (mode == "dense"):
        form = "a dense down matrix" if weights.dense_file else "neuron rows"
        raise UnsupportedError(f"{mode} mode cannot run a file with {form}", where=file.path)
