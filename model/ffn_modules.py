"""The model families in torch: where each keeps its FFN modules, and how a firing rule gets into them.

transformers does not know two `model_type`s that matter here without their remote code, which hotcold never
runs. Both are models that it does know: MiniCPM is a Granite (embedding, depth and logit scales) and Bamboo
(TurboSparse-Mistral) is a Mistral whose ReLU is applied to gate and up. Neither does it know most firing
rules (`hotcold.model.firing`): such a model is loaded as a ReLU model and gets its own by `set_firing`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from hotcold.errors import FormatError, ShapeError, UnsupportedError
from hotcold.model.families import FAMILIES, Family
from hotcold.model.firing import FiringRule, Score

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "GATED",
    "MODEL_TYPES",
    "FfnLayer",
    "activation_name",
    "as_relu",
    "as_transformers",
    "ffn_layers",
    "firing_rule",
    "is_known_to_transformers",
    "learned_positions",
    "set_firing",
]


@dataclass(frozen=True, slots=True)
class _Modules:
    """Paths: `layers` from the model, the others from a layer; `act` is an attribute of `mlp`."""

    layers: str
    norm: str
    gate: str | None
    up: str
    down: str
    mlp: str
    act: str
    key: str  # of the config
    positions: str | None  # of the config: how many are learned


def _modules(family: Family) -> _Modules:
    """By the names of its tensors."""
    paths = {slot: name.partition(".{}.") for slot, name in family.naming.names.items()}
    inside = {slot: path for slot, (_, _, path) in paths.items() if path}
    gated, learned = family.structure.gated, family.structure.learned_positions
    return _Modules(
        layers=paths["down"][0],
        norm=inside.get("norm", inside["ffn_norm"]),
        gate=inside["gate"] if gated else None,
        up=inside["up" if gated else "gate"],
        down=inside["down"],
        mlp=inside["down"].rpartition(".")[0],
        act=family.act,
        key=family.keys.get("hidden_act", "hidden_act"),
        positions="max_position_embeddings" if learned else None,
    )


_REMOTE = ("minicpm", "bamboo")  # model types that transformers lacks: see `as_transformers`
_FAMILIES = {name: _modules(family) for name, family in FAMILIES.items() if name not in _REMOTE}

GATED = tuple(name for name, modules in _FAMILIES.items() if modules.gate)
MODEL_TYPES = (*_FAMILIES, *_REMOTE)


@dataclass(frozen=True, slots=True)
class FfnLayer:
    """The modules of one FFN: `down(activation(gate(norm(x))) * up(norm(x)))`, x [..., d_model].

    In a model without gates (OPT, Falcon) it is `down(activation(gate(norm(x))))` and `up` is None. `mlp`
    holds the last four; to replace the activation set its attribute `act`.
    """

    norm: nn.Module
    gate: nn.Linear
    up: nn.Linear | None
    down: nn.Linear
    activation: nn.Module
    mlp: nn.Module
    act: str = "act_fn"


def ffn_layers(model: PreTrainedModel) -> list[FfnLayer]:
    """The FFN modules of each layer, first to last. Raises UnsupportedError for other architectures."""
    where = _family(model.config)
    return [_ffn_layer(layer, where) for layer in attrgetter(where.layers)(model)]


def _family(config: PretrainedConfig) -> _Modules:
    if config.model_type not in _FAMILIES:
        expected = " | ".join(_FAMILIES)
        raise UnsupportedError("unknown architecture", got=config.model_type, expected=expected)
    return _FAMILIES[config.model_type]


def _ffn_layer(layer: nn.Module, where: _Modules) -> FfnLayer:
    mlp = attrgetter(where.mlp)(layer) if where.mlp else layer
    # Falcon-40B's parallel blocks have a norm for each branch
    norm = "ln_mlp" if hasattr(layer, "ln_mlp") else where.norm
    up = attrgetter(where.up)(layer)
    return FfnLayer(
        norm=getattr(layer, norm),
        gate=attrgetter(where.gate)(layer) if where.gate else up,
        up=up if where.gate else None,
        down=attrgetter(where.down)(layer),
        activation=getattr(mlp, where.act),
        mlp=mlp,
        act=where.act,
    )


def activation_name(model: PreTrainedModel) -> str:
    """The FFN activation as `config.json` names it: `silu`, `relu`, `fatrelu_0.01`, …"""
    return getattr(model.config, _family(model.config).key)


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has a table for; None where they are computed, for any number."""
    key = _family(model.config).positions
    return getattr(model.config, key) if key else None


