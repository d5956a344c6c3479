"""The terms of the training loss, each as a sum over tokens with its divisor kept apart.

Sums add up over micro-batches and processes, means do not: what is divided by is counted over the whole
batch. Kept apart from the training loops so that each term can be checked against its definition.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hotcold.errors import InputError
from hotcold.sparsify.config import REDUCTIONS, Reduction

__all__ = ["cross_entropy_from_hidden", "kl_from_hidden", "l1_divisor", "l1_sum", "squared_error"]

_CHUNK = 256  # tokens whose logits exist at a time


def l1_sum(intermediate: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of |act(gate)·up| of one layer, [rows, tokens, d_ff], where `mask` [rows, tokens] is set."""
    if mask is not None:
        intermediate = intermediate[mask]
    return intermediate.abs().sum(dtype=torch.float32)


def l1_divisor(reduction: Reduction, tokens: float, d_ff: int) -> float:
    """What a layer's `l1_sum` over `tokens` is divided by.

    ProSparse (arXiv 2402.13516, eq. 2) writes ‖·‖₁ and does not say over what it is averaged; its published
    factors (up to 0.2) fit a language model's loss only as `mean` over tokens and d_ff, which is therefore
    the default: an inference. `token_sum` sums over d_ff and averages over tokens; `sum` sums over both.
    Raises InputError for another reduction.
    """
    divisors = {"mean": tokens * d_ff, "token_sum": tokens, "sum": 1.0}
    if reduction not in divisors:
        raise InputError("unknown reduction of the L1 term", got=reduction, expected=" | ".join(REDUCTIONS))
    return divisors[reduction]


def squared_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over tokens of the mean over d_model of (output - target)², both [rows, tokens, d_model]."""
    if mask is not None:
        output, target = output[mask], target[mask]
    return (output.float() - target.float()).square().sum() / output.shape[-1]


def cross_entropy_from_hidden(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log p(target) for `hidden` [tokens, d_model], `head` [n_vocab, d_model].

    Logits exist for 256 tokens at a time, and again in the backward pass.
    """

    def part(states: Tensor, ids: Tensor) -> Tensor:
        logits = states.to(head.dtype) @ head.T
        return functional.cross_entropy(logits.float(), ids, reduction="sum")

    chunks = zip(hidden.split(_CHUNK), targets.split(_CHUNK), strict=True)
    return torch.stack([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def kl_from_hidden(student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher ‖ student) of the next-token distributions.

    `student` and `teacher` are last hidden states [tokens, d_model] after the final norm, the heads
    [n_vocab, d_model]. Logits exist for 256 tokens at a time, and the gradients of `student` and its head are
    computed on the way, so that no [tokens, n_vocab] is ever kept.
    """
    return _KLFromHidden.apply(student, teacher, student_head, teacher_head)


class _KLFromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, student_head, teacher_head):  # noqa: ANN001, ANN205
        total, gradient = student.new_zeros((), dtype=torch.float32), torch.empty_like(student)
        head_gradient = torch.zeros_like(student_head) if ctx.needs_input_grad[2] else None
        for start in range(0, len(student), _CHUNK):
            part = slice(start, start + _CHUNK)
            states = student[part].to(student_head.dtype)
            log_q = functional.log_softmax((states @ student_head.T).float(), -1)
            targets = teacher[part].to(teacher_head.dtype)
            log_p = functional.log_softmax((targets @ teacher_head.T).float(), -1)
            p = log_p.exp()
            total += torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
            # d KL / d logits = q - p
            slope = log_q.exp_().sub_(p).to(student_head.dtype)
            gradient[part] = (slope @ student_head).to(student.dtype)
            if head_gradient is not None:
                head_gradient += slope.T @ states
        ctx.save_for_backward(gradient, head_gradient)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs):  # noqa: ANN001, ANN002, ANN205
        (upstream,) = grad_outputs
        gradient, head_gradient = ctx.saved_tensors
        return (
            gradient * upstream, None, None if head_gradient is None else head_gradient * upstream, None,
        )  # fmt: skip
