"""Training with the rounding of Q4_0 in the loop, so that the model is good after quantization.

Each weight is used as Q4_0 would store it (ggml's reference rounding), while gradients reach the float weight
as if there were no rounding (straight-through estimator, Bengio et al. 2013). At the end the rounded values
take the place of the float weights, and Q4_0 stores them without any further loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from hotcold.model.checkpoint import ffn_layers

__all__ = [
    "bake",
    "pack_q4_0",
    "prepare_rounding",
    "quantizable",
    "round_q4_0",
    "start_rounding",
    "unpack_q4_0",
]

_BLOCK = 32


def round_q4_0(weight: Tensor) -> Tensor:
    """Round float32 [rows, cols] to what Q4_0 can hold: blocks of 32 along a row, one float16 scale each.

    The rule is ggml's `quantize_row_q4_0_ref`: scale = (the entry of largest magnitude) / -8, codes 0 … 15.
    cols must be a multiple of 32.
    """
    scale, codes = _scale_and_codes(weight.reshape(-1, _BLOCK))
    return ((codes - 8) * scale.float()).reshape(weight.shape)


def pack_q4_0(weight: Tensor) -> Tensor:
    """The bytes in which ggml stores float32 [rows, cols] as Q4_0, uint8 [rows, cols / 32 * 18].

    A block is its float16 scale and 16 bytes, of which byte i holds code i below code i + 16.
    """
    blocks = weight.reshape(-1, _BLOCK)
    scale, codes = _scale_and_codes(blocks)
    codes = codes.to(torch.uint8)
    nibbles = codes[:, :16] | codes[:, 16:] << 4
    return torch.cat([scale.view(torch.uint8), nibbles], 1).reshape(len(weight), -1)


def unpack_q4_0(packed: Tensor) -> Tensor:
    """The inverse of `pack_q4_0`: float32 [rows, cols] of uint8 [rows, cols / 32 * 18]."""
    blocks = packed.reshape(-1, 18)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    codes = torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1)
    return ((codes.float() - 8) * scale).reshape(len(packed), -1)


def _scale_and_codes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of blocks [n, 32]: scales float16 [n, 1] and codes 0 … 15, float [n, 32]."""
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return scale.half(), torch.floor(blocks * inverse + 8.5).clamp_(max=15)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, transposed: bool) -> Tensor:  # noqa: ANN001
        return round_q4_0(weight.T).T if transposed else round_q4_0(weight)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        return grad_outputs[0], None


class _FakeQuantize(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed, self.on = transposed, False

    def forward(self, weight: Tensor) -> Tensor:
        return _Straight.apply(weight, self.transposed) if self.on else weight


def quantizable(model: PreTrainedModel) -> Iterator[tuple[nn.Linear | nn.Embedding, bool]]:
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

    The switches are there from the start, so that parameters keep their names for optimizers and wrappers.
    """
    for module, transposed in list(quantizable(model)):
        if module.weight.requires_grad:
            parametrize.register_parametrization(module, "weight", _FakeQuantize(transposed), unsafe=True)


def start_rounding(model: PreTrainedModel) -> None:
    """Make each linear layer compute with its weight rounded to Q4_0; frozen ones are rounded here, once."""
    for module, transposed in list(quantizable(model)):
        if parametrize.is_parametrized(module, "weight"):
            _switch(module).on = True
        else:
            with torch.no_grad():
                module.weight.copy_(_Straight.apply(module.weight, transposed))


def _switch(module: nn.Module) -> _FakeQuantize:
    """What `prepare_rounding` has put on the weight."""
    (switch,) = cast("parametrize.ParametrizationList", module.get_submodule("parametrizations.weight"))
    return cast("_FakeQuantize", switch)


def bake(model: PreTrainedModel) -> None:
    """Put the rounded weights in the place of the float ones; the model's function stays what it was."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