def as_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` as that of a model type which transformers knows; UnsupportedError for unknown ones.

    The activation keeps its name, which transformers may not know.
    """
    config = dict(config)
    match config.get("model_type"):
        case "minicpm":
            config |= _as_granite(config)
        case "bamboo":
            config |= {"model_type": "mistral"}
            config["hidden_act"] = {"relu": "drelu"}.get(config.get("hidden_act"), config.get("hidden_act"))
    if config.get("model_type") not in _FAMILIES:
        got, expected = config.get("model_type"), " | ".join(MODEL_TYPES)
        raise UnsupportedError("unknown architecture", got=got, expected=expected)
    for key in ("auto_map", "architectures"):
        config.pop(key, None)
    return config


def _as_granite(config: Mapping[str, Any]) -> dict[str, Any]:
    """MiniCPM's constants under Granite's names (modeling_minicpm.py of openbmb's checkpoints)."""
    keys = ["num_hidden_layers", "hidden_size", "num_attention_heads"]
    keys += ["scale_emb", "scale_depth", "dim_model_base"]
    for key in keys:
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise FormatError("bad value", field=key, got=config.get(key), expected="a number above 0")
    n_layers, d_model, n_heads, embedding, depth, base = (config[key] for key in keys)
    return {
        "model_type": "granite",
        "embedding_multiplier": float(embedding),
        "residual_multiplier": depth / math.sqrt(n_layers),
        "logits_scaling": d_model / base,
        "attention_multiplier": (d_model // n_heads) ** -0.5,
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
    }


def firing_rule(config: PretrainedConfig, values: Mapping[str, Any] | None = None) -> FiringRule | None:
    """The rule of a model's FFNs, None where it is an activation that only transformers knows.

    `values` are those of its `config.json`, without them its config's own.
    """
    family = _family(config)
    values = config.to_dict() if values is None else values
    name = values.get(family.key, getattr(config, family.key))
    try:
        return FiringRule.from_config(values, name, config.num_hidden_layers, gated=family.gate is not None)
    except UnsupportedError:
        if not _has(name):
            raise
    return None


def is_known_to_transformers(config: PretrainedConfig) -> bool:
    """Whether it computes the rule of this config by itself."""
    return _has(getattr(config, _family(config).key))


def _has(name: str) -> bool:
    from transformers.activations import ACT2FN

    return name in ACT2FN


def as_relu(values: Mapping[str, Any], config_type: str) -> dict[str, Any]:
    """`config.json` with an activation that transformers knows, whatever it was."""
    return {**values, _FAMILIES[config_type].key: "relu"}


def set_firing(model: PreTrainedModel, rule: FiringRule) -> PreTrainedModel:
    """Make every FFN of `model` fire by `rule`, and its config say so; returns it.

    Raises ShapeError where thresholds are not those of its neurons.
    """
    from hotcold.model.modeling_sparse import rectify

    for i, (layer, module) in enumerate(zip(ffn_layers(model), _modules(rule), strict=True)):
        threshold, d_ff = rule.thresholds[i], layer.gate.out_features
        if isinstance(threshold, tuple) and len(threshold) != d_ff:
            raise ShapeError(f"thresholds of layer {i}", got=len(threshold), expected=d_ff)
        setattr(layer.mlp, layer.act, module)
        if layer.up is not None:
            rectify(layer.up, rule.rule.score is Score.GATE_AND_UP)
    for key in ("activation_thresholds", "hidden_act_param"):
        if hasattr(model.config, key):
            delattr(model.config, key)
    for key, value in rule.as_config(_family(model.config).key).items():
        setattr(model.config, key, value)
    return model


def _modules(rule: FiringRule) -> Iterator[nn.Module]:
    """A module for each layer."""
    from hotcold.model.modeling_sparse import MODULES

    for threshold in rule.thresholds:
        yield MODULES[rule.name](*([threshold] if rule.rule.letter else []))
