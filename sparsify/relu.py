"""The `relu` method: SiLU out, ReLU in, and the model repaired against its dense self in minutes on a CPU.

1. text: documents at hand, mixed with text that the dense model writes itself;
2. layer-wise: each FFN alone learns what its dense twin gives (`layerwise`);
3. end to end: KL from the dense model, with progressive L1 and Q4_0 rounding (`distill`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from hotcold import text
from hotcold.sparsify.activations import set_activation
from hotcold.sparsify.attention import use_grouped_attention
from hotcold.sparsify.data import Windows, read_windows
from hotcold.sparsify.distill import distill
from hotcold.sparsify.evaluate import Quality, measure
from hotcold.sparsify.generate import write_text
from hotcold.sparsify.layerwise import fit_layers
from hotcold.sparsify.recipe import Recipe

__all__ = ["Result", "sparsify_relu"]

Log = Callable[[dict[str, float | int | str]], None]


@dataclass(frozen=True, slots=True)
class Result:
    """The sparse model in float32, and both models' quality on held-out text."""

    model: PreTrainedModel
    dense: Quality
    sparse: Quality


def sparsify_relu(
    model: PreTrainedModel, tokenizer: Tokenizer, source: str, recipe: Recipe, log: Log
) -> Result:
    """Turn `model` (float32, changed in place) into a ReLU model that imitates it on the text `source`.

    `log` gets a record per training step. Raises InputError where `source` has too little text.
    """
    heldout = _text_windows(tokenizer, source, "heldout", recipe, recipe.heldout_tokens)
    use_grouped_attention(model)
    model.requires_grad_(False)
    teacher = copy.deepcopy(model).to(torch.bfloat16)
    windows = Windows(_training_windows(teacher, tokenizer, source, recipe), recipe.seed)
    dense = measure(model, heldout)
    set_activation(model, "relu")
    fit_layers(model, teacher, windows, recipe, log)
    distill(model, teacher, windows, recipe, log)
    model.requires_grad_(False)
    return Result(model, dense, measure(model, heldout))


def _training_windows(teacher: PreTrainedModel, tokenizer: Tokenizer, source: str, recipe: Recipe) -> Tensor:
    written = round(recipe.tokens * recipe.generated_share / recipe.generated_passes)
    parts = []
    if read := recipe.tokens - round(recipe.tokens * recipe.generated_share):
        parts.append(_text_windows(tokenizer, source, "train", recipe, read))
    if written:
        ids = write_text(teacher, tokenizer, recipe.sequence, written, recipe.seed)
        parts += [ids] * recipe.generated_passes
    return torch.cat(parts)


def _text_windows(tokenizer: Tokenizer, source: str, part: str, recipe: Recipe, n_tokens: int) -> Tensor:
    documents = text.split(text.documents(source), part)
    return read_windows(documents, tokenizer, recipe.sequence, n_tokens, f"{source}, {part} part")
