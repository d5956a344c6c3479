"""What the kernels share: reading weights, finding the neurons that fire, dots with rows and sums of rows.

All read weights through `row_tile`: [ROWS, BLOCK] of float32 for any stored type, where a row that is
not `live` costs no memory traffic. TOKENS is the batch rounded up to a power of two, `tokens` the true one;
what a token too many comes to is stored by nobody.

Memory is fast when much is asked for at once, so a program issues the loads of a whole tile before it needs
the first of them, and nothing in between makes it wait: what is multiplied with x is loaded with as many
neighboring columns per thread as x is (TOGETHER), or Triton would exchange them through shared memory.
"""

# Triton's language, not Python's: a checker cannot know what these mean.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from hotcold.runtime.triton.early import wait_for_last

__all__ = [
    "fired_values", "limits", "nth_wanted", "row_dots", "store_partial", "wanted_neurons", "weighted_rows",
]  # fmt: skip

# As in rows.py; kernels only see globals that are constexpr.
_FLOAT = tl.constexpr(0)
_Q4_0 = tl.constexpr(2)

# As in model/firing.py.
_SQUARE, _SHIFTED, _SILU, _GELU = (tl.constexpr(value) for value in (1, 2, 3, 4))
_ALWAYS, _MAGNITUDE = tl.constexpr(0), tl.constexpr(2)

_WITH_X = tl.constexpr(4)  # neighboring columns per thread: 16 bytes of x in float32
_ALONE = tl.constexpr(8)  # 16 bytes of weights in half precision


