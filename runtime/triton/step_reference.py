"""What each step between the products computes, in plain torch; see reference.py for what this is for.

A cache holds float16 keys and values [n_kv_heads, n_ctx, head_dim] of one layer; `positions` is int64
[tokens], on the device; `fired` is an int64 tensor of one number, added to in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotcold.model.firing import Score, Value
from hotcold.runtime.triton.firing import LayerRule

__all__ = ["activate", "add_norm", "apply_rope", "attend", "fired_values", "leave_out", "norm"]


def norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    """RMSNorm of x float32 [rows, width] (arXiv 1910.07467), or with a bias LayerNorm (arXiv 1607.06450)."""
    if bias is not None:
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def add_norm(
    x: Tensor, added: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + added, and the norm of that."""
    total = x + added
    return total, norm(total, weight, eps, bias)


def apply_rope(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotary positions (arXiv 2104.09864): q turned, float32 [tokens, n_heads, head_dim].

    Pairs (i, i + head_dim/2) turn by `cos` and `sin` [n_ctx, head_dim/2]. Turned k, and v as it is, enter the
    cache; both are float32 [tokens, n_kv_heads, head_dim].
    """
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    keys.index_copy_(1, positions, _turned(k, cos, sin).transpose(0, 1).half())
    values.index_copy_(1, positions, v.transpose(0, 1).half())
    return _turned(q, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, seen: int, window: int) -> Tensor:
    """softmax(q·k / √head_dim)·v over the cache, float32 [tokens, n_heads · head_dim].

    q is float32 [tokens, n_heads, head_dim]. A token sees what is not after it, and not `window` or more
    positions before it unless that is 0. No position from `seen` on is looked at.
    """
    position = torch.arange(seen, device=q.device)
    hidden = position > positions[:, None]
    if window:
        hidden |= position <= positions[:, None] - window
    k, v = (part[:, :seen].float() for part in (keys, values))
    grouped = q.unflatten(1, (len(k), -1))  # [tokens, n_kv_heads, group, head_dim]
    scores = torch.einsum("tkgd,ksd->tkgs", grouped, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    return torch.einsum("tkgs,ksd->tkgd", scores.softmax(-1), v).flatten(1)


def fired_values(gate: Tensor, rule: LayerRule) -> tuple[Tensor, Tensor]:
    """What gates [tokens, n] become, and which of them fire."""
    limit, functional = rule.limit(), torch.nn.functional
    formulas = {
        Value.GATE: lambda: gate,
        Value.SQUARE: gate.square,
        Value.SHIFTED: lambda: gate - limit,
        Value.SILU: lambda: functional.silu(gate),
        Value.GELU: lambda: functional.gelu(gate),
    }
    value = formulas[Value(rule.value)]()
    if rule.score == Score.ALWAYS:
        return value, torch.ones_like(gate, dtype=torch.bool)
    return value, (value.abs() if rule.score == Score.MAGNITUDE else gate) >= limit


def activate(gate: Tensor, up: Tensor | None, rule: LayerRule, fired: Tensor | None = None) -> Tensor:
    """value · up where a gate fires, else 0; without `up` that is 1."""
    value, fires = fired_values(gate, rule)
    if up is not None:
        value = value * (up.relu() if rule.clips_up else up)
    a = torch.where(fires, value, 0.0)
    if fired is not None:
        fired += (a != 0).sum()
    return a


def leave_out(x: Tensor, least: Tensor, positions: Tensor, kept: Tensor | None = None) -> Tensor:
    """x [tokens, width] with 0 for inputs smaller than `least` [width], of all tokens but that at position 0.

    How many are not zero is added to `kept`, int64 [].
    """
    x = torch.where((x.abs() >= least) | (positions[:, None] == 0), x, 0.0)
    if kept is not None:
        kept += x.count_nonzero()
    return x
