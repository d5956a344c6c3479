"""Putting another activation into a model's FFNs, and watching what comes out of it.

Only ReLU so far: it gives exact zeros, which is what the runtime skips, and every HF model class knows it by
name, so that a checkpoint needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hotcold.checkpoint import ffn_layers
from hotcold.errors import UnsupportedError

__all__ = ["ACTIVATIONS", "recorded_intermediates", "set_activation"]

ACTIVATIONS = ("relu",)


def set_activation(model: PreTrainedModel, name: str) -> None:
    """Make every FFN of `model` use the activation `name`, and its config say so.

    Raises UnsupportedError for an activation that is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedError("unknown activation", got=name, expected=" | ".join(ACTIVATIONS))
    for layer in ffn_layers(model):
        layer.mlp.act_fn = ACT2FN[name]
    model.config.hidden_act = name


@contextmanager
def recorded_intermediates(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Yield a list that each forward pass fills with act(gate)·up per layer, [batch, tokens, d_ff]."""
    layers = ffn_layers(model)
    seen: list[Tensor] = [None] * len(layers)  # type: ignore[list-item]

    def hook(index: int):  # noqa: ANN202
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[index] = inputs[0]

        return record

    handles = [layer.down.register_forward_pre_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
