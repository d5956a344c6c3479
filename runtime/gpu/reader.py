"""Tensors of a GGUF file on a device. What a quantized type is decoded to is the operators' business."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hotcold.errors import UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.files.gguf import Tensor as Stored
from hotcold.files.quantize import as_f16, dequantize
from hotcold.files.stored import check_stored
from hotcold.files.tensor_check import misshapen_tensor, missing_tensor
from hotcold.finite import check_weight
from hotcold.model.forms import Form
from hotcold.runtime.cpu.kept_types import KEPT
from hotcold.runtime.triton.rows import Rows

__all__ = ["Reader"]


class Reader:
    """Tensors of `file`, checked, on `device`."""

    def __init__(self, file: GGUFFile, device: torch.device) -> None:
        self.file, self.device = file, device
        self.converted: set[str] = set()  # types that became F16
        self._unread = set(file.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.file.tensors

    def vector(self, name: str, n: int) -> Tensor:
        """float32 [n]."""
        values = check_weight(dequantize(self._tensor(name, (n,))).reshape(n), name, self.file.path)
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def bias(self, name: str, n: int, order: np.ndarray | None = None) -> Tensor | None:
        """A vector that may be missing."""
        if name not in self:
            return None
        values = self.vector(name, n)
        return values if order is None else values[torch.from_numpy(order).to(self.device)]

    def rows(self, name: str, n: int, width: int, order: np.ndarray | None = None) -> Rows:
        """The matrix [n, width], or its rows `order`. A leading dimension of one expert is dropped."""
        return self.host_rows(name, n, width, order).to(self.device)

    def host_rows(self, name: str, n: int, width: int, order: np.ndarray | None = None) -> Rows:
        """The same in main memory."""
        tensor = self._tensor(name, (n, width))
        if tensor.type in KEPT:
            data = check_stored(tensor.data, tensor.type, name, self.file.path)
            rows = Rows.from_gguf(tensor.type, data, width)
        else:
            self.converted.add(tensor.type)
            values = as_f16(dequantize(tensor).reshape(n, width))
            check_stored(values, "F16", name, self.file.path)
            rows = Rows.of(torch.from_numpy(values))
        return rows if order is None else rows.take(torch.from_numpy(order.astype(np.int64)))

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Stored:
        if name not in self.file.tensors:
            raise missing_tensor(name, self.file.path)
        self._unread.discard(name)
        tensor = self.file.tensors[name]
        if tuple(tensor.shape) not in (shape, (1, *shape)):
            raise misshapen_tensor(name, self.file.path, tensor.shape, shape)
        return tensor

    def check_all_known(self, layers: range, form: Form) -> None:
        """A tensor of a kind not read here (a bias, a norm of heads) means another function."""
        # those of cold neurons are left to the CPU, and thresholds are in the shape
        parts = ("fc1.weight", "fc2.weight", "ffn_gate", "ffn_up", "ffn_down", "ffn_act.thresholds")
        outer = ("token_embd.weight", "output.weight", "rope_freqs.weight", f"{form.positions}.weight")

        def known(name: str) -> bool:
            of_cold_neurons = not form.gated and name.endswith(".ffn_up.bias")
            return any(part in name for part in parts) and (not name.endswith(".bias") or of_cold_neurons)

        left = sorted(
            name
            for name in self._unread.difference(outer)
            if (not name.startswith("blk.") or int(name.split(".")[1]) in layers) and not known(name)
        )
        if left:
            what = "the GPU backend does not know this kind of tensor"
            raise UnsupportedError(what, where=self.file.path, got=left[0], fix="use --backend cpu")
