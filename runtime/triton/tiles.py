"""What the kernels share: reading weights, finding the neurons that fire, dots with rows and sums of rows.

All read weights through `row_tile`: [ROWS, BLOCK] of float32 whatever the stored type, where a row that is
not `live` costs no memory traffic. TOKENS is the batch rounded up to a power of two; `tokens` the true one.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["nth_wanted", "row_dots", "store_partial", "wanted_neurons", "weighted_rows"]

# As in rows.py; kernels only see globals that are constexpr.
_FLOAT = tl.constexpr(0)
_Q4_0 = tl.constexpr(2)


@triton.jit
def row_tile(w, scales, rows, live, start, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [start, start + BLOCK) of `rows`, float32 [ROWS, BLOCK]; 0 outside and in rows not live."""
    cols = start + tl.arange(0, BLOCK)
    inside = live[:, None] & (cols < width)[None, :]
    rows = rows.to(tl.int64)[:, None]  # a matrix may have more than 2³¹ weights
    if KIND == _Q4_0:
        pairs = start // 2 + tl.arange(0, BLOCK // 2)
        packed_inside = live[:, None] & (pairs < width // 2)[None, :]
        packed = tl.load(w + rows * (width // 2) + pairs[None, :], mask=packed_inside, other=0)
        values = tl.interleave(packed & 15, packed >> 4).to(tl.float32) - 8.0
    else:
        values = tl.load(w + rows * width + cols[None, :], mask=inside, other=0).to(tl.float32)
    if KIND != _FLOAT:
        block = start // 32 + tl.arange(0, BLOCK // 32)
        scaled = live[:, None] & (block < width // 32)[None, :]
        scale = tl.load(scales + rows * (width // 32) + block[None, :], mask=scaled, other=0).to(tl.float32)
        by_block = tl.reshape(values, (values.shape[0], BLOCK // 32, 32)) * scale[:, :, None]
        values = tl.reshape(by_block, (values.shape[0], BLOCK))
    return values


@triton.jit
def row_dots(
    x,
    w,
    scales,
    rows,
    live,
    tokens,
    width,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[ROWS, TOKENS]: each row with each token's x [tokens, width]."""
    token = tl.arange(0, TOKENS)[:, None]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        part = tl.load(x + token * width + cols, mask=(token < tokens) & (cols < width), other=0.0)
        tile = row_tile(w, scales, rows, live, start, width, KIND, BLOCK)
        sums += tl.sum(tile[:, None, :] * part[None, :, :], 2)
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
    width,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[TOKENS, BLOCK]: Σ a[token, position] · row. A row whose multipliers are all zero is not read."""
    token = tl.arange(0, TOKENS)[:, None]
    inside = (token < tokens) & live[None, :]
    factor = tl.load(a + token * a_stride + position[None, :], mask=inside, other=0.0)
    used = live & (tl.max((factor != 0.0).to(tl.int32), 0) > 0)
    tile = row_tile(w, scales, rows, used, start, width, KIND, BLOCK)
    return tl.sum(factor[:, :, None] * tile[None, :, :], 1)


@triton.jit
def wanted_neurons(scores, always, neuron, n, tokens, threshold, ALWAYS: tl.constexpr, TOKENS: tl.constexpr):
    """int32 [CHUNK]: 1 where a neuron's score reaches the threshold for any token, or it is always wanted."""
    token = tl.arange(0, TOKENS)[:, None]
    inside = (token < tokens) & (neuron < n)[None, :]
    score = tl.load(scores + token * n + neuron[None, :], mask=inside, other=float("-inf"))
    wanted = tl.max(((score >= threshold) & inside).to(tl.int32), 0)
    if ALWAYS:
        wanted = tl.maximum(wanted, tl.load(always + neuron, mask=neuron < n, other=0).to(tl.int32))
    return wanted


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
