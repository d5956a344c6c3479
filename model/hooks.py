"""What each FFN of a model takes and gives during a forward pass, by hooks that are gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from hotcold.model.checkpoint import ffn_layers

__all__ = ["on_ffns", "on_intermediates", "recorded_intermediates"]

OnIntermediate = Callable[[int, Tensor], None]
OnFfn = Callable[[int, Tensor, Tensor], None]


@contextmanager
def on_intermediates(model: PreTrainedModel, callback: OnIntermediate) -> Iterator[None]:
    """Call `callback(layer, act(gate)·up)` in every layer of each forward pass, [rows, tokens, d_ff].

    With activation checkpointing it is called again when the layer is recomputed.
    """
    with ExitStack() as hooks:
        for i, layer in enumerate(ffn_layers(model)):
            hooks.enter_context(
                layer.down.register_forward_pre_hook(lambda _, inputs, i=i: callback(i, inputs[0]))
            )
        yield


@contextmanager
def on_ffns(model: PreTrainedModel, callback: OnFfn) -> Iterator[None]:
    """Call `callback(layer, input, output)` for every FFN of each forward pass, [rows, tokens, d_model]."""
    with ExitStack() as hooks:
        for i, layer in enumerate(ffn_layers(model)):
            hooks.enter_context(
                layer.mlp.register_forward_hook(lambda _, inputs, output, i=i: callback(i, inputs[0], output))
            )
        yield


@contextmanager
def recorded_intermediates(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Yield a list that each forward pass fills with act(gate)·up per layer, [rows, tokens, d_ff]."""
    seen: list[Tensor] = [None] * len(ffn_layers(model))  # type: ignore[list-item]
    with on_intermediates(model, seen.__setitem__):
        yield seen
