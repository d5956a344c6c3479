"""The kind `lowrank-mlp`: which neurons will fire, from the residual stream, by a small trained network.

`logits = fc2 · relu(fc1 · x)`, no biases: the form of ProSparse's predictors and the one that PowerInfer runs
(arXiv 2402.13516 appendix C, 2312.12456 section 5.1). It is positively homogeneous: scaling `x` scales the
logits alike.

The norm of the residual stream differs from token to token. Training divides it by its RMS, which the
model's own FFN norm does too, so that no token outweighs the others. The network that comes out is fed the
raw stream all the same: being homogeneous, it gives raw logits that are the normalized ones times the
token's RMS, of the same sign. `fc1` is finally divided by the median RMS, so that a typical token's logits
stay what the loss made them, log odds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hotcold.errors import InputError
from hotcold.predictor.kinds.table import Weights
from hotcold.predictor.training.data import LayerData, chunks
from hotcold.predictor.training.train import TrainOptions

__all__ = [
    "PredictorNetwork",
    "class_weighted_bce",
    "class_weighted_bce_gradient",
    "negative_weight",
    "settings",
    "train",
]


def train(
    data: LayerData, frequency: np.ndarray, options: TrainOptions, on_epoch: Callable[[float], None]
) -> Weights:
    """Train, and keep the weights of the best loss on calibrate, which `on_epoch` is told after each epoch.

    The result depends on data, options, and torch's number of threads alone.
    """
    generator = torch.Generator().manual_seed(options.seed)
    network = PredictorNetwork(data.x.shape[1], data.d_ff, options.rank, generator)
    negative = negative_weight(float(frequency.mean()), options.target_recall)
    _fit(network, data, options, negative, generator, on_epoch)
    fc1 = network.fc1.weight.detach() / _median_rms(data)
    return Weights(fc1.numpy(), network.fc2.weight.detach().numpy())


def settings(options: TrainOptions) -> dict[str, Any]:
    """See `Trainer`."""
    names = ("epochs", "batch", "learning_rate", "weight_decay", "patience", "seed")
    return {
        "dtype": str(_compute_dtype()).removeprefix("torch."),
        **{name: getattr(options, name) for name in names},
    }


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


def _fit(
    network: PredictorNetwork,
    data: LayerData,
    options: TrainOptions,
    negative: float,
    generator: torch.Generator,
    on_epoch: Callable[[float], None],
) -> None:
    """Minimize the class-weighted loss; `network` ends with the weights of its best epoch."""
    rows = data.rows("train")
    step = _stepper(network, options, n_steps=options.epochs * -(-len(rows) // options.batch))
    best, best_state, worse = float("inf"), {}, 0
    for _ in range(options.epochs):
        order = rows[torch.randperm(len(rows), generator=generator).numpy()]
        for batch in chunks(order, options.batch):
            step(_normalized(data.x[batch]), data.labels(batch), negative)
        loss = _calibration_loss(network, data, negative)
        on_epoch(loss)
        worse = 0 if loss < best else worse + 1
        if not worse:
            best, best_state = loss, {name: value.clone() for name, value in network.state_dict().items()}
        elif worse == options.patience:
            break
    if not best_state:
        raise InputError("training diverged: the loss is not finite", fix="give a lower --lr")
    network.load_state_dict(best_state)


def _stepper(
    network: PredictorNetwork, options: TrainOptions, n_steps: int
) -> Callable[[Tensor, np.ndarray, float], None]:
    """One optimizer step as a function of normalized x, labels and the negatives' weight."""
    rate = options.learning_rate
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=rate, weight_decay=options.weight_decay, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=n_steps, pct_start=0.1)
    dtype = _compute_dtype()

    def step(x: Tensor, labels: np.ndarray, negative: float) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = network(x)
        active = torch.from_numpy(labels).to(logits.dtype)
        logits.backward(class_weighted_bce_gradient(logits.detach(), active, negative))
        optimizer.step()
        schedule.step()

    return step


def _compute_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively, which halves the time; else float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


@torch.no_grad()
def _calibration_loss(network: PredictorNetwork, data: LayerData, negative: float) -> float:
    rows = data.rows("calibrate")
    total = 0.0
    for chunk in chunks(rows):
        active = torch.from_numpy(data.labels(chunk)).float()
        total += float(class_weighted_bce(network(_normalized(data.x[chunk])), active, negative)) * len(chunk)
    return total / len(rows)


def _median_rms(data: LayerData) -> Tensor:
    return torch.cat([_rms(data.x[rows]) for rows in chunks(data.rows("train"))]).median()


def _rms(x: np.ndarray) -> Tensor:
    """Root mean square of each token, float32 [tokens, 1]; not 0."""
    return torch.from_numpy(x).float().square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6)


def _normalized(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).float() / _rms(x)
