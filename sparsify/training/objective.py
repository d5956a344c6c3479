"""What is minimized, as modules whose forward pass gives the sum of each term of the loss over a batch.

They are modules so that DDP and FSDP can wrap them: all that touches a trained weight happens inside.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hotcold.model.checkpoint import ffn_layers
from hotcold.model.hooks import on_ffns, on_intermediates
from hotcold.sparsify.config import Loss
from hotcold.sparsify.training.losses import (
    cross_entropy_from_hidden,
    kl_from_hidden,
    l1_sum,
    squared_error,
)

__all__ = ["TERMS", "EndToEnd", "LayerWise", "Sums", "output_spread"]

TERMS = ("lm", "kl", "ffn", "l1")
_Teacher = TypeVar("_Teacher", PreTrainedModel, PreTrainedModel | None)


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over the tokens of a batch: `terms` float32 [4] in the order of `TERMS`, with gradient, and how
    many entries of act(gate)·up are zero, `zeros` [n_layers]."""

    terms: Tensor
    zeros: Tensor


class _Objective(nn.Module, Generic[_Teacher]):
    """The model that learns and the frozen one that it learns from, which is no part of the module."""

    def __init__(self, student: PreTrainedModel, teacher: _Teacher, *, bf16: bool) -> None:
        super().__init__()
        self.student = student
        self._frozen, self._bf16 = (teacher,), bf16

    @property
    def teacher(self) -> _Teacher:
        return self._frozen[0]

    def _autocast(self, ids: Tensor) -> torch.autocast:
        return torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self._bf16)


@dataclass(slots=True)
class _Pass:
    """What one forward pass collects, by layer. `where` is None if there is no padding."""

    where: Tensor | None
    with_l1: bool
    wanted: list[Tensor]
    l1: list[Tensor]
    zeros: list[Tensor]
    errors: list[Tensor]


