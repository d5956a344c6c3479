"""The steps between the products on a GPU: the functions of step_reference.py, by Triton kernels.

Registered and launched as the operators of ops.py are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op
from triton import cdiv, next_power_of_2

from hotcold.runtime.triton import step_kernels as kernels
from hotcold.runtime.triton.firing import LayerRule
from hotcold.runtime.triton.launch import launch

__all__ = ["activate", "add_norm", "apply_rope", "attend", "leave_out", "norm"]

_SHARE = 256  # cache positions of one program, which holds their keys and values in registers
_BLOCK = 1024


@triton_op("hotcold::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    """See step_reference.norm."""
    normed = torch.empty_like(x)
    _launch_norm(x, None, weight, bias, None, normed, eps)
    return normed


@triton_op("hotcold::add_norm", mutates_args=())
def add_norm(
    x: Tensor, added: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See step_reference.add_norm."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(x, added, weight, bias, total, normed, eps)
    return total, normed


def _launch_norm(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    total: Tensor | None,
    normed: Tensor,
    eps: float,
) -> None:
    rows, width = x.shape
    block = next_power_of_2(width)
    launch(
        kernels.norm_kernel, (rows,), x, x if added is None else added, weight,
        weight if bias is None else bias, normed if total is None else total, normed, width, eps,
        ADD=added is not None, BIASED=bias is not None,
        BLOCK=block, num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip


@triton_op("hotcold::apply_rope", mutates_args=("keys", "values"))
def apply_rope(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """See step_reference.apply_rope."""
    turned = torch.empty_like(q)
    (tokens, n_heads, head_dim), n_kv_heads = q.shape, k.shape[1]
    half = head_dim // 2
    launch(
        kernels.apply_rope_kernel, (tokens, n_heads + 2 * n_kv_heads), q, k, v, cos, sin, positions, turned,
        keys, values, n_heads, n_kv_heads, keys.shape[1], half,
        BLOCK=next_power_of_2(half), num_warps=1,
    )  # fmt: skip
    return turned


@triton_op("hotcold::attend", mutates_args=())
def attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, seen: int, window: int) -> Tensor:
    """See step_reference.attend. Positions are shared out among programs, and what these find is blended."""
    tokens, n_heads, head_dim = q.shape
    splits, block = cdiv(seen, _SHARE), next_power_of_2(head_dim)
    out = q.new_empty(splits, tokens, n_heads * head_dim)
    logs = q.new_empty(splits, tokens, n_heads) if splits > 1 else out
    launch(
        kernels.attend_kernel, (n_heads, tokens, splits), q, keys, values, positions, out, logs,
        n_heads, n_heads // keys.shape[0], keys.shape[1], head_dim, window, head_dim**-0.5,
        SHARE=_SHARE, SPLIT=splits > 1, BLOCK=block, num_warps=min(max(block // 8, 4), 16),
    )  # fmt: skip
    if splits == 1:
        return out[0]
    blended = torch.empty_like(out[0])
    launch(
        kernels.blend_kernel, (tokens * n_heads,), out, logs, blended, splits, tokens * n_heads, head_dim,
        SPLITS=next_power_of_2(splits), BLOCK=block,
    )  # fmt: skip
    return blended


@triton_op("hotcold::activate", mutates_args=("fired",))
def _activate(
    gate: Tensor, up: Tensor | None, value: int, score: int, threshold: float, each: Tensor | None,
    clip: bool, fired: Tensor | None,
) -> Tensor:  # fmt: skip
    a, size = torch.empty_like(gate), gate.numel()
    launch(
        kernels.activate_kernel, (cdiv(size, _BLOCK),), gate, gate if up is None else up, a,
        a if fired is None else fired, size, gate.shape[-1], threshold, a if each is None else each,
        GATED=up is not None, VALUE=value, SCORE=score, OWN=each is not None, CLIP=clip,
        COUNTED=fired is not None, BLOCK=_BLOCK,
    )  # fmt: skip
    return a


def activate(gate: Tensor, up: Tensor | None, rule: LayerRule, fired: Tensor | None = None) -> Tensor:
    """See step_reference.activate."""
    ids = int(rule.value), int(rule.score)
    return _activate(gate, up, *ids, rule.threshold, rule.each, rule.clips_up, fired)


@triton_op("hotcold::leave_out", mutates_args=("kept",))
def leave_out(x: Tensor, least: Tensor, positions: Tensor, kept: Tensor | None = None) -> Tensor:
    """See step_reference.leave_out."""
    out, size = torch.empty_like(x), x.numel()
    launch(
        kernels.leave_out_kernel, (cdiv(size, _BLOCK),), x, least, positions, out if kept is None else kept,
        out, size, x.shape[1], COUNTED=kept is not None, BLOCK=_BLOCK,
    )  # fmt: skip
    return out
