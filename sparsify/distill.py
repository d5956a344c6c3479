"""Phase two: the whole ReLU model learns the dense model's next-token distributions, ever more sparsely.

loss = KL(dense ‖ sparse) + λ(step) · Σ over layers of ‖act(gate)·up‖₁, with λ on ProSparse's sine stages.
FFNs and norms are trained, attention and embeddings stay. In the last part of the run weights are rounded as
Q4_0 rounds them, so that what is trained is what will be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hotcold.checkpoint import ffn_layers
from hotcold.progress import Progress
from hotcold.sparsify.activations import recorded_intermediates
from hotcold.sparsify.data import Windows
from hotcold.sparsify.evaluate import zero_share
from hotcold.sparsify.losses import kl_from_hidden, l1_norm
from hotcold.sparsify.quantise import bake, quantise_while_training
from hotcold.sparsify.recipe import Recipe
from hotcold.sparsify.schedule import cosine

__all__ = ["distill"]

Log = Callable[[dict[str, float | int | str]], None]

_CLIP = 1.0  # gradient norm


def distill(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Windows, recipe: Recipe, log: Log
) -> None:
    """Train `student` in place against `teacher`, both HF causal models of the same vocabulary.

    `log` gets one record per step with every term of the loss, λ, the learning rate and the sparsity.
    """
    parameters = list(_trained(student))
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    factor, steps = recipe.l1_schedule(), recipe.distill_steps
    with (
        recorded_intermediates(student) as seen,
        Progress("distil", steps * recipe.step_tokens, "tok") as progress,
    ):
        for step in range(1, steps + 1):
            if step == int(recipe.quantise_from * steps) + 1:
                quantise_while_training(student)
            lr = recipe.distill_lr * cosine(step, steps, recipe.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            kl = _divergence(student, teacher, windows.batch(recipe.batch))
            l1 = torch.stack([l1_norm(intermediate, recipe.l1_reduction) for intermediate in seen]).sum()
            loss = kl + factor(step) * l1
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, _CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            record = {"kl": kl.item(), "l1": l1.item(), "loss": loss.item(), "sparsity": _sparsity(seen)}
            log(
                {"phase": "distill", "step": step, "lr": lr, "lambda": factor(step), "gradient": norm.item()}
                | record
            )
            progress.advance(recipe.step_tokens, kl=record["kl"], sparsity=record["sparsity"])
    bake(student)


def _trained(model: PreTrainedModel) -> Iterable[nn.Parameter]:
    for layer in ffn_layers(model):
        yield from layer.mlp.parameters()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            yield parameter


def _divergence(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean KL of the next-token distributions on `ids` [batch, tokens]."""
    with torch.no_grad():
        target = teacher.model(ids, use_cache=False).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = student.model(ids, use_cache=False).last_hidden_state
    # The student's head is only read here, in the teacher's precision: it is not trained.
    head = student.lm_head.weight.detach().to(target.dtype)
    return kl_from_hidden(output.flatten(0, 1), target.flatten(0, 1), head, teacher.lm_head.weight)


def _sparsity(intermediates: Iterable[Tensor]) -> float:
    """Mean over layers of the share of exact zeros."""
    return float(torch.stack([zero_share(intermediate) for intermediate in intermediates]).mean())