class EndToEnd(_Objective[PreTrainedModel | None]):
    """The whole model: language modeling, KL from the dense model, output errors of FFNs, L1.

    `spread` [n_layers] is what an FFN's error is divided by, see `output_spread`. Terms of `loss` whose
    factor is 0 are not computed. `close` takes its hooks off the model.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        loss: Loss,
        spread: Tensor | None = None,
        *,
        bf16: bool = True,
    ) -> None:
        super().__init__(student, teacher, bf16=bf16)
        self._loss, self._layers = loss, len(ffn_layers(student))
        self._spread = torch.ones(self._layers) if spread is None else spread
        self._pass: _Pass | None = None
        # They stay until `close`: activation checkpointing computes layers again in the backward pass, and
        # must then find what it found before.
        self._hooks = ExitStack()
        self._hooks.enter_context(on_intermediates(student, self._see_intermediate))
        self._hooks.enter_context(on_ffns(student, self._see_output))

    def close(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()

    def forward(self, ids: Tensor, mask: Tensor, with_l1: bool) -> Sums:
        """`ids` and `mask` [rows, tokens]; without `with_l1` the L1 term has no gradient."""
        where = None if bool(mask.all()) else mask
        goal, wanted = self._teacher_pass(ids)
        nothing = torch.zeros(self._layers, device=ids.device)
        seen = _Pass(where, with_l1, wanted, *(list(nothing) for _ in range(3)))
        self._pass = seen
        with self._autocast(ids):
            hidden = self.student.model(ids, use_cache=False).last_hidden_state
        outputs = self._output_terms(hidden, goal, ids, mask)
        terms = [*outputs, torch.stack(seen.errors).mean(), torch.stack(seen.l1).sum()]
        return Sums(torch.stack(terms), torch.stack(seen.zeros))

    def _see_intermediate(self, layer: int, x: Tensor) -> None:
        if (seen := self._pass) is not None:
            with nullcontext() if seen.with_l1 else torch.no_grad():
                seen.l1[layer] = l1_sum(x, seen.where)
            seen.zeros[layer] = _zeros(x, seen.where)

    def _see_output(self, layer: int, _: Tensor, output: Tensor) -> None:
        if (seen := self._pass) is not None and seen.wanted:
            error = squared_error(output, seen.wanted[layer], seen.where)
            seen.errors[layer] = error / self._spread[layer]

    @torch.no_grad()
    def _teacher_pass(self, ids: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """The dense model's last hidden state and, if they are wanted, the outputs of its FFNs."""
        if self.teacher is None or not (self._loss.kl or self._loss.ffn):
            return None, []
        outputs: list[Tensor] = [ids] * self._layers if self._loss.ffn else []

        def keep(layer: int, _: Tensor, output: Tensor) -> None:
            outputs[layer] = output

        with on_ffns(self.teacher, keep) if self._loss.ffn else nullcontext():
            return self.teacher.model(ids, use_cache=False).last_hidden_state, outputs

    def _output_terms(self, hidden: Tensor, goal: Tensor | None, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Language modeling and KL."""
        head = self.student.lm_head.weight
        head = head.to(torch.bfloat16) if self._bf16 else head
        lm = kl = hidden.new_zeros((), dtype=torch.float32)
        if self._loss.lm:
            pairs = mask[:, 1:] & mask[:, :-1]
            lm = cross_entropy_from_hidden(hidden[:, :-1][pairs], head, ids[:, 1:][pairs])
        if self._loss.kl and goal is not None and self.teacher is not None:
            kl = kl_from_hidden(hidden[mask], goal[mask], head, self.teacher.lm_head.weight)
        return [lm, kl]


class LayerWise(_Objective[PreTrainedModel]):
    """Each FFN alone: given the dense FFN's input, give its output. No gradient crosses a layer.

    One forward pass of the dense model feeds all layers, so that a token costs about half of what it costs
    end to end. It makes no good model yet, as errors add up over layers, but a good place to start from.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, spread: Tensor, *, bf16: bool = True
    ) -> None:
        super().__init__(student, teacher, bf16=bf16)
        self._spread = spread

    def forward(self, ids: Tensor, mask: Tensor, with_l1: bool) -> Sums:
        """As `EndToEnd.forward`, with the `ffn` term alone."""
        where = None if bool(mask.all()) else mask
        seen: list[tuple[Tensor, Tensor]] = []
        zeros = [ids.new_zeros(())] * len(self._spread)

        def count(layer: int, x: Tensor) -> None:
            zeros[layer] = _zeros(x, where)

        with torch.no_grad(), on_ffns(self.teacher, lambda _, x, y: seen.append((x, y))):
            self.teacher.model(ids, use_cache=False)
        with self._autocast(ids), on_intermediates(self.student, count):
            errors = [
                squared_error(layer.mlp(x), y, where)
                for layer, (x, y) in zip(ffn_layers(self.student), seen, strict=True)
            ]
        error = (torch.stack(errors) / self._spread).mean()
        nothing = torch.zeros_like(error)
        return Sums(torch.stack([nothing, nothing, error, nothing]), torch.stack(zeros))


def _zeros(intermediate: Tensor, where: Tensor | None) -> Tensor:
    """How many entries are zero, padding aside."""
    seen = intermediate.detach() if where is None else intermediate.detach()[where]
    return seen.numel() - seen.count_nonzero()


@torch.no_grad()
def output_spread(teacher: PreTrainedModel, ids: Tensor) -> Tensor:
    """Per layer the variance of the dense FFN's outputs about their mean over tokens; `ids` [rows, tokens].

    Errors are measured in units of it. Massive activations, equal at each token, would else hide all that
    varies, and so they do not count here.
    """
    variances: list[Tensor] = []

    def keep(_layer: int, _: Tensor, output: Tensor) -> None:
        output = output.float().flatten(0, -2)
        variances.append((output - output.mean(0)).square().mean())

    with on_ffns(teacher, keep):
        teacher.model(ids, use_cache=False)
    return torch.stack(variances).clamp_min(torch.finfo(torch.float32).tiny)
