"""Putting another firing rule into a model's FFNs, one that gives exact zeros: what the runtime skips."""

from __future__ import annotations

from transformers import PreTrainedModel

from hotcold.errors import UnsupportedError
from hotcold.model.checkpoint import ffn_layers
from hotcold.model.ffn_modules import set_firing
from hotcold.model.firing import NAMES, FiringRule

__all__ = ["check_gated", "set_activation"]


def set_activation(model: PreTrainedModel, name: str) -> None:
    """Make every FFN of `model` use the activation `name`, and its config say so.

    Raises UnsupportedError for an activation that gives no zeros, and for a model without gates.
    """
    rule = FiringRule.named(name, model.config.num_hidden_layers)
    if not rule.gives_zeros:
        raise UnsupportedError("unknown activation", got=name, expected=" | ".join(NAMES))
    check_gated(model)
    set_firing(model, rule)


def check_gated(model: PreTrainedModel) -> None:
    """Raise UnsupportedError for a model without gates."""
    if ffn_layers(model)[0].up is None:
        kind = model.config.model_type
        raise UnsupportedError(
            "only gated FFNs can be made sparse here", got=kind, expected="a model with gates"
        )
