"""A model on one device or several, in `dense`, `exact` or `predicted` mode.

Each device has some of the layers, in order; what it does is in stage.py, and what a sequence does with all
of them in sequence.py.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from functools import partial
from pathlib import Path
from typing import Self

import torch

from hotcold.cpus import available_cpus
from hotcold.errors import UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.files.gguf_split import open_gguf
from hotcold.runtime.bundle_files import ModelPath
from hotcold.runtime.context import check_context
from hotcold.runtime.cpu.kept_types import log_converted
from hotcold.runtime.engine import Engine, check_context_size
from hotcold.runtime.gpu.device import memory_or_error, on, open_devices, operators, parse_budgets
from hotcold.runtime.gpu.sequence import GpuSequence
from hotcold.runtime.gpu.weights import DeviceWeights, read_shape, read_weights
from hotcold.runtime.placement.devices import spans
from hotcold.runtime.placement.problem import whole_model
from hotcold.runtime.turns import Turns

__all__ = ["GpuEngine"]


class GpuEngine(Engine):
    """A model on devices. Its first sequence's cache is there with the weights."""

    block = 512  # tokens of a prompt that are computed together

    def __init__(
        self,
        path: str | Path,
        mode: str,
        devices: Many[torch.device],
        n_ctx: int = 2048,
        budget: str = "auto",
    ) -> None:
        """Load the GGUF file `path`. Raises InputError, FormatError, UnsupportedError."""
        check_context_size(n_ctx)
        file = open_gguf(path)
        self.mode, self.n_ctx, self.devices = mode, n_ctx, list(devices)
        self._budget = budget
        self.n_threads = available_cpus()
        self.shape = read_shape(file)
        check_context(file, self.shape, n_ctx)
        self.n_vocab = self.shape.n_vocab
        self._context_checked = partial(check_context, file, self.shape)
        self.turns = Turns()
        self.parts: list[DeviceWeights] = []
        self._load(file)
        log_converted(file, self._converted())
        _check_mode(file, self.parts[0], mode)
        self._open_first()

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
        self._read_parts(file, spans([*homes, *[homes[-1] if homes else 0] * rest]))

    def _read_parts(self, file: GGUFFile, of: Many[tuple[int, range]]) -> None:
        """The weights of each of these, a device's number and its layers."""
        for home, layers in of:
            device = self.devices[home]
            with memory_or_error(device), on(device):
                weights = self._read_part(file, device, layers, layers == of[-1][1])
                if device.type == "cuda":
                    from hotcold.runtime.gpu.tune import tune_weights

                    tune_weights(weights, self.mode, operators(device), device)
                self.parts.append(weights)

    def _read_part(self, file: GGUFFile, device: torch.device, layers: range, last: bool) -> DeviceWeights:
        predicted = self.mode == "predicted"
        return read_weights(file, device, layers, with_predictors=predicted, with_head=last)

    def _converted(self) -> set[str]:
        """Types of weights that became F16."""
        return set().union(*(weights.converted for weights in self.parts))

    def _open(self, engine: Self, n_ctx: int) -> GpuSequence:
        return GpuSequence(engine, n_ctx)

    def _check_context(self, n_ctx: int) -> None:
        self._context_checked(n_ctx)


def file_and_mode(bundle: str | Path, mode: str) -> tuple[Path, str]:
    """The GGUF file that a mode reads. `auto` is the most sparse of those that the model offers."""
    model = ModelPath(bundle)
    mode = model.modes[-1] if mode == "auto" else mode
    return model.file_for(mode), mode


def _check_mode(file: GGUFFile, weights: DeviceWeights, mode: str) -> None:
    if weights.dense_file != (mode == "dense"):
        form = "a dense down matrix" if weights.dense_file else "neuron rows"
        raise UnsupportedError(f"{mode} mode cannot run a file with {form}", where=file.path)
