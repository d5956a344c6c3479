"""Training-free sparsity of inputs: each matrix leaves out its smallest ones (TEAL, arXiv 2408.14690).

One dense pass over a text counts the scores of every site and layer, and the asked quantile of them becomes
the threshold. Scores are those of `hotcold.model.inputs`: `wina`'s (arXiv 2505.19427) weighs an input by what
it is multiplied by. The checkpoint is the original's weights, its config states the rules.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hotcold.cpus import torch_threads
from hotcold.errors import InputError
from hotcold.model.input_hooks import on_inputs, set_input_rules, site_weights
from hotcold.model.inputs import CONFIG_KEY, SCORES, SITES, InputRule
from hotcold.ownership import check_replaceable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hotcold.sparsify.measure.evaluate import Quality

__all__ = ["calibrate", "measured_sparsity", "run"]

TOKENS, WINDOW = 8192, 512  # of the text that chooses, and of the one that judges
_DROPPED = 14  # bits of a score's mantissa that its bin does not tell: steps of 1/512


class _Scores:
    """How many scores of a site and layer were of which size. Positive floats' bits are in their order."""

    def __init__(self) -> None:
        self.counts = torch.zeros(1 << (31 - _DROPPED), dtype=torch.int64)

    def add(self, scores: Tensor) -> None:
        bins = scores.float().contiguous().view(torch.int32) >> _DROPPED
        self.counts += torch.bincount(bins.flatten().cpu(), minlength=len(self.counts))

    def quantile(self, share: float) -> float:
        """The smallest bin's edge that at least `share` of the scores are below."""
        below = self.counts.cumsum(0)
        edge = torch.searchsorted(below, share * below[-1]) + 1 if share else torch.tensor(0)
        return float((edge.int() << _DROPPED).view(torch.float32))


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, windows: Tensor, sites: Sequence[str], score: str, sparsity: float
) -> tuple[InputRule, ...]:
    """Rules that leave out `sparsity` of each site's inputs on `windows` [n, length], of all later tokens."""
    n_layers = model.config.num_hidden_layers
    draft = {site: InputRule(site, (0.0,) * n_layers, score) for site in sites}
    weights = {site: [site_weights(model, rule, i) for i in range(n_layers)] for site, rule in draft.items()}
    seen = {site: [_Scores() for _ in range(n_layers)] for site in sites}

    def count(site: str, layer: int, x: Tensor) -> None:
        scores, weight = _after_first(x, windows.shape[1]).abs(), weights[site][layer]
        seen[site][layer].add(scores if weight is None else scores * weight.to(x.device))

    _run(model, windows, count, sites)
    return tuple(
        InputRule(site, tuple(scores.quantile(sparsity) for scores in layers), score)
        for site, layers in seen.items()
    )


@torch.no_grad()
def measured_sparsity(
    model: PreTrainedModel, windows: Tensor, sites: Sequence[str]
) -> dict[str, list[float]]:
    """By site and layer, the share of inputs that are 0 on `windows`, but for first tokens."""
    zeros = {site: [0] * model.config.num_hidden_layers for site in sites}
    total = {site: list(layers) for site, layers in zeros.items()}

    def count(site: str, layer: int, x: Tensor) -> None:
        x = _after_first(x, windows.shape[1])
        zeros[site][layer] += x.numel() - int(x.count_nonzero())
        total[site][layer] += x.numel()

    _run(model, windows, count, sites)
    return {site: [found / n for found, n in zip(zeros[site], total[site], strict=True)] for site in sites}


def _after_first(x: Tensor, tokens: int) -> Tensor:
    """The inputs of all tokens but the first of each row, which keeps all of its own."""
    return x.reshape(-1, tokens, x.shape[-1])[:, 1:]


def _run(model: PreTrainedModel, windows: Tensor, count: Any, sites: Sequence[str]) -> None:
    with on_inputs(model, tuple(sites), count):
        for ids in windows:
            model.base_model(ids[None], use_cache=False)


def run(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """`hotcold sparsify --method teal`: calibrate, save, and print quality and sparsity."""
    sites, score = _checked(given)
    check_replaceable(args.out, "checkpoint", [args.model])
    torch_threads()
    from hotcold.model import checkpoint
    from hotcold.model.limits import check_tokenizer
    from hotcold.sparsify.measure.evaluate import measure

    tokenizer = checkpoint.load_tokenizer(args.model)
    chosen, test = (_windows(args, tokenizer, part) for part in ("calibrate", "test"))
    model = checkpoint.load_model(args.model)
    check_tokenizer(tokenizer, model)
    if getattr(model.config, CONFIG_KEY, None):
        what, fix = "the model leaves inputs out already", "give the one that it was made of"
        raise InputError(what, where=args.model, fix=fix)
    dense = measure(model, test)
    set_input_rules(model, calibrate(model, chosen, sites, score, args.sparsity))
    sparse, shares = measure(model, test), measured_sparsity(model, test, sites)
    summary = _summary(args, score, dense, sparse, shares)
    files = {"inputs.json": (json.dumps(summary, indent=2) + "\n").encode()}
    checkpoint.save(model.half(), tokenizer, args.out, like=args.model, files=files)
    print(_table(dense, sparse, shares))
    return 0


def _checked(given: dict[str, Any]) -> tuple[list[str], str]:
    """The sites and the score. InputError for what cannot be left out."""
    share, score = given.get("sparsity"), given.get("score", "magnitude")
    if share is None or not 0 < share < 1:
        expected = "more than 0, less than 1"
        raise InputError("not a share of inputs", where="--sparsity", got=share, expected=expected)
    if score not in SCORES:
        raise InputError("unknown score", where="--score", got=score, expected=" | ".join(SCORES))
    sites = given["sites"].split(",") if "sites" in given else list(SITES)
    for site in sites:
        if site not in SITES:
            raise InputError("unknown site", where="--sites", got=site, expected=", ".join(SITES))
    return [site for site in SITES if site in sites], score


def _windows(args: argparse.Namespace, tokenizer: Any, part: Any) -> Tensor:
    from hotcold import text
    from hotcold.sparsify.training.data import read_windows

    source = args.text or "stdlib"
    documents = text.documents(source, part)
    return read_windows(documents, tokenizer, WINDOW, args.tokens or TOKENS, f"{source}, {part} part")


def _summary(
    args: argparse.Namespace, score: str, dense: Quality, sparse: Quality, shares: dict[str, list[float]]
) -> dict[str, object]:
    return {
        "method": "teal",
        "score": score,
        "asked_sparsity": args.sparsity,
        "text": args.text or "stdlib",
        "perplexity_dense": dense.perplexity,
        "perplexity_sparse": sparse.perplexity,
        "test_tokens": sparse.tokens,
        "sparsity_per_layer": shares,
    }


def _table(dense: Quality, sparse: Quality, shares: dict[str, list[float]]) -> str:
    ratio = sparse.perplexity / dense.perplexity
    means = ", ".join(f"{site} {sum(layers) / len(layers):.1%}" for site, layers in shares.items())
    return (
        f"perplexity  dense {dense.perplexity:.2f}  sparse {sparse.perplexity:.2f}  ({ratio:.3f}x, "
        f"{sparse.tokens} test tokens)\ninputs left out on them, mean over layers: {means}"
    )
