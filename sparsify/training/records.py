"""Training records for those who watch: TensorBoard, where it is installed (the extra `hotcold[watch]`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Records"]

_NOT_SHOWN = ("phase", "step", "sparsity_per_layer")


class Records:
    """Writes every number of a record under PHASE/NAME, and the sparsity of each layer."""

    def __init__(self, folder: Path) -> None:
        self._writer = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder))

    def add(self, record: dict[str, Any]) -> None:
        """Show one record; nothing happens without TensorBoard."""
        if self._writer is None:
            return
        phase, step = record["phase"], record["step"]
        for name, value in record.items():
            if name not in _NOT_SHOWN:
                self._writer.add_scalar(f"{phase}/{name}", value, step)
        for layer, share in enumerate(record["sparsity_per_layer"]):
            self._writer.add_scalar(f"{phase}/sparsity of layer/{layer}", share, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
