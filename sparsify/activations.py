"""Putting another activation into a model's FFNs.

Those that give exact zeros, which is what the runtime skips. transformers knows each by its name in
`config.json` once hotcold is imported (`hotcold.activations`), so that a checkpoint needs no code of its own.
"""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hotcold.activations import NAMES, parse
from hotcold.checkpoint import ffn_layers
from hotcold.errors import UnsupportedError

__all__ = ["set_activation"]


def set_activation(model: PreTrainedModel, name: str) -> None:
    """Make every FFN of `model` use the activation `name`, and its config say so.

    Raises UnsupportedError for an activation that is not one of `hotcold.activations.NAMES`.
    """
    if name != "relu" and parse(name) is None:
        raise UnsupportedError("unknown activation", got=name, expected=" | ".join(NAMES))
    for layer in ffn_layers(model):
        layer.mlp.act_fn = ACT2FN[name]
    model.config.hidden_act = name
