"""Training with the rounding of Q4_0 in the loop, so that the model is good after quantisation.

Each weight is used as Q4_0 would store it (ggml's reference rounding), while gradients reach the float weight
as if there were no rounding (straight-through estimator, Bengio et al. 2013). At the end the rounded values
take the place of the float weights, and Q4_0 stores them without any further loss.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from hotcold.checkpoint import ffn_layers

__all__ = ["bake", "prepare_rounding", "quantisable", "round_q4_0", "start_rounding"]

_BLOCK = 32


def round_q4_0(weight: Tensor) -> Tensor:
    """Round float32 [rows, cols] to what Q4_0 can hold: blocks of 32 along a row, one float16 scale each.

    The rule is ggml's `quantize_row_q4_0_ref`: scale = (the entry of largest magnitude) / -8, codes 0 … 15.
    cols must be a multiple of 32.
    """
    blocks = weight.reshape(-1, _BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    codes = torch.floor(blocks * inverse + 8.5).clamp_(max=15)
    return ((codes - 8) * scale.half().float()).reshape(weight.shape)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, transposed: bool) -> Tensor:  # noqa: ANN001
        return round_q4_0(weight.T).T if transposed else round_q4_0(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        return gradient, None


class _FakeQuantise(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed, self.on = transposed, False

    def forward(self, weight: Tensor) -> Tensor:
        return _Straight.apply(weight, self.transposed) if self.on else weight


def quantisable(model: PreTrainedModel) -> Iterator[tuple[nn.Module, bool]]:
    """Yield each module with a 2-D `weight` whose rows are whole blocks, and whether it is stored transposed.

    The FFN's down matrix is: neuron-major files hold one row of it per neuron.
    """
    down = {id(layer.down) for layer in ffn_layers(model)}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            transposed = id(module) in down
            if module.weight.shape[0 if transposed else 1] % _BLOCK == 0:
                yield module, transposed


def prepare_rounding(model: PreTrainedModel) -> None:
    """Give each linear layer that learns a switch for rounding, off at first.

    The switches are there from the start, so that parameters keep their names for optimisers and wrappers.
    """
    for module, transposed in list(quantisable(model)):
        if module.weight.requires_grad:
            parametrize.register_parametrization(module, "weight", _FakeQuantise(transposed), unsafe=True)


def start_rounding(model: PreTrainedModel) -> None:
    """Make each linear layer compute with its weight rounded to Q4_0; frozen ones are rounded here, once."""
    for module, transposed in list(quantisable(model)):
        if parametrize.is_parametrized(module, "weight"):
            module.parametrizations.weight[0].on = True
        else:
            with torch.no_grad():
                module.weight.copy_(_Straight.apply(module.weight, transposed))


def bake(model: PreTrainedModel) -> None:
    """Put the rounded weights in the place of the float ones; the model's function stays what it was."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
