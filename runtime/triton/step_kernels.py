"""Triton kernels of what stands between the products of a layer: norms, rotary positions, attention, gating.

Each is one launch where plain torch takes five to ten. At two microseconds a launch, and 32 layers a token,
these would otherwise take as long as reading the weights. steps.py launches them.
"""

# Triton's language, not Python's: a checker cannot know what these mean.
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from hotcold.runtime.triton.early import let_next_start, wait_for_last
from hotcold.runtime.triton.tiles import fired_values, limits

__all__ = [
    "activate_kernel",
    "apply_rope_kernel",
    "attend_kernel",
    "blend_kernel",
    "leave_out_kernel",
    "norm_kernel",
]


@triton.jit
def norm_kernel(
    x,
    added,
    weight,
    bias,
    total,
    normed,
    width,
    eps,
    ADD: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """normed = RMSNorm(x + added), with a bias LayerNorm, a row per program; the sum itself goes to total."""
    let_next_start(EARLY)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    factor = tl.load(weight + cols, mask=inside, other=0.0)
    if BIASED:
        shift = tl.load(bias + cols, mask=inside, other=0.0)
    wait_for_last(EARLY)
    at = tl.program_id(0) * width + cols
    row = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        row += tl.load(added + at, mask=inside, other=0.0)
        tl.store(total + at, row, mask=inside)
    if BIASED:
        row = tl.where(inside, row - tl.sum(row, 0) / width, 0.0)
    found = row * (1 / tl.sqrt(tl.sum(row * row, 0) / width + eps)) * factor
    if BIASED:
        found += shift
    tl.store(normed + at, found, mask=inside)


@triton.jit
def apply_rope_kernel(
    q,
    k,
    v,
    cos,
    sin,
    positions,
    turned,
    keys,
    values,
    n_heads,
    n_kv_heads,
    n_ctx,
    half,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (token, head) turns a head of q, or turns one of k into the cache, or copies one of v there."""
    let_next_start(EARLY)
    wait_for_last(EARLY)
    token, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token)
    cols = tl.arange(0, BLOCK)
    inside = cols < half
    cosine = tl.load(cos + position * half + cols, mask=inside, other=0.0)
    sine = tl.load(sin + position * half + cols, mask=inside, other=0.0)
    if head < n_heads:
        at = (token * n_heads + head) * 2 * half + cols
        first = tl.load(q + at, mask=inside, other=0.0)
        second = tl.load(q + at + half, mask=inside, other=0.0)
        tl.store(turned + at, first * cosine - second * sine, mask=inside)
        tl.store(turned + at + half, first * sine + second * cosine, mask=inside)
    else:
        kv_head = (head - n_heads) % n_kv_heads
        at = (token * n_kv_heads + kv_head) * 2 * half + cols
        to = (kv_head * n_ctx + position) * 2 * half + cols
        if head < n_heads + n_kv_heads:
            first = tl.load(k + at, mask=inside, other=0.0)
            second = tl.load(k + at + half, mask=inside, other=0.0)
            tl.store(keys + to, (first * cosine - second * sine).to(tl.float16), mask=inside)
            tl.store(keys + to + half, (first * sine + second * cosine).to(tl.float16), mask=inside)
        else:
            tl.store(values + to, tl.load(v + at, mask=inside, other=0.0).to(tl.float16), mask=inside)
            second = tl.load(v + at + half, mask=inside, other=0.0)
            tl.store(values + to + half, second.to(tl.float16), mask=inside)


@triton.jit
def attend_kernel(
    q,
    keys,
    values,
    positions,
    out,
    logs,
    n_heads,
    group,
    n_ctx,
    head_dim,
    window,
    scale,
    SHARE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (head, token, s) attends to cache positions [s · SHARE, (s + 1) · SHARE), all at once.

    out [splits, tokens, n_heads, head_dim] is normalized within a split; logs [splits, tokens, n_heads] is
    the logarithm of what it was divided by, -inf where a split has no visible position.
    """
    let_next_start(EARLY)
    wait_for_last(EARLY)
    head, token, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    last = tl.load(positions + token).to(tl.int32)
    cols = tl.arange(0, BLOCK)
    inside = cols < head_dim
    query = tl.load(q + (token * n_heads + head) * head_dim + cols, mask=inside, other=0.0) * scale
    position = split * SHARE + tl.arange(0, SHARE)
    live = position <= last
    if window > 0:
        live &= position > last - window
    at = ((head // group).to(tl.int64) * n_ctx + position)[:, None] * head_dim + cols[None, :]
    read = live[:, None] & inside[None, :]
    # Both are asked for before either is needed.
    key = tl.load(keys + at, mask=read, other=0.0).to(tl.float32)
    value = tl.load(values + at, mask=read, other=0.0).to(tl.float32)
    score = tl.where(live, tl.sum(key * query[None, :], 1), float("-inf"))
    peak = tl.maximum(tl.max(score, 0), -1e38)  # a number, where nothing is visible too
    share = tl.exp(score - peak)
    mass = tl.sum(share, 0)
    seen = mass > 0
    mixed = tl.sum(value * share[:, None], 0) / tl.where(seen, mass, 1.0)
    row = (split * tl.num_programs(1) + token) * n_heads + head
    tl.store(out + row * head_dim + cols, mixed, mask=inside)
    if SPLIT:
        tl.store(logs + row, tl.where(seen, peak + tl.log(tl.where(seen, mass, 1.0)), float("-inf")))


@triton.jit
def blend_kernel(
    pieces, logs, out, splits, rows, width, SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """out [rows, width] = pieces [splits, rows, width] weighted by the softmax of logs [splits, rows]."""
    let_next_start(EARLY)
    wait_for_last(EARLY)
    row, split = tl.program_id(0), tl.arange(0, SPLITS)
    log = tl.load(logs + split * rows + row, mask=split < splits, other=float("-inf"))
    share = tl.exp(log - tl.max(log, 0))
    share = share / tl.sum(share, 0)
    cols = tl.arange(0, BLOCK)
    at = (split[:, None] * rows + row) * width + cols[None, :]
    piece = tl.load(pieces + at, mask=(split < splits)[:, None] & (cols < width)[None, :], other=0.0)
    tl.store(out + row * width + cols, tl.sum(piece * share[:, None], 0), mask=cols < width)


@triton.jit
def activate_kernel(
    gate,
    up,
    a,
    fired,
    size,
    n,
    threshold,
    each,
    GATED: tl.constexpr,
    VALUE: tl.constexpr,
    SCORE: tl.constexpr,
    OWN: tl.constexpr,
    CLIP: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """a [size] = what gates, n a token, become, times up if any; how many are not zero is added to fired."""
    let_next_start(EARLY)
    wait_for_last(EARLY)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gates = tl.load(gate + at, mask=inside, other=0.0)
    limit = limits(threshold, each, at % n, inside, OWN)
    values, fires = fired_values(gates, limit, VALUE, SCORE)
    if GATED:
        ups = tl.load(up + at, mask=inside, other=0.0)
        if CLIP:
            ups = tl.maximum(ups, 0.0)
        values *= ups
    found = tl.where(fires & inside, values, 0.0)
    tl.store(a + at, found, mask=inside)
    if COUNTED:  # whole numbers: their sum does not depend on the order
        tl.atomic_add(fired, tl.sum((found != 0.0).to(tl.int64), 0), sem="relaxed")


@triton.jit
def leave_out_kernel(
    x,
    least,
    positions,
    kept,
    out,
    size,
    width,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out [tokens, width] = x where its size is at least `least`, or its token the first of all, else 0."""
    let_next_start(EARLY)
    wait_for_last(EARLY)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    values = tl.load(x + at, mask=inside, other=0.0)
    enough = tl.abs(values) >= tl.load(least + at % width, mask=inside, other=0.0)
    first = tl.load(positions + at // width, mask=inside, other=1) == 0
    found = tl.where(enough | first, values, 0.0)
    tl.store(out + at, found, mask=inside)
    if COUNTED:  # whole numbers: their sum does not depend on the order
        tl.atomic_add(kept, tl.sum((found != 0.0).to(tl.int64), 0), sem="relaxed")
