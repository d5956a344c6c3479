"""The training loop: one process or many, with the same losses for the same global batch, and resumable.

A plain loop on accelerate. Every process draws the same global batch and takes its rows of it; terms of the
loss are sums over tokens, divided by what was counted over all processes, so that how a batch is cut changes
nothing. `accelerate launch` or `torchrun` start it on many GPUs; FSDP2 comes from accelerate's own config.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from hotcold.errors import HotcoldError
from hotcold.progress import Progress
from hotcold.sparsify.config import Config, Learning, Loss
from hotcold.sparsify.training.data import Batch, Mixture
from hotcold.sparsify.training.losses import l1_divisor
from hotcold.sparsify.training.objective import TERMS, Sums
from hotcold.sparsify.training.schedule import TargetSparsity, cosine, wsd
from hotcold.sparsify.training.state import Saved, WorkFolder, flat_optimizer, nested_optimizer

__all__ = ["DivergedError", "Phase", "Trainer", "learning_rate"]


# The main process gets whole tensors, however they are spread; frozen ones come from the dense model.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


class DivergedError(HotcoldError):
    """The loss became NaN or infinite. The weights are those of the previous step."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the training with an optimizer of its own.

    `l1` gives λ at a step. `before` is called with each step's number before it. At `milestones`, step to
    name, the trained parameters are kept under that name.
    """

    name: str
    steps: int
    lr: Callable[[int], float]
    loss: Loss
    l1: Callable[[int], float]
    before: Callable[[int], None] = lambda _: None
    milestones: Mapping[int, str] = field(default_factory=dict)


def learning_rate(learning: Learning, steps: int) -> Callable[[int], float]:
    """The learning rate at each step."""

    def at(step: int) -> float:
        if learning.schedule == "wsd":
            return learning.lr * wsd(step, steps, learning.warmup, learning.floor, learning.decay_share)
        return learning.lr * cosine(step, steps, learning.warmup, learning.floor)

    return at


class Trainer:
    """Runs phases on one stream of data and saves what it takes to go on."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        data: Mixture,
        work: WorkFolder,
        record: Callable[[dict[str, Any]], None],
        d_ff: int,
    ) -> None:
        self.accelerator, self.config, self.data, self.work = accelerator, config, data, work
        self._record, self._d_ff = record, d_ff
        self.saved: Saved | None = work.last()

    def run(self, phase: Phase, objective: nn.Module) -> None:
        """Train the parameters of `objective` that want gradients, from where the last run stopped.

        Raises DivergedError when the loss is not finite.
        """
        learning = self.config.learning
        parameters = [p for p in objective.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=learning.lr, betas=learning.betas, weight_decay=learning.weight_decay, fused=True
        )
        model, wrapped = self.accelerator.prepare(objective, optimizer)
        begin = self._resume(phase, model, wrapped.optimizer)
        tokens = self.config.step_tokens
        progress = Progress(phase.name, phase.steps * tokens, "tok", start=begin * tokens)
        with progress if self.accelerator.is_main_process else nullcontext():
            for step in range(begin + 1, phase.steps + 1):
                phase.before(step)
                record = self._step(phase, step, model, wrapped)
                if self.accelerator.is_main_process:
                    self._record(record)
                    progress.advance(tokens, loss=record["loss"], sparsity=record["sparsity"])
                if self._is_due(phase, step):
                    self._save(phase, step, model, wrapped.optimizer)
        self.accelerator.free_memory()
        self.saved = None  # what comes next goes on from the weights in memory

    def _is_due(self, phase: Phase, step: int) -> bool:
        return step % self.config.checkpoints.every == 0 or step == phase.steps or step in phase.milestones

    def _step(self, phase: Phase, step: int, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """One optimizer step on one global batch; returns its record."""
        start = time.monotonic()
        factor, lr = phase.l1(step), phase.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = self.data.batch(self.config.batch)
        tokens, pairs = batch.counts.tolist()
        factors = self._factors(phase.loss, factor, tokens, pairs)
        terms, zeros = self._accumulate(model, batch, factors, with_l1=factor > 0)
        terms, zeros = self.accelerator.reduce((terms, zeros), reduction="sum")
        sparsity = (zeros.double() / (tokens * self._d_ff)).tolist()
        loss = float(terms @ factors.to(terms.dtype))
        norm = float(
            cast("Tensor", self.accelerator.clip_grad_norm_(model.parameters(), self.config.learning.clip))
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop(phase, step, loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = sum(sparsity) / len(sparsity)
        if isinstance(phase.l1, TargetSparsity):
            phase.l1.observe(step, mean)
        means = terms.cpu() * self._factors(Loss(1, 1, 1), 1.0, tokens, pairs)
        seconds = time.monotonic() - start
        return {
            "phase": phase.name, "step": step, "loss": loss, **dict(zip(TERMS, means.tolist(), strict=True)),
            "lambda": factor, "lr": lr, "gradient": norm, "sparsity": mean,
            "sparsity_per_layer": [round(share, 4) for share in sparsity],
            "tokens": int(tokens), "tokens_per_second": round(tokens / seconds, 1),
        }  # fmt: skip

    def _accumulate(
        self, model: nn.Module, batch: Batch, factors: Tensor, *, with_l1: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients of this process's rows; returns its sums of terms and its zeros."""
        device, world = self.accelerator.device, self.accelerator.num_processes
        mine = batch.rows(slice(self.accelerator.process_index, None, world)).to(device)
        # Gradients are averaged over processes, so that a sum takes as many as there are.
        factors = (factors * world).to(device, torch.float32)
        terms, zeros = torch.zeros(len(TERMS), device=device), torch.zeros((), device=device)
        size = self.config.micro_batch
        starts = range(0, len(mine), size)
        for start in starts:
            part = mine.rows(slice(start, start + size))
            last = start == starts[-1]
            with nullcontext() if last else self.accelerator.no_sync(model):
                sums: Sums = model(part.ids, part.mask, with_l1)
                self.accelerator.backward(sums.terms @ factors)
            terms, zeros = terms + sums.terms.detach(), zeros + sums.zeros
        return terms, zeros

    def _factors(self, loss: Loss, factor: float, tokens: float, pairs: float) -> Tensor:
        """What the sums of the terms are multiplied by to give the loss, in the order of `TERMS`."""
        divisor = l1_divisor(self.config.l1.reduction, tokens, self._d_ff)
        return torch.tensor([loss.lm / max(pairs, 1), loss.kl / tokens, loss.ffn / tokens, factor / divisor])

    def _stop(self, phase: Phase, step: int, loss: float) -> None:
        last = self.work.last()
        good = f"the last good state is {last.path}" if last else "there is no state yet"
        raise DivergedError(
            f"the loss is not finite at step {step}", where=phase.name, got=loss,
            fix=f"{good}; lower learning.lr or the L1 factor, and start a new run",
        )  # fmt: skip

    def is_done(self, phase: Phase) -> bool:
        """Whether an earlier run has finished this phase."""
        if self.saved is None:
            return False
        order = self.work.phases.index
        return (order(self.saved.phase), self.saved.step) >= (order(phase.name), phase.steps)

    def _resume(self, phase: Phase, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the state that an earlier run left in `phase`, if any; returns the steps done."""
        saved = self.saved
        if saved is None:
            return 0
        _load(saved, model, optimizer if saved.phase == phase.name else None)
        self.data.restore(saved.extra["data"])
        if saved.phase != phase.name:
            return 0
        if isinstance(phase.l1, TargetSparsity):
            phase.l1.factor = saved.extra["l1"]
        return saved.step

    def _save(self, phase: Phase, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        weights, moments = get_state_dict(model, optimizer, options=_WHOLE)
        if self.accelerator.is_main_process:
            factor = phase.l1.factor if isinstance(phase.l1, TargetSparsity) else None
            extra = {"data": self.data.state(), "l1": factor}
            trained = cast("dict[str, Tensor]", weights)
            if step in phase.milestones:
                self.work.keep_stage(phase.milestones[step], trained)
            self.work.save(phase.name, step, trained, flat_optimizer(moments), extra)
        self.accelerator.wait_for_everyone()


def _load(saved: Saved, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Put the weights of a state into `model`, and its optimizer's state into `optimizer`."""
    trained, moments = saved.tensors()
    weights: dict[str, Any] = dict(trained)
    options = StateDictOptions(full_state_dict=True, strict=False)
    if optimizer is None:
        set_model_state_dict(model, weights, options=options)
        return
    state = nested_optimizer(moments, optimizer.param_groups)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
