"""Putting another activation into a model's FFNs.

Those that give exact zeros, which is what the runtime skips. transformers knows each by its name in
`config.json` once hotcold is imported (`hotcold.model.activation_names`): a checkpoint needs no code of its
own.
"""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hotcold.errors import UnsupportedError
from hotcold.model.activation_names import NAMES, parse
from hotcold.model.checkpoint import ffn_layers

__all__ = ["set_activation"]


def set_activation(model: PreTrainedModel, name: str) -> None:
    """Make every FFN of `model` use the activation `name`, and its config say so.

    Raises UnsupportedError for an activation that is not one of `NAMES`, and for a model without gates.
    """
    if name != "relu" and parse(name) is None:
        raise UnsupportedError("unknown activation", got=name, expected=" | ".join(NAMES))
    layers = ffn_layers(model)
    if layers[0].up is None:
        kind = model.config.model_type
        raise UnsupportedError(
            "only gated FFNs can be made sparse here", got=kind, expected="a model with gates"
        )
    for layer in layers:
        setattr(layer.mlp, layer.act, ACT2FN[name])
    model.config.hidden_act = name