@triton.jit
def row_tile(
    w,
    scales,
    rows,
    live,
    start,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Columns [start, start + BLOCK) of `rows`, float32 [ROWS, BLOCK]; 0 outside and in rows not live."""
    rows = rows.to(tl.int64)  # a matrix may have more than 2³¹ weights
    if KIND == _FLOAT:
        cols = start + tl.max_contiguous(tl.arange(0, BLOCK), TOGETHER)
        inside = live[:, None] & (cols < WIDTH)[None, :]
        return tl.load(w + rows[:, None] * WIDTH + cols[None, :], mask=inside, other=0).to(tl.float32)
    # Quantized: read as floats are, then [ROWS, blocks, 32], so that a block's weights meet their scale.
    block = start // 32 + tl.arange(0, BLOCK // 32)
    inside = live[:, None] & (block < WIDTH // 32)[None, :]
    scale = tl.load(scales + rows[:, None] * (WIDTH // 32) + block[None, :], mask=inside, other=0)
    if KIND == _Q4_0:
        byte = start // 2 + tl.max_contiguous(tl.arange(0, BLOCK // 2), TOGETHER // 2)
        inside = live[:, None] & (byte < WIDTH // 2)[None, :]
        packed = tl.load(w + rows[:, None] * (WIDTH // 2) + byte[None, :], mask=inside, other=0)
        quants = tl.interleave(packed & 15, packed >> 4).to(tl.float32) - 8.0
    else:
        cols = start + tl.max_contiguous(tl.arange(0, BLOCK), TOGETHER)
        inside = live[:, None] & (cols < WIDTH)[None, :]
        quants = tl.load(w + rows[:, None] * WIDTH + cols[None, :], mask=inside, other=0).to(tl.float32)
    quants = tl.reshape(quants, (rows.shape[0], BLOCK // 32, 32)) * scale.to(tl.float32)[:, :, None]
    return tl.reshape(quants, (rows.shape[0], BLOCK))


@triton.jit
def row_dots(
    x,
    w,
    scales,
    rows,
    live,
    tokens,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """[ROWS, TOKENS]: each row with each token's x [tokens, WIDTH]; if EARLY, x is waited for, `rows` not."""
    token = tl.arange(0, TOKENS)[None, :]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        tile = row_tile(w, scales, rows, live, start, WIDTH, KIND, BLOCK, _WITH_X)
        if start == 0:
            wait_for_last(EARLY)
        cols = start + tl.arange(0, BLOCK)
        for t in tl.static_range(TOKENS):
            part = tl.load(x + tl.minimum(t, tokens - 1) * WIDTH + cols, mask=cols < WIDTH, other=0.0)
            sums += tl.where(token == t, tl.sum(tile * part[None, :], 1)[:, None], 0.0)
    return sums


@triton.jit
def weighted_rows(
    a,
    a_stride,
    w,
    scales,
    position,
    rows,
    live,
    start,
    tokens,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[TOKENS, BLOCK]: Σ a[token, position] · row. A row whose multipliers are all zero is not read."""
    token = tl.arange(0, TOKENS)[:, None]
    factor = tl.load(a + position, mask=live, other=0.0)
    used = factor != 0.0
    for t in tl.static_range(1, TOKENS):
        used |= tl.load(a + tl.minimum(t, tokens - 1) * a_stride + position, mask=live, other=0.0) != 0.0
    tile = row_tile(w, scales, rows, used, start, WIDTH, KIND, BLOCK, _ALONE)
    sums = tl.where(token == 0, tl.sum(factor[:, None] * tile, 0)[None, :], 0.0)
    for t in tl.static_range(1, TOKENS):
        factor = tl.load(a + tl.minimum(t, tokens - 1) * a_stride + position, mask=live, other=0.0)
        sums += tl.where(token == t, tl.sum(factor[:, None] * tile, 0)[None, :], 0.0)
    return sums


@triton.jit
def limits(threshold, each, rows, live, OWN: tl.constexpr):
    """What the scores of neurons `rows` are compared with: their own thresholds, or the one for all."""
    if OWN:
        limit = tl.load(each + rows, mask=live, other=float("inf"))
    else:
        limit = threshold
    return limit


@triton.jit
def fired_values(gates, limit, VALUE: tl.constexpr, SCORE: tl.constexpr):
    """What gates become, and which of them fire: the firing rule (model/firing.py)."""
    values = gates
    if VALUE == _SQUARE:
        values = gates * gates
    elif VALUE == _SHIFTED:
        values = gates - limit
    elif VALUE == _SILU:
        values = gates / (1.0 + tl.exp(-gates))
    elif VALUE == _GELU:
        values = 0.5 * gates * (1.0 + tl.erf(gates * 0.7071067811865476))
    if SCORE == _ALWAYS:
        fires = gates == gates
    elif SCORE == _MAGNITUDE:
        fires = tl.abs(values) >= limit
    else:
        fires = gates >= limit
    return values, fires


@triton.jit
def wanted_neurons(
    scores,
    always,
    neuron,
    n,
    tokens,
    threshold,
    each,
    ALWAYS: tl.constexpr,
    VALUE: tl.constexpr,
    SCORE: tl.constexpr,
    OWN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """int32 [CHUNK]: 1 where a neuron fires by its score for any token, or is always wanted."""
    limit = limits(threshold, each, neuron, neuron < n, OWN)
    first = tl.load(scores + neuron, mask=neuron < n, other=float("-inf"))
    wanted = fired_values(first, limit, VALUE, SCORE)[1]
    for t in tl.static_range(1, TOKENS):
        row = scores + tl.minimum(t, tokens - 1) * n
        gates = tl.load(row + neuron, mask=neuron < n, other=float("-inf"))
        wanted |= fired_values(gates, limit, VALUE, SCORE)[1]
    if ALWAYS:
        wanted |= tl.load(always + neuron, mask=neuron < n, other=0) > 0
    return (wanted & (neuron < n)).to(tl.int32)


@triton.jit
def nth_wanted(wanted, group, first, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Wanted neurons first .. first + ROWS of a group, int32 [ROWS]; past the last, the group's first."""
    rank = tl.cumsum(wanted, 0) - 1
    slot = first + tl.arange(0, ROWS)
    chosen = (rank[None, :] == slot[:, None]) & (wanted > 0)[None, :]
    return group * GROUP + tl.sum(tl.where(chosen, tl.arange(0, GROUP)[None, :], 0), 1)


@triton.jit
def store_partial(partial, sums, part, start, tokens, width, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.arange(0, TOKENS)[:, None]
    cols = start + tl.arange(0, BLOCK)[None, :]
    at = (part * tokens + token) * width + cols
    tl.store(partial + at, sums, mask=(token < tokens) & (cols < width))
