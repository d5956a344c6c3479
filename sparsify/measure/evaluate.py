"""What sparsifying cost and what it brought: perplexity and sparsity of both models on the same text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hotcold.finite import perplexity_of
from hotcold.model.hooks import recorded_intermediates
from hotcold.model.limits import check_ids, check_window, n_embeddings

__all__ = ["Quality", "measure", "table", "zero_share"]

_CHUNK = 256  # tokens whose logits exist at a time
_BATCH = 4


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity over `tokens` predicted tokens, and per layer the share of exact zeros in act(gate)·up."""

    perplexity: float
    sparsity: list[float]
    tokens: int

    @property
    def mean_sparsity(self) -> float:
        return sum(self.sparsity) / len(self.sparsity)


@torch.no_grad()
def measure(model: PreTrainedModel, windows: Tensor) -> Quality:
    """Perplexity and sparsity on `windows` [n, length], each seen without what came before it.

    InputError if the perplexity is not finite, and for ids or lengths that the model has no embeddings
    for.
    """
    check_ids(windows.cpu().numpy(), n_embeddings(model))
    check_window(model, windows.shape[1])
    loss, zeros = 0.0, []
    with recorded_intermediates(model) as seen:
        for ids in windows.split(_BATCH):
            with torch.autocast(ids.device.type, dtype=torch.bfloat16):
                hidden = model.model(ids, use_cache=False).last_hidden_state
            loss += _loss(model, hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            zeros.append(torch.stack([zero_share(layer) for layer in seen]) * len(ids))
    tokens = windows[:, 1:].numel()
    sparsity = torch.stack(zeros).sum(0) / len(windows)
    return Quality(perplexity_of(loss / tokens), sparsity.tolist(), tokens)


def zero_share(intermediate: Tensor) -> Tensor:
    """Share of exact zeros in act(gate)·up [..., d_ff]: the sparsity of ProSparse, appendix C."""
    return 1 - intermediate.count_nonzero() / intermediate.numel()


def _loss(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> float:
    """Summed negative log likelihood of `targets` [tokens] given `hidden` [tokens, d_model]."""
    total = 0.0
    for states, ids in zip(hidden.split(_CHUNK), targets.split(_CHUNK), strict=True):
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            logits = model.lm_head(states)
        total += functional.cross_entropy(logits.float(), ids, reduction="sum").item()
    return total


def table(dense: Quality, sparse: Quality) -> str:
    """The summary that the command prints: quality in one line each, sparsity per layer."""
    ratio = sparse.perplexity / dense.perplexity
    lines = [
        f"perplexity  dense {dense.perplexity:.2f}  sparse {sparse.perplexity:.2f}  ({ratio:.3f}x, "
        f"{sparse.tokens} test tokens)",
        f"sparsity    {sparse.mean_sparsity:.1%} of act(gate)*up is zero, mean over layers",
        "",
        "layer  sparsity",
    ]
    return "\n".join(lines + [f"{layer:>5}  {share:>7.1%}" for layer, share in enumerate(sparse.sparsity)])
