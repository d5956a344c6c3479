"""Phase one: each FFN learns, on its own, to give with ReLU what the dense FFN gives on the same inputs.

One forward pass of the dense model feeds all layers at once, and no gradient crosses a layer, so a token
costs about half of what it costs end to end. This alone does not make a good model (errors add up over
layers), but a good place to start from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hotcold.checkpoint import ffn_layers
from hotcold.progress import Progress
from hotcold.sparsify.data import Windows
from hotcold.sparsify.losses import relative_error
from hotcold.sparsify.recipe import Recipe
from hotcold.sparsify.schedule import cosine

__all__ = ["fit_layers"]

Log = Callable[[dict[str, float | int | str]], None]


@contextmanager
def _captured(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield a list that each forward pass fills with each FFN's (input, output) [batch, tokens, d_model]."""
    layers = ffn_layers(model)
    seen: list[tuple[Tensor, Tensor]] = [None] * len(layers)  # type: ignore[list-item]

    def hook(index: int):  # noqa: ANN202
        def capture(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[index] = (inputs[0], output)

        return capture

    handles = [layer.mlp.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def fit_layers(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Windows, recipe: Recipe, log: Log
) -> None:
    """Train gate, up and down of every layer of `student` against `teacher`'s FFN outputs, in place.

    `log` gets one record per step: the mean and the largest relative error over layers.
    """
    blocks = [layer.mlp for layer in ffn_layers(student)]
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    steps = recipe.layerwise_steps
    with _captured(teacher) as seen, Progress("layer-wise", steps * recipe.step_tokens, "tok") as progress:
        for step in range(1, steps + 1):
            with torch.no_grad():
                teacher.model(windows.batch(recipe.batch), use_cache=False)
            for group in optimizer.param_groups:
                group["lr"] = recipe.layerwise_lr * cosine(step, steps, recipe.warmup_steps // 2)
            errors = [_accumulate(block, *pair) for block, pair in zip(blocks, seen, strict=True)]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mean = sum(errors) / len(errors)
            log({"phase": "layerwise", "step": step, "error": mean, "error_max": max(errors)})
            progress.advance(recipe.step_tokens, error=mean)


def _accumulate(block: nn.Module, x: Tensor, target: Tensor) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(x)
    loss = relative_error(output, target)
    loss.backward()
    return loss.item()
