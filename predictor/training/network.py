"""The predictor of one layer: which neurons will fire, from the FFN's input, by two thin matrices.

`logits = fc2 · relu(fc1 · x)`, no biases: the form of ProSparse's predictors and the one that PowerInfer runs
(arXiv 2402.13516 appendix C, 2312.12456 section 5.1). It is positively homogeneous: scaling `x` scales the
logits alike. So a network trained on normalized inputs can be fed the raw residual stream as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "PredictorNetwork",
    "class_weighted_bce",
    "class_weighted_bce_gradient",
    "default_rank",
    "negative_weight",
]


class PredictorNetwork(nn.Module):
    """Maps x [..., d_model] to one logit per neuron [..., d_ff]."""

    def __init__(self, d_model: int, d_ff: int, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, rank, bias=False)
        self.fc2 = nn.Linear(rank, d_ff, bias=False)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., d_ff] of x [..., d_model]."""
        return self.fc2(F.relu(self.fc1(x)))


def default_rank(d_model: int) -> int:
    """4·sqrt(d_model), rounded up to a multiple of 64: 128 for 576, 256 for 4096.

    Every token reads rank·(d_model + d_ff) weights of the predictor. A rank in proportion to d_model would
    cost the same share of the FFN at any size; a big model, which is sparser, would save less than it
    could.
    """
    return 64 * max(1, round(4 * d_model**0.5 / 64 + 0.49))


def negative_weight(active_share: float, target_recall: float) -> float:
    """The weight of an inactive neuron in the loss, where an active one weighs 1.

    DejaVu_predictor's `active_share + 0.005`, which puts the logit threshold of about 90 % recall near 0,
    times `(1 - target_recall) / 0.1`, which does the same for other targets. A threshold near 0 is what
    PowerInfer takes by default, and it means the same for a token of any norm, since the network is
    homogeneous.
    """
    return (active_share + 0.005) * min(1.0, max((1 - target_recall) / 0.1, 0.01))


def class_weighted_bce(logits: Tensor, active: Tensor, negative: float) -> Tensor:
    """Mean binary cross entropy, active neurons weighing 1 and inactive ones `negative`.

    `logits` and `active` (0 or 1) are floats [tokens, d_ff]; returns a scalar (arXiv 2402.13516's
    DejaVu_predictor, main_mlp.py).
    """
    return F.binary_cross_entropy_with_logits(logits, active, weight=active * (1 - negative) + negative)


def class_weighted_bce_gradient(logits: Tensor, active: Tensor, negative: float) -> Tensor:
    """Gradient of the *sum* of that loss with respect to `logits`: `weight · (sigmoid(logits) - active)`.

    It costs three passes where autograd takes a dozen, which are most of a training step's time.
    """
    # weight · active is active, since an active neuron weighs 1
    return logits.sigmoid().mul_(active * (1 - negative) + negative).sub_(active)
