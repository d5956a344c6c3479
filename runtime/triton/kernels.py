"""The Triton kernels. ops.py checks and launches them; reference.py says what each computes.

Sums are float32 and in a fixed order: no atomics but on counters, so a result depends on nothing but its
inputs. Sizes that vary from token to token stay on the device: the grid is fixed, programs loop up to a count
that they load.
"""

# Triton's language, not Python's: a checker cannot know what these mean.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from hotcold.runtime.triton.early import let_next_start, wait_for_last
from hotcold.runtime.triton.tiles import (
    fired_values,
    limits,
    nth_wanted,
    row_dots,
    store_partial,
    wanted_neurons,
    weighted_rows,
)

__all__ = [
    "count_kernel",
    "dot_kernel",
    "down_kernel",
    "list_kernel",
    "listed_kernel",
    "s2_kernel",
    "s3_kernel",
    "sum_kernel",
]


@triton.jit
def dot_kernel(
    x,
    w,
    scales,
    bias,
    out,
    n,
    tokens,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    BIASED: tl.constexpr,
    RELU: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out [tokens, n] = x · wᵀ + bias; one program per ROWS rows, which it begins to read early."""
    let_next_start(EARLY)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    if BIASED:
        shift = tl.load(bias + rows, mask=live, other=0.0)
    sums = row_dots(x, w, scales, rows, live, tokens, WIDTH, KIND, TOKENS, ROWS, BLOCK, EARLY)
    if BIASED:
        sums += shift[:, None]
    if RELU:
        sums = tl.maximum(sums, 0.0)
    token = tl.arange(0, TOKENS)[None, :]
    tl.store(out + token * n + rows[:, None], sums, mask=live[:, None] & (token < tokens))


@triton.jit
def count_kernel(
    scores,
    always,
    counts,
    n,
    tokens,
    threshold,
    each,
    ALWAYS: tl.constexpr,
    VALUE: tl.constexpr,
    SCORE: tl.constexpr,
    OWN: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """counts[chunk]: how many neurons of it are wanted."""
    let_next_start(EARLY)
    wait_for_last(EARLY)
    neuron = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    wanted = wanted_neurons(
        scores, always, neuron, n, tokens, threshold, each, ALWAYS, VALUE, SCORE, OWN, TOKENS
    )
    tl.store(counts + tl.program_id(0), tl.sum(wanted, 0))


@triton.jit
def list_kernel(
    scores,
    always,
    counts,
    index,
    count,
    counter,
    n,
    tokens,
    threshold,
    each,
    ALWAYS: tl.constexpr,
    VALUE: tl.constexpr,
    SCORE: tl.constexpr,
    OWN: tl.constexpr,
    COUNTED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Writes the wanted neurons of a chunk behind those of earlier chunks; program 0 writes the total.

    A single chunk needs no counts.
    """
    let_next_start(EARLY)
    wait_for_last(EARLY)
    chunk = tl.program_id(0)
    neuron = chunk * CHUNK + tl.arange(0, CHUNK)
    wanted = wanted_neurons(
        scores, always, neuron, n, tokens, threshold, each, ALWAYS, VALUE, SCORE, OWN, TOKENS
    )
    if CHUNKS == 1:
        before, total = 0, tl.sum(wanted, 0)
    else:
        each = tl.arange(0, CHUNKS)
        per_chunk = tl.load(counts + each, mask=each < tl.num_programs(0), other=0)
        before, total = tl.sum(tl.where(each < chunk, per_chunk, 0), 0), tl.sum(per_chunk, 0)
    place = before + tl.cumsum(wanted, 0) - 1
    tl.store(index + place, neuron, mask=wanted > 0)
    if chunk == 0:
        tl.store(count, total)
        if COUNTED:
            tl.store(counter, tl.load(counter) + total)


@triton.jit
def listed_kernel(
    x,
    gate,
    gate_scales,
    bias,
    up,
    up_scales,
    scores,
    index,
    count,
    a,
    fired,
    n,
    tokens,
    threshold,
    each,
    WIDTH: tl.constexpr,
    KIND_GATE: tl.constexpr,
    KIND_UP: tl.constexpr,
    SCORED: tl.constexpr,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    VALUE: tl.constexpr,
    SCORE: tl.constexpr,
    OWN: tl.constexpr,
    CLIP: tl.constexpr,
    COUNTED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """a [tokens, n] by list position: gate dot (or known score), activation, up dot if any where it fires."""
    let_next_start(EARLY)
    wait_for_last(EARLY)
    listed = tl.load(count)
    token = tl.arange(0, TOKENS)[None, :]
    n_fired = tl.zeros((ROWS, TOKENS), tl.int32)
    for first in range(tl.program_id(0) * ROWS, listed, tl.num_programs(0) * ROWS):
        position = first + tl.arange(0, ROWS)
        live = position < listed
        rows = tl.load(index + position, mask=live, other=0)
        inside = live[:, None] & (token < tokens)
        if SCORED:
            gates = tl.load(scores + token * n + rows[:, None], mask=inside, other=0.0)
        else:
            gates = row_dots(
                x, gate, gate_scales, rows, live, tokens, WIDTH, KIND_GATE, TOKENS, ROWS, BLOCK, False
            )
            if BIASED:
                gates += tl.load(bias + rows, mask=live, other=0.0)[:, None]
        limit = limits(threshold, each, rows[:, None], live[:, None], OWN)
        values, fires = fired_values(gates, limit, VALUE, SCORE)
        fires &= inside
        if GATED:
            live_up = tl.max(fires.to(tl.int32), 1) > 0
            ups = row_dots(
                x, up, up_scales, rows, live_up, tokens, WIDTH, KIND_UP, TOKENS, ROWS, BLOCK, False
            )
            if CLIP:
                ups = tl.maximum(ups, 0.0)
            values *= ups
        found = tl.where(fires, values, 0.0)
        tl.store(a + token * n + position[:, None], found, mask=inside)
        n_fired += (found != 0.0).to(tl.int32)
    if COUNTED:  # whole numbers: their sum does not depend on the order
        here = tl.program_id(0) * ROWS < listed
        tl.atomic_add(fired, tl.sum(tl.sum(n_fired, 1), 0).to(tl.int64), mask=here, sem="relaxed")


@triton.jit
def down_kernel(
    a,
    down,
    scales,
    index,
    count,
    partial,
    n,
    tokens,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """partial [splits, tokens, width]: program (c, s) sums the s-th part of the list into column block c."""
    let_next_start(EARLY)
    wait_for_last(EARLY)
    listed = tl.load(count)
    share = tl.cdiv(listed, tl.num_programs(1))
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, listed)
    start = tl.program_id(0) * BLOCK
    sums = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in range(begin, end, ROWS):
        position = first + tl.arange(0, ROWS)
        live = position < end
        rows = tl.load(index + position, mask=live, other=0)
        sums += weighted_rows(
            a, n, down, scales, position, rows, live, start, tokens, WIDTH, KIND, TOKENS, BLOCK
        )
    store_partial(partial, sums, tl.program_id(1), start, tokens, WIDTH, TOKENS, BLOCK)


@triton.jit
def sum_kernel(partial, y, parts, size, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """y [size] = Σ over parts of partial [parts, size], all asked for at once."""
    let_next_start(EARLY)
    wait_for_last(EARLY)
    part = tl.arange(0, PARTS)[:, None]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.load(partial + part * size + at[None, :], mask=(part < parts) & (at < size)[None, :], other=0.0)
    tl.store(y + at, tl.sum(tile, 0), mask=at < size)


@triton.jit
def s2_kernel(
    scores,
    x,
    up,
    scales,
    out,
    n,
    tokens,
    threshold,
    each,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    VALUE: tl.constexpr,
    SCORE: tl.constexpr,
    OWN: tl.constexpr,
    CLIP: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """S2: one program per GROUP neurons finds those that fire among them and reads these rows alone."""
    let_next_start(EARLY)
    wait_for_last(EARLY)
    group = tl.program_id(0)
    token = tl.arange(0, TOKENS)[None, :]
    neuron = group * GROUP + tl.arange(0, GROUP)
    wanted = wanted_neurons(
        scores, scores, neuron, n, tokens, threshold, each, False, VALUE, SCORE, OWN, TOKENS
    )
    silent = (wanted == 0) & (neuron < n)
    zeros = tl.zeros((GROUP, TOKENS), tl.float32)
    tl.store(out + token * n + neuron[:, None], zeros, mask=silent[:, None] & (token < tokens))
    total = tl.sum(wanted, 0)
    for first in range(0, total, ROWS):
        rows = nth_wanted(wanted, group, first, GROUP, ROWS)
        live = first + tl.arange(0, ROWS) < total
        ups = row_dots(x, up, scales, rows, live, tokens, WIDTH, KIND, TOKENS, ROWS, BLOCK, False)
        if CLIP:
            ups = tl.maximum(ups, 0.0)
        inside = live[:, None] & (token < tokens)
        gates = tl.load(scores + token * n + rows[:, None], mask=inside, other=0.0)
        limit = limits(threshold, each, rows[:, None], live[:, None], OWN)
        values, fires = fired_values(gates, limit, VALUE, SCORE)
        tl.store(out + token * n + rows[:, None], tl.where(fires, values * ups, 0.0), mask=inside)


@triton.jit
def s3_kernel(
    a,
    down,
    scales,
    partial,
    n,
    tokens,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """S3, first pass: program (c, g) sums the firing rows of group g into column block c of partial."""
    let_next_start(EARLY)
    wait_for_last(EARLY)
    group = tl.program_id(1)
    neuron = group * GROUP + tl.arange(0, GROUP)
    fired = tl.load(a + neuron, mask=neuron < n, other=0.0) != 0.0
    for t in tl.static_range(1, TOKENS):
        fired |= tl.load(a + tl.minimum(t, tokens - 1) * n + neuron, mask=neuron < n, other=0.0) != 0.0
    wanted = fired.to(tl.int32)
    total = tl.sum(wanted, 0)
    start = tl.program_id(0) * BLOCK
    sums = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in range(0, total, ROWS):
        rows = nth_wanted(wanted, group, first, GROUP, ROWS)
        live = first + tl.arange(0, ROWS) < total
        sums += weighted_rows(a, n, down, scales, rows, rows, live, start, tokens, WIDTH, KIND, TOKENS, BLOCK)
    store_partial(partial, sums, group, start, tokens, WIDTH, TOKENS, BLOCK)
