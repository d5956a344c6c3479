"""The tables of a model card: what each step of the method did to perplexity and to each layer's sparsity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hotcold.sparsify.activations import set_activation
from hotcold.sparsify.config import Config
from hotcold.sparsify.measure.evaluate import Quality, measure
from hotcold.sparsify.methods.prosparse import trained_model
from hotcold.sparsify.training.attention import use_grouped_attention
from hotcold.sparsify.training.rounding import quantizable, round_q4_0
from hotcold.table import markdown

__all__ = ["Row", "layer_table", "measured", "rounded", "steps", "summary_table"]

_ORDER = {"warm-start": (0, 0), "trained": (2, 0)}

Load = Callable[[], PreTrainedModel]


@dataclass(frozen=True, slots=True)
class Row:
    """A model and its quality."""

    name: str
    quality: Quality


def steps(dense: Load, config: Config, stages: Path | None) -> Iterator[tuple[str, Load]]:
    """The dense model, the same with the config's activation and no training, and each stage that was kept.

    `stages` is the folder of that name in the working folder of a run.
    """
    yield "dense", dense

    def untrained() -> PreTrainedModel:
        model = dense()
        set_activation(model, config.activation)
        return model

    yield f"{config.activation}, untrained", untrained
    files = sorted(stages.glob("*.safetensors"), key=_order) if stages is not None else []
    for file in files:
        yield file.stem, lambda file=file: trained_model(dense(), config, load_file(file), rounded=False)


def _order(path: Path) -> tuple[int, int]:
    """Warm start, stage 0, 1, …, trained."""
    return _ORDER.get(path.stem) or (1, int(path.stem.rpartition("-")[2]))


@torch.no_grad()
def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """Every matrix as Q4_0 stores it, in place."""
    for module, transposed in list(quantizable(model)):
        weight = module.weight.float()
        value = round_q4_0(weight.T.contiguous()).T if transposed else round_q4_0(weight)
        module.weight = nn.Parameter(value.contiguous(), requires_grad=False)
    return model


def measured(models: Iterator[tuple[str, Load]], windows: Tensor, *, q4_0: bool) -> Iterator[Row]:
    """Each model's quality on `windows` [n, length]; one model is in memory at a time."""
    for name, load in models:
        model = load().requires_grad_(False)
        use_grouped_attention(model)
        yield Row(name, measure(rounded(model) if q4_0 else model, windows))


def summary_table(rows: list[Row]) -> str:
    """Markdown: perplexity, its ratio to the first row's, mean sparsity."""
    lines = []
    for row in rows:
        q, ratio = row.quality, row.quality.perplexity / rows[0].quality.perplexity
        lines.append((row.name, f"{q.perplexity:.2f}", f"{ratio:.3f}", f"{q.mean_sparsity:.1%}"))
    return markdown(("model", "perplexity", "ratio", "sparsity"), lines)


def layer_table(rows: list[Row]) -> str:
    """Markdown: the sparsity of each layer, a column per model."""
    lines = [
        [str(layer), *(f"{row.quality.sparsity[layer]:.1%}" for row in rows)]
        for layer in range(len(rows[0].quality.sparsity))
    ]
    return markdown(["layer", *(row.name for row in rows)], lines, left=())
