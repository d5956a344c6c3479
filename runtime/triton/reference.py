"""What each operator computes, in plain torch. The kernels are tested against these functions, and engines on
a device without Triton run them.

Which neurons fire for a token, by their gates, is a `LayerRule`'s to say, by default that of ReLU. `x` is
float32 [tokens, width]; an active list is `index` int32 [n], of which the first `count` (int32 [1], on the
device) hold neurons in ascending order and the rest is undefined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotcold.runtime.triton.firing import PLAIN_RELU, LayerRule
from hotcold.runtime.triton.rows import Rows
from hotcold.runtime.triton.step_reference import (
    activate,
    add_norm,
    apply_rope,
    attend,
    fired_values,
    leave_out,
    norm,
)

__all__ = [
    "activate",
    "add_norm",
    "apply_rope",
    "attend",
    "dot_rows",
    "down_listed",
    "ffn_exact",
    "ffn_listed",
    "fired_values",
    "leave_out",
    "norm",
    "predict",
    "s2",
    "s3",
    "select",
    "select_fired",
]


def dot_rows(x: Tensor, w: Rows, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """x · wᵀ + bias, float32 [tokens, w.n], rectified on request; `bias` is float32 [w.n]."""
    y = torch.nn.functional.linear(x, w.dequantize(), bias)
    return y.relu() if relu else y


def s2(scores: Tensor, x: Tensor, up: Rows, rule: LayerRule = PLAIN_RELU) -> Tensor:
    """act(scores) ⊙ (x · upᵀ), float32 [tokens, n]: ProSparse's operator S2 (section 4.3 of the paper).

    Rows of neurons that fire for no token are never read.
    """
    a = torch.zeros_like(scores)
    live = fired_values(scores, rule)[1].any(0).nonzero()[:, 0]
    a[:, live] = activate(scores[:, live], dot_rows(x, up.take(live)), rule.take(live))
    return a


def s3(a: Tensor, down: Rows) -> Tensor:
    """a · down over the rows of neurons with a ≠ 0, float32 [tokens, width]: ProSparse's operator S3.

    `down` is the transposed down matrix: one row per neuron.
    """
    live = (a != 0).any(0).nonzero()[:, 0]
    return a[:, live] @ down.take(live).dequantize()


def select(
    scores: Tensor, threshold: float, always: Tensor | None = None, counter: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """List neurons whose score reaches `threshold` for any token, or that `always` (bool [n]) names.

    How many there are is added to `counter`, an int64 tensor of one number.
    """
    wanted = (scores >= threshold).any(0)
    if always is not None:
        wanted = wanted | always
    neurons = wanted.nonzero()[:, 0].int()
    index = neurons.new_full((scores.shape[1],), -1)
    index[: len(neurons)] = neurons
    if counter is not None:
        counter += len(neurons)
    return index, torch.tensor([len(neurons)], dtype=torch.int32, device=scores.device)


def select_fired(gates: Tensor, rule: LayerRule) -> tuple[Tensor, Tensor]:
    """List neurons whose gate fires for any token."""
    return select(fired_values(gates, rule)[1].float(), 1.0)


def predict(
    x: Tensor,
    fc1: Rows,
    fc2: Rows,
    threshold: float,
    always: Tensor | None = None,
    counter: Tensor | None = None,
    relu: bool = True,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The list of neurons with fc2 · act(fc1 · x) + bias >= threshold; act is nothing without `relu`."""
    return select(dot_rows(dot_rows(x, fc1, relu=relu), fc2, bias), threshold, always, counter)


def ffn_listed(
    x: Tensor,
    gate: Rows | Tensor,
    up: Rows | None,
    index: Tensor,
    count: Tensor,
    rule: LayerRule = PLAIN_RELU,
    fired: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """act(gate) · up of the listed neurons, float32 [tokens, n] by position in the list; zero after `count`.

    `gate` are the gate rows, whose scores get `bias` [n] added if given, or scores [tokens, n] that are known
    already. Without `up`, which takes gate rows, a value is act(gate). The up row of a neuron that fires for
    no token is not read. How many values are not zero is added to `fired`, an int64 tensor of one number.
    """
    live = index[: int(count)].long()
    if isinstance(gate, Tensor):
        scores = gate[:, live]
    else:
        scores = dot_rows(x, gate.take(live), None if bias is None else bias[live])
    a = x.new_zeros(len(x), len(index))
    if up is None:
        a[:, : len(live)] = activate(scores, None, rule.take(live))
    else:
        a[:, : len(live)] = s2(scores, x, up.take(live), rule.take(live))
    if fired is not None:
        fired += (a != 0).sum()
    return a


def down_listed(a: Tensor, down: Rows, index: Tensor, count: Tensor) -> Tensor:
    """Σ a[:, i] · down[index[i]] over the list, float32 [tokens, width]."""
    n = int(count)
    return s3(a[:, :n], down.take(index[:n].long()))


def ffn_exact(
    x: Tensor, gate: Rows, up: Rows, down: Rows, rule: LayerRule = PLAIN_RELU
) -> tuple[Tensor, Tensor]:
    """A whole FFN: all gates, then only rows that fired; y [tokens, width], how many fired int32 [1]."""
    scores = dot_rows(x, gate)
    index, count = select_fired(scores, rule)
    return down_listed(ffn_listed(x, scores, up, index, count, rule), down, index, count), count
