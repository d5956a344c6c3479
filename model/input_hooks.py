"""Input rules in torch: hooks that set to 0 what a model's matrices leave out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hotcold.model.families import FAMILIES
from hotcold.model.inputs import CONFIG_KEY, SITES, InputRule, config_entry, rules_of_config

__all__ = ["install_input_rules", "on_inputs", "set_input_rules", "site_modules"]

OnInput = Callable[[str, int, Tensor], None]

# Of the forward pass that this thread is in: the position of its first token, and how many tokens a row has.
_here = threading.local()


def site_modules(model: PreTrainedModel, site: str, layer: int) -> list[nn.Module]:
    """The modules of a layer that read a site, first to last."""
    names = FAMILIES[model.config.model_type].naming.names
    slots = [slot for slot in SITES[site] if slot in names] or ["qkv"]
    return [model.get_submodule(names[slot].format(layer)) for slot in slots]


def site_weights(model: PreTrainedModel, rule: InputRule, layer: int) -> Tensor | None:
    """What the score of `rule` multiplies |x_j| by, float32 [inputs]; None: nothing."""
    modules = site_modules(model, rule.site, layer)
    weights = rule.weights(module.weight.detach().float().cpu().numpy() for module in modules)
    return None if weights is None else torch.from_numpy(weights)


def set_input_rules(model: PreTrainedModel, rules: tuple[InputRule, ...]) -> PreTrainedModel:
    """Make `model`, which has none, follow input rules, and its config state them; returns it."""
    setattr(model.config, CONFIG_KEY, config_entry(rules))
    return install_input_rules(model)


def install_input_rules(model: PreTrainedModel) -> PreTrainedModel:
    """Make `model` follow the input rules that its config states, if any; returns it."""
    rules = rules_of_config(vars(model.config), model.config.num_hidden_layers)
    if rules:
        model.base_model.register_forward_pre_hook(_note_tokens, with_kwargs=True)
    for rule in rules:
        for layer in range(len(rule.thresholds)):
            modules, weights = site_modules(model, rule.site, layer), site_weights(model, rule, layer)
            width = modules[0].in_features
            least = rule.least(layer, width, None if weights is None else weights.numpy())
            for module in modules:
                module.register_forward_pre_hook(partial(_leave_out, torch.from_numpy(least)))
    return model


def _note_tokens(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids = args[0] if args else kwargs.get("input_ids")
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    cache = kwargs.get("past_key_values")
    _here.first = 0 if cache is None else cache.get_seq_length()
    _here.tokens = ids.shape[1]


def _leave_out(least: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = inputs[0]
    kept = x.float().abs() >= least.to(x.device)
    if _here.first == 0:  # some FFNs drop the dimension of the batch, so that rows are counted by tokens
        kept.view(-1, _here.tokens, x.shape[-1])[:, 0] = True
    return (torch.where(kept, x, 0.0), *inputs[1:])


@contextmanager
def on_inputs(model: PreTrainedModel, sites: tuple[str, ...], callback: OnInput) -> Iterator[None]:
    """Call `callback(site, layer, x)` with what the matrices of each site read, [..., inputs]."""
    with ExitStack() as hooks:
        for site in sites:
            for layer in range(model.config.num_hidden_layers):
                hook = partial(_call, callback, site, layer)
                hooks.enter_context(site_modules(model, site, layer)[0].register_forward_pre_hook(hook))
        yield


def _call(callback: OnInput, site: str, layer: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    callback(site, layer, inputs[0])
