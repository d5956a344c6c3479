"""Llama-like models whose FFNs give exact zeros. This file needs torch and transformers, and nothing else.

hotcold copies it beside a checkpoint whose activation transformers does not know. Load such a checkpoint with

    from modeling_sparse import SparseLlamaForCausalLM
    model = SparseLlamaForCausalLM.from_pretrained(FOLDER)

or with hotcold.model.checkpoint.load_model. hotcold trains and measures with these modules too. Apache-2.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

__all__ = [
    "MODULES",
    "DReLU",
    "FATReLU",
    "GateThresholdedGELU",
    "GateThresholdedSiLU",
    "ReLU2",
    "ShiftedReLU",
    "SparseGraniteForCausalLM",
    "SparseLlamaForCausalLM",
    "SparseMistralForCausalLM",
    "SparseQwen2ForCausalLM",
    "SparseQwen3ForCausalLM",
    "ThresholdedGELU",
    "ThresholdedSiLU",
    "rectify",
]


class _Thresholded(nn.Module):
    """An activation with a threshold: one number for all neurons, or one each."""

    def __init__(self, threshold: float | Sequence[float]) -> None:
        super().__init__()
        self.threshold = threshold
        each = isinstance(threshold, Sequence)
        # Not a buffer: it is in the config, and must not be rounded with the weights or be left on `meta`.
        self._each = torch.tensor(threshold, dtype=torch.float32, device="cpu") if each else None

    def limit(self, x: Tensor) -> Tensor | float:
        """What scores, which are as x, are compared with."""
        if self._each is None:
            return self.threshold
        self._each = self._each.to(x.device)
        return self._each

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        each = self._each
        return f"{self.threshold:g}" if each is None else f"{each.min():g} to {each.max():g}"


class FATReLU(_Thresholded):
    """x where it is positive and reaches the threshold, else 0 (ProSparse, arXiv 2402.13516, equation 3)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., d_ff]."""
        return torch.where((x > 0) & (x >= self.limit(x)), x, 0.0)


class ShiftedReLU(_Thresholded):
    """max(x - threshold, 0) (arXiv 2310.04564)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., d_ff]."""
        return functional.relu(x - self.limit(x)).to(x.dtype)


class ThresholdedSiLU(_Thresholded):
    """silu(x) where its magnitude reaches the threshold, else 0 (CATS, arXiv 2404.08763)."""

    act = staticmethod(functional.silu)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., d_ff]."""
        value = self.act(x)
        return torch.where(value.abs() >= self.limit(x), value, 0.0)


class ThresholdedGELU(ThresholdedSiLU):
    """The same with GELU."""

    act = staticmethod(functional.gelu)


class GateThresholdedSiLU(ThresholdedSiLU):
    """silu(x) where x itself reaches the threshold, else 0."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., d_ff]."""
        return torch.where(x >= self.limit(x), self.act(x), 0.0)


class GateThresholdedGELU(GateThresholdedSiLU):
    """The same with GELU."""

    act = staticmethod(functional.gelu)


class ReLU2(nn.Module):
    """max(x, 0)² (arXiv 2402.03804)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return functional.relu(x).square()


class DReLU(nn.ReLU):
    """ReLU on the gate; `rectify` puts another on up, and both together are dReLU (arXiv 2406.05955)."""


MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu2": ReLU2,
    "drelu": DReLU,
    "fatrelu": FATReLU,
    "shifted_relu": ShiftedReLU,
    "thresholded_silu": ThresholdedSiLU,
    "thresholded_gelu": ThresholdedGELU,
    "gate_thresholded_silu": GateThresholdedSiLU,
    "gate_thresholded_gelu": GateThresholdedGELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def _rectified(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.relu()


def rectify(up: nn.Module, wanted: bool) -> None:
    """Apply ReLU to what an up projection gives, or no longer."""
    for key, hook in list(up._forward_hooks.items()):
        if hook is _rectified:
            del up._forward_hooks[key]
    if wanted:
        up.register_forward_hook(_rectified)


class _Sparse:
    """Builds the model with ReLU, and puts the rule that the config names in its place.

    That is `hidden_act`, with a threshold for all neurons in it (`fatrelu_0.01`), or else thresholds in
    `activation_thresholds`: for each layer a number, or a list of one per neuron.
    """

    def __init__(self, config: Any) -> None:
        name, config.hidden_act = config.hidden_act, "relu"
        super().__init__(config)
        config.hidden_act = name
        numbered = re.fullmatch(r"([a-z_]+[a-z])_(-?[\d.]+(?:e[+-]?\d+)?)", name)
        kind, common = (numbered[1], float(numbered[2])) if numbered else (name, 0.0)
        each = getattr(config, "activation_thresholds", [common] * config.num_hidden_layers)
        for layer, threshold in zip(self.model.layers, each, strict=True):
            module = MODULES[kind]
            layer.mlp.act_fn = module(threshold) if issubclass(module, _Thresholded) else module()
            rectify(layer.mlp.up_proj, kind == "drelu")


class SparseLlamaForCausalLM(_Sparse, LlamaForCausalLM):
    """Llama with a sparse activation."""


class SparseGraniteForCausalLM(_Sparse, GraniteForCausalLM):
    """Granite, MiniCPM included, with a sparse activation."""


class SparseMistralForCausalLM(_Sparse, MistralForCausalLM):
    """Mistral with a sparse activation."""


class SparseQwen2ForCausalLM(_Sparse, Qwen2ForCausalLM):
    """Qwen2 with a sparse activation."""


class SparseQwen3ForCausalLM(_Sparse, Qwen3ForCausalLM):
    """Qwen3 with a sparse activation."""
