"""Activation threshold shifting, ProSparse's third step: after training, small gates are made zero too.

ReLU becomes FATReLU (arXiv 2402.13516, eq. 3), which keeps x where x >= t and gives 0 elsewhere. One t for
all layers is what the paper does. A t per layer spreads the damage evenly: each layer gets the largest one
that changes its FFN's output by no more than a given share (the idea of CETT, arXiv 2402.03804).

Thresholds per layer are multiples of one t by powers of two, and are folded into the weights: gate rows
times 2^k and up rows times 2^-k, exact in floating point, leave the function as it is and make all
thresholds equal. So the checkpoint says `fatrelu_t` either way, which programs that read such models know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hotcold.errors import UnsupportedError
from hotcold.model.checkpoint import ffn_layers
from hotcold.model.hooks import on_ffns
from hotcold.model.modeling_sparse import FATReLU
from hotcold.sparsify.measure.evaluate import Quality, measure

__all__ = ["Point", "best", "curve", "fold", "per_layer", "tail_errors", "thresholded"]

STEPS = 7  # thresholds that a layer may have: t, t/2, …, t/2^6
_SAMPLE = 1024  # tokens on which a layer's error is measured


@dataclass(frozen=True, slots=True)
class Point:
    """A point of the curve: `knob` is the global threshold, or the share of output that may change."""

    knob: float
    thresholds: list[float]
    perplexity: float
    sparsity: float
    sparsity_per_layer: list[float]

    @classmethod
    def of(cls, knob: float, thresholds: Sequence[float], quality: Quality) -> Point:
        sparsity = quality.mean_sparsity
        return cls(knob, list(thresholds), quality.perplexity, sparsity, quality.sparsity)


@contextmanager
def thresholded(model: PreTrainedModel, thresholds: Sequence[float]):  # noqa: ANN201
    """Give layer i the FATReLU of `thresholds[i]` for as long as the block lasts.

    Raises UnsupportedError for a model whose activation is not ReLU-like.
    """
    name = model.config.hidden_act
    if name != "relu" and not name.startswith("fatrelu_"):
        raise UnsupportedError(
            "only ReLU models have thresholds to shift", got=name, expected="relu | fatrelu_T",
            fix="make the model sparse first: hotcold sparsify",
        )  # fmt: skip
    layers = ffn_layers(model)
    for layer, t in zip(layers, thresholds, strict=True):
        setattr(layer.mlp, layer.act, FATReLU(t))
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer.mlp, layer.act, layer.activation)


def curve(
    model: PreTrainedModel, windows: Tensor, settings: Iterable[tuple[float, Sequence[float]]],
    known: Callable[[float], Point | None] = lambda _: None, found: Callable[[Point], None] = lambda _: None,
) -> list[Point]:  # fmt: skip
    """Perplexity and sparsity on `windows` [n, length] for each (knob, thresholds per layer).

    `known` gives points of an earlier run, `found` is told new ones.
    """
    points = []
    for knob, thresholds in settings:
        point = known(knob)
        if point is None:
            with thresholded(model, thresholds):
                point = Point.of(knob, thresholds, measure(model, windows))
            found(point)
        points.append(point)
    return points


def best(points: Sequence[Point], budget: float) -> Point:
    """The sparsest point whose perplexity is at most `budget` times that of the first, unshifted, point."""
    allowed = [p for p in points if p.perplexity <= budget * points[0].perplexity]
    return max(allowed, key=lambda point: point.sparsity, default=points[0])


@torch.no_grad()
def tail_errors(model: PreTrainedModel, windows: Tensor, top: float) -> Tensor:
    """By how much `top`·2^-k, k = 0 … 6, changes each FFN's output; float32 [n_layers, 7].

    Relative to the output's own spread: ‖down(what is cut)‖² over the variance about the mean of tokens.
    """
    layers, errors = ffn_layers(model), []
    candidates = [top * 2.0**-k for k in range(STEPS)]

    def visit(index: int, x: Tensor, output: Tensor) -> None:
        layer = layers[index]
        x, output = x.flatten(0, -2)[:_SAMPLE], output.flatten(0, -2)[:_SAMPLE].float()
        gate = torch.relu(layer.gate(x))
        intermediate = gate * layer.up(x)
        spread = (output - output.mean(0)).square().mean()
        cut = [layer.down(torch.where(gate < t, intermediate, 0.0)).float() for t in candidates]
        errors.append(torch.stack([part.square().mean() for part in cut]) / spread)

    rows = max(1, _SAMPLE // windows.shape[1])
    with on_ffns(model, visit):
        model.model(windows[:rows], use_cache=False)
    return torch.stack(errors)


def per_layer(errors: Tensor, top: float, share: float) -> list[float]:
    """The largest candidate of each layer that changes its output by at most `share`, else the least one."""
    chosen = (errors <= share).int().argmax(1)
    chosen = torch.where((errors <= share).any(1), chosen, STEPS - 1)
    return [top * 2.0**-k for k in chosen.tolist()]


@torch.no_grad()
def fold(model: PreTrainedModel, thresholds: Sequence[float]) -> float:
    """Scale gates and ups of `model` in place so that one threshold stands for all; returns it.

    The thresholds must be equal up to powers of two; ValueError else. The middle one is taken for all, so
    that weights stay within what float16 can hold.
    """
    common = sorted(thresholds)[len(thresholds) // 2]
    if common == 0:
        return 0.0
    for layer, t in zip(ffn_layers(model), thresholds, strict=True):
        factor = common / t
        if math.frexp(factor)[0] != 0.5:
            raise ValueError(f"{t} is not {common} times a power of two")
        layer.gate.weight.mul_(factor)
        layer.up.weight.div_(factor)
    return common
