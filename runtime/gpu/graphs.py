"""CUDA graphs of repeated steps: launching a token's few hundred kernels costs more than running them.

A step reads and writes tensors that stay where they are. Its first call runs it as it is (Triton compiles
there), the second records it without running and replays the record, as do later ones. On a CPU every call
just runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

__all__ = ["Graphs"]


class Graphs:
    """Recorded steps by key; a step must do the same at every call with its key."""

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self._records = enabled and device.type == "cuda"
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._records else None
        # torch's own capture stream belongs to whichever GPU was recorded on first.
        self._stream = torch.cuda.Stream(device) if self._records else None

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run `step`, or its record."""
        if not self._records or key not in self._seen:
            self._seen.add(key)
            step()
            return
        if key not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                step()
            self._graphs[key] = graph
        self._graphs[key].replay()
