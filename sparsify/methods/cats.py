"""The `cats` method: the smallest values of SiLU or GELU become zero, and nothing is trained.

CATS (arXiv 2404.08763): in each layer, a neuron fires for a token iff |act(gate)| reaches a threshold, that
which the wanted share of values on some text stays below. What fires keeps its value, so that the model
remains what it was but for small terms. The thresholds are taken on the calibrate part of the text, and
quality is reported on its test part.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from hotcold.cpus import torch_threads
from hotcold.errors import InputError, UnsupportedError
from hotcold.model.firing import FiringRule
from hotcold.ownership import check_replaceable

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedModel

    from hotcold.model.checkpoint import FfnLayer
    from hotcold.sparsify.measure.evaluate import Quality
    from hotcold.text import Part

__all__ = ["cats_rule", "quantiles", "run"]

_TOKENS, _WINDOW = 8192, 512
_RULES = {"silu": "thresholded_silu", "gelu": "thresholded_gelu"}
_SHIFT = 13  # of a float32's bits: bins whose edges are 0.1 % apart
_BINS = 1 << (31 - _SHIFT)


def run(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """Choose the thresholds, save, and print the summary table."""
    share, source, n_tokens = args.sparsity, args.text or "stdlib", args.tokens or _TOKENS
    if share is None or not 0 < share < 1:
        what = "--method cats needs the share of values to be made zero"
        raise InputError(what, where="--sparsity", got=share, expected="0 to 1")
    if n_tokens < _WINDOW:
        raise InputError("too few tokens", where="--tokens", got=n_tokens, expected=f">= {_WINDOW}")
    check_replaceable(args.out, "checkpoint", [args.model])
    torch_threads()

    from hotcold.model import checkpoint
    from hotcold.model.ffn_modules import set_firing
    from hotcold.model.limits import check_tokenizer
    from hotcold.model.standalone import standalone_files
    from hotcold.sparsify.measure.evaluate import measure, table
    from hotcold.sparsify.training.attention import use_grouped_attention
    from hotcold.sparsify.training.memory import keep_big_buffers

    keep_big_buffers()
    tokenizer, model = checkpoint.load_tokenizer(args.model), checkpoint.load_model(args.model)
    check_tokenizer(tokenizer, model)
    use_grouped_attention(model)
    window = min(_WINDOW, model.config.max_position_embeddings)
    calibrate, test = (_windows(source, part, tokenizer, window, n_tokens) for part in ("calibrate", "test"))
    rule = cats_rule(model, calibrate, share)
    dense = measure(model, test)
    sparse = measure(set_firing(model, rule), test)
    summary = {
        "method": "cats",
        "asked_sparsity": share,
        "text": source,
        "calibration_tokens": calibrate.numel(),
        "activation": rule.name,
        "thresholds": rule.thresholds,
        "perplexity_dense": dense.perplexity,
        "perplexity_sparse": sparse.perplexity,
        "heldout_tokens": sparse.tokens,
        "sparsity": sparse.mean_sparsity,
        "sparsity_per_layer": sparse.sparsity,
    }
    files = {"sparsify.json": (json.dumps(summary, indent=2) + "\n").encode()}
    files |= {"README.md": _card(args.model, summary, dense, sparse).encode()} | standalone_files(model)
    checkpoint.save(model.half(), tokenizer, args.out, like=args.model, files=files)
    print(table(dense, sparse))
    return 0


def _windows(source: str, part: Part, tokenizer: Tokenizer, window: int, n_tokens: int) -> Tensor:
    from hotcold import text
    from hotcold.sparsify.training.data import read_windows

    documents = text.documents(source, part)
    return read_windows(documents, tokenizer, window, n_tokens, f"{source}, {part} part")


def cats_rule(model: PreTrainedModel, windows: Tensor, share: float) -> FiringRule:
    """The rule by which `share` of the values on `windows` [n, length] become zero in each layer.

    UnsupportedError for a model without gates, or with another activation than SiLU or GELU.
    """
    from hotcold.model.ffn_modules import firing_rule
    from hotcold.sparsify.activations import check_gated

    check_gated(model)
    rule = firing_rule(model.config)
    if rule is None or rule.name not in _RULES:
        got = model.config.hidden_act if rule is None else rule.name
        fix = "shift the thresholds of a ReLU model: hotcold shift-thresholds"
        raise UnsupportedError("no activation for this method", got=got, expected=" | ".join(_RULES), fix=fix)
    return FiringRule(_RULES[rule.name], tuple(quantiles(model, windows, share)))


def quantiles(model: PreTrainedModel, windows: Tensor, share: float) -> list[float]:
    """What `share` of |act(gate)| in each layer stays below, on `windows` [n, length]."""
    import torch

    from hotcold.model.checkpoint import ffn_layers
    from hotcold.progress import Progress

    layers = ffn_layers(model)
    counts = [torch.zeros(_BINS, dtype=torch.int64) for _ in layers]

    def count(layer: FfnLayer, into: Tensor) -> Callable[..., None]:
        def hook(_: object, inputs: object, gate: Tensor) -> None:
            into.add_(_histogram(layer.activation(gate)))

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for layer, into in zip(layers, counts, strict=True):
            hooks.enter_context(layer.gate.register_forward_hook(count(layer, into)))
        with Progress("calibrate", total=windows.numel(), unit="tok") as progress:
            for ids in windows.split(1):
                model.model(ids, use_cache=False)
                progress.advance(ids.numel())
    return [_quantile(into.numpy(), share) for into in counts]


def _histogram(values: Tensor) -> Tensor:
    """How many magnitudes lie in each bin: positive floats are ordered as their bits are."""
    import torch

    bits = values.float().abs().view(torch.int32) >> _SHIFT
    return torch.bincount(bits.flatten(), minlength=_BINS)


def _quantile(counts: np.ndarray, share: float) -> float:
    """The lower edge of the bin that the quantile lies in, or the upper one if that is nearer to it."""
    below = np.concatenate([[0], np.cumsum(counts)])
    edge = int(np.abs(below - share * below[-1]).argmin())
    return float(np.array([edge << _SHIFT], np.int32).view(np.float32)[0])


def _card(model: str, summary: dict[str, Any], dense: Quality, sparse: Quality) -> str:
    from hotcold.sparsify.measure.card import Row, layer_table, summary_table

    rows = [Row("dense", dense), Row("sparse", sparse)]
    return f"""# {model}, sparsified by CATS

In each layer, values whose |act(gate)| stays below a threshold are zero (CATS, arXiv 2404.08763); no weight
was changed. {summary["asked_sparsity"]:.0%} of them were asked for. The thresholds come from
{summary["calibration_tokens"]} tokens of the calibrate part of the text `{summary["text"]}`. Measured on
{summary["heldout_tokens"]} tokens of its test part:

{summary_table(rows)}

transformers does not know this rule: load the model with `modeling_sparse.py`, which lies here, or with
hotcold.

{layer_table(rows)}
"""
