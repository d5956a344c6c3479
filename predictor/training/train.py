"""Training the predictor of one layer on its traces.

The input is the residual stream, whose norm differs from token to token. Training divides it by its RMS,
which the model's own FFN norm does too, so that no token outweighs the others. The network that comes out
is fed the raw stream all the same: being homogeneous, it gives raw logits that are the normalized ones
times the token's RMS, of the same sign. `fc1` is finally divided by the median RMS, so that a typical
token's logits stay what the loss made them, log odds. The threshold is then chosen on raw logits, the ones
that it will be compared with.

Of the three parts of the tokens, `train` is fitted, `calibrate` chooses the epoch and the threshold, and the
metrics are those of `test`. Logits exist for some thousand tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hotcold.errors import InputError
from hotcold.predictor.bundle import LayerPredictor, raw_logits
from hotcold.predictor.training.metrics import measure
from hotcold.predictor.training.network import (
    PredictorNetwork,
    class_weighted_bce,
    class_weighted_bce_gradient,
    negative_weight,
)
from hotcold.predictor.training.thresholds import choose_threshold
from hotcold.text import PARTS, Part

__all__ = ["LayerData", "TrainOptions", "compute_dtype", "train_layer"]

_RANK_BLOCK = 32  # values in a quantized block: rows of fc2 must be whole blocks
_EVAL_TOKENS = 4096  # tokens whose logits are held at a time


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How every layer is trained. InputError for values that cannot be."""

    rank: int
    target_recall: float = 0.97
    epochs: int = 10
    batch: int = 512
    learning_rate: float = 1e-2
    weight_decay: float = 0.01
    patience: int = 3  # epochs without a better loss on calibrate
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.rank % _RANK_BLOCK:
            raise InputError(
                "a rank that cannot be quantized",
                where="--rank", got=self.rank, expected=f"a multiple of {_RANK_BLOCK}",
            )  # fmt: skip
        if not 0 < self.target_recall <= 1:
            raise InputError(
                "out of range", where="--target-recall", got=self.target_recall, expected="above 0, at most 1"
            )
        for name in ("epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise InputError("must be positive", where=f"--{name}", got=getattr(self, name))


@dataclass(frozen=True, slots=True)
class LayerData:
    """The traces of one layer, and which part each token is of."""

    x: np.ndarray  # float16 [tokens, d_model]
    active: np.ndarray  # uint8 [tokens, ceil(d_ff / 8)]
    part: np.ndarray  # uint8 [tokens], an index into `hotcold.text.PARTS`
    d_ff: int
    starts: np.ndarray | None = None  # bool [tokens]: see `choose_threshold`

    def __post_init__(self) -> None:
        for part in PARTS:
            if not self.rows(part).size:
                raise InputError(f"the traces hold no {part} tokens", fix="collect traces of more text")

    def rows(self, part: Part) -> np.ndarray:
        """The tokens of a part, ascending."""
        return np.flatnonzero(self.part == PARTS.index(part))

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """Which neurons fired, uint8 0 or 1 [rows, d_ff]."""
        return np.unpackbits(self.active[rows], axis=1, count=self.d_ff, bitorder="little")

    def firing_frequency(self) -> np.ndarray:
        """Share of training tokens on which each neuron fired, float32 [d_ff]."""
        counts, rows = np.zeros(self.d_ff), self.rows("train")
        for chunk in _chunks(rows):
            counts += self.labels(chunk).sum(axis=0)
        return (counts / len(rows)).astype(np.float32)


def train_layer(data: LayerData, options: TrainOptions, on_epoch: Callable[[float], None]) -> LayerPredictor:
    """Train, keep the weights of the best loss on calibrate, choose the threshold there, and measure on test.

    `on_epoch` is told the loss on calibrate after each epoch. The result depends on data, options, and
    torch's number of threads alone.
    """
    generator = torch.Generator().manual_seed(options.seed)
    network = PredictorNetwork(data.x.shape[1], data.d_ff, options.rank, generator)
    frequency = data.firing_frequency()
    negative = negative_weight(float(frequency.mean()), options.target_recall)
    _fit(network, data, options, negative, generator, on_epoch)
    fc1 = network.fc1.weight.detach() / _median_rms(data)
    return _calibrated(
        fc1.numpy(), network.fc2.weight.detach().numpy(), frequency, data, options.target_recall
    )


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
        for batch in _chunks(order, options.batch):
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
    dtype = compute_dtype()

    def step(x: Tensor, labels: np.ndarray, negative: float) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = network(x)
        active = torch.from_numpy(labels).to(logits.dtype)
        logits.backward(class_weighted_bce_gradient(logits.detach(), active, negative))
        optimizer.step()
        schedule.step()

    return step


def compute_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively, which halves the time; else float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


@torch.no_grad()
def _calibration_loss(network: PredictorNetwork, data: LayerData, negative: float) -> float:
    rows = data.rows("calibrate")
    total = 0.0
    for chunk in _chunks(rows):
        active = torch.from_numpy(data.labels(chunk)).float()
        total += float(class_weighted_bce(network(_normalized(data.x[chunk])), active, negative)) * len(chunk)
    return total / len(rows)


def _calibrated(
    fc1: np.ndarray, fc2: np.ndarray, frequency: np.ndarray, data: LayerData, target_recall: float
) -> LayerPredictor:
    """Choose the threshold on the raw logits of calibrate, and measure on those of test."""

    def chunks(part: Part) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows in _chunks(data.rows(part)):
            yield raw_logits(fc1, fc2, data.x[rows]), data.labels(rows).astype(bool)

    rows = data.rows("calibrate")
    starts = np.zeros(len(rows), bool) if data.starts is None else data.starts[rows]
    threshold = choose_threshold(lambda: chunks("calibrate"), starts, target_recall)
    return LayerPredictor(fc1, fc2, threshold, frequency, measure(chunks("test"), threshold))


def _median_rms(data: LayerData) -> Tensor:
    return torch.cat([_rms(data.x[rows]) for rows in _chunks(data.rows("train"))]).median()


def _rms(x: np.ndarray) -> Tensor:
    """Root mean square of each token, float32 [tokens, 1]; not 0."""
    return torch.from_numpy(x).float().square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6)


def _normalized(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).float() / _rms(x)


def _chunks(rows: np.ndarray, size: int | None = None) -> Iterator[np.ndarray]:
    size = size or _EVAL_TOKENS
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
