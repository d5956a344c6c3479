"""The terms of the training loss: L1 on the intermediate output, KL from the dense model, relative error.

Kept apart from the training loops so that each can be checked against its definition.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hotcold.errors import InputError
from hotcold.sparsify.recipe import REDUCTIONS, Reduction

__all__ = ["kl_from_hidden", "l1_norm", "relative_error"]

_CHUNK = 256  # tokens whose logits exist at a time


def l1_norm(intermediate: Tensor, reduction: Reduction = "mean") -> Tensor:
    """‖act(gate)·up‖₁ of one layer, `intermediate` [..., d_ff], as a scalar.

    ProSparse (arXiv 2402.13516, eq. 2) writes ‖·‖₁ and does not say over what it is averaged; its published
    factors (up to 0.2) fit a language model's loss only as `mean` over tokens and d_ff. `token_sum` sums over
    d_ff and averages over tokens; `sum` sums over both. Raises InputError for another reduction.
    """
    magnitude = intermediate.abs()
    if reduction == "mean":
        return magnitude.mean(dtype=torch.float32)
    if reduction == "token_sum":
        return magnitude.sum(dim=-1, dtype=torch.float32).mean()
    if reduction == "sum":
        return magnitude.sum(dtype=torch.float32)
    raise InputError("unknown reduction of the L1 term", got=reduction, expected=" | ".join(REDUCTIONS))


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """‖output - target‖² over the variance of `target` about its mean over tokens; both [..., d_model].

    Massive activations, equal at each token, would else hide the error in all that varies.
    """
    target = target.float()
    mean = target.flatten(0, -2).mean(0)
    spread = (target - mean).square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (output.float() - target).square().mean() / spread


def kl_from_hidden(student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student) of the next-token distributions.

    `student` and `teacher` are last hidden states [tokens, d_model] after the final norm, the heads
    [n_vocab, d_model]. Logits exist for 256 tokens at a time, and the gradient (of `student` alone: heads
    are frozen) is computed on the way, so that no [tokens, n_vocab] is ever kept.
    """
    return _KLFromHidden.apply(student, teacher, student_head, teacher_head)


class _KLFromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, student_head, teacher_head):  # noqa: ANN001, ANN205
        total, gradient = torch.zeros((), dtype=torch.float32), torch.empty_like(student)
        for start in range(0, len(student), _CHUNK):
            part = slice(start, start + _CHUNK)
            log_q = functional.log_softmax(
                (student[part].to(student_head.dtype) @ student_head.T).float(), -1
            )
            log_p = functional.log_softmax(
                (teacher[part].to(teacher_head.dtype) @ teacher_head.T).float(), -1
            )
            p = log_p.exp()
            total += torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
            # d KL / d logits = q - p
            slope = log_q.exp_().sub_(p).to(student_head.dtype)
            gradient[part] = (slope @ student_head).to(student.dtype)
        ctx.save_for_backward(gradient.div_(len(student)))
        return total / len(student)

    @staticmethod
    def backward(ctx, upstream):  # noqa: ANN001, ANN205
        return ctx.saved_tensors[0] * upstream, None, None, None
