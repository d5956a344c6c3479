"""The operators on a GPU: the functions of reference.py, by Triton kernels.

Each is registered as `torch.ops.hotcold.NAME` through `torch.library.triton_op`, so that torch.compile and
CUDA graphs see through it; those take plain tensors, the functions exported here take `Rows` and check them.
Nothing here waits for the device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.library import triton_op
from triton import cdiv, next_power_of_2

from hotcold.errors import ShapeError
from hotcold.runtime.triton import kernels
from hotcold.runtime.triton.firing import PLAIN_RELU, LayerRule
from hotcold.runtime.triton.launch import launch
from hotcold.runtime.triton.rows import Rows
from hotcold.runtime.triton.steps import activate, add_norm, apply_rope, attend, leave_out, norm
from hotcold.runtime.triton.tuning import Tiles, tiles_for, whole_rows

__all__ = [
    "MAX_TOKENS",
    "activate",
    "add_norm",
    "apply_rope",
    "attend",
    "dot_rows",
    "down_listed",
    "ffn_exact",
    "ffn_listed",
    "leave_out",
    "norm",
    "predict",
    "s2",
    "s3",
    "select",
    "select_fired",
    "shape_key",
]

MAX_TOKENS = 8  # beyond that, a dense product on tensor cores is the better tool
_CHUNK = 1024  # neurons that one program lists, where there are more than a single one can
_SUM_BLOCK = 32


def shape_key(kernel: str, x: Tensor, w: Tensor, kind: int) -> str:
    """What tile sizes depend on: the number of rows to the next power of two, of a list not even that."""
    n = "" if kernel in ("listed", "down") else f"{next_power_of_2(w.shape[0])}x"
    return f"{n}{w.shape[1]} {str(w.dtype).removeprefix('torch.')} kind {kind} tokens {x.shape[0]}"


def _tiles(kernel: str, x: Tensor, w: Tensor, kind: int) -> Tiles:
    return dict(tiles_for(kernel, x.device, shape_key(kernel, x, w, kind)))


def _row_tiles(kernel: str, x: Tensor, w: Tensor, kind: int) -> Tiles:
    """Of a kernel whose programs hold whole rows."""
    return whole_rows(_tiles(kernel, x, w, kind), x.shape[1], x.device)


def _batch(x: Tensor) -> int:
    return next_power_of_2(x.shape[0])


@triton_op("hotcold::dot_rows", mutates_args=())
def _dot_rows(x: Tensor, w: Tensor, scales: Tensor, kind: int, bias: Tensor | None, relu: bool) -> Tensor:
    n, (tokens, width) = w.shape[0], x.shape
    out = x.new_empty(tokens, n)
    tiles = _row_tiles("dot", x, w, kind)
    launch(
        kernels.dot_kernel, (cdiv(n, tiles["ROWS"]),), x, w, scales, x if bias is None else bias, out,
        n, tokens,
        WIDTH=width, KIND=kind, BIASED=bias is not None, RELU=relu, TOKENS=_batch(x), **tiles,
    )  # fmt: skip
    return out


@triton_op("hotcold::s2", mutates_args=())
def _s2(
    scores: Tensor, x: Tensor, up: Tensor, scales: Tensor, kind: int,
    value: int, score: int, threshold: float, each: Tensor | None, clip: bool,
) -> Tensor:  # fmt: skip
    n, (tokens, width) = up.shape[0], x.shape
    out = torch.empty_like(scores)
    tiles = _row_tiles("s2", x, up, kind)
    launch(
        kernels.s2_kernel, (cdiv(n, tiles["GROUP"]),), scores, x, up, scales, out, n, tokens, threshold,
        scores if each is None else each, WIDTH=width, KIND=kind, VALUE=value, SCORE=score,
        OWN=each is not None, CLIP=clip, TOKENS=_batch(x), **tiles,
    )  # fmt: skip
    return out


@triton_op("hotcold::s3", mutates_args=())
def _s3(a: Tensor, down: Tensor, scales: Tensor, kind: int, width: int) -> Tensor:
    tokens, n = a.shape
    tiles = _tiles("s3", a, down, kind)
    groups = cdiv(n, tiles["GROUP"])
    partial = a.new_empty(groups, tokens, width)
    launch(
        kernels.s3_kernel, (cdiv(width, tiles["BLOCK"]), groups), a, down, scales, partial, n, tokens,
        WIDTH=width, KIND=kind, TOKENS=_batch(a), **tiles,
    )  # fmt: skip
    return _total(partial)


def _total(partial: Tensor) -> Tensor:
    """The second pass of a sum: [parts, tokens, width] -> [tokens, width]."""
    parts = partial.shape[0]
    if parts == 1:
        return partial[0]
    y = torch.empty_like(partial[0])
    size = y.numel()
    sizes = {"PARTS": next_power_of_2(parts), "BLOCK": _SUM_BLOCK}
    launch(kernels.sum_kernel, (cdiv(size, _SUM_BLOCK),), partial, y, parts, size, **sizes)
    return y


@lru_cache
def _one_chunk(device: torch.device) -> int:
    """Neurons that a single program lists, at 8 bytes of shared memory each: desktop GPUs have less of it."""
    if device.type != "cuda":
        return 16384
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return 16384 if room >= 16384 * 8 else 8192


@triton_op("hotcold::select", mutates_args=("counter",))
def _select(
    scores: Tensor, always: Tensor | None, counter: Tensor | None,
    value: int, score: int, threshold: float, each: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens, n = scores.shape
    # One program lists what it can look over at a time; the chunks of more are counted before.
    chunk = next_power_of_2(n) if n <= _one_chunk(scores.device) else _CHUNK
    chunks, warps = cdiv(n, chunk), min(max(chunk // 512, 4), 32)
    ints = {"dtype": torch.int32, "device": scores.device}
    counts, index, count = torch.empty(chunks, **ints), torch.empty(n, **ints), torch.empty(1, **ints)
    sizes = {"ALWAYS": always is not None, "TOKENS": _batch(scores), "CHUNK": chunk, "num_warps": warps}
    sizes |= {"VALUE": value, "SCORE": score, "OWN": each is not None}
    flags, own = scores if always is None else always.view(torch.uint8), scores if each is None else each
    if chunks > 1:
        launch(kernels.count_kernel, (chunks,), scores, flags, counts, n, tokens, threshold, own, **sizes)
    launch(
        kernels.list_kernel, (chunks,), scores, flags, counts, index, count,
        count if counter is None else counter, n, tokens, threshold, own,
        COUNTED=counter is not None, CHUNKS=next_power_of_2(chunks), **sizes,
    )  # fmt: skip
    return index, count


@triton_op("hotcold::ffn_listed", mutates_args=("fired",))
def _ffn_listed(
    x: Tensor,
    gate: Tensor,
    gate_scales: Tensor,
    gate_kind: int,
    scored: bool,
    bias: Tensor | None,
    up: Tensor | None,
    up_scales: Tensor,
    up_kind: int,
    index: Tensor,
    count: Tensor,
    value: int,
    score: int,
    threshold: float,
    each: Tensor | None,
    clip: bool,
    fired: Tensor | None,
) -> Tensor:
    n, (tokens, width) = index.shape[0], x.shape
    a = x.new_empty(tokens, n)
    last = gate if up is None else up
    tiles = _row_tiles("listed", x, last, up_kind)
    programs = min(tiles.pop("PROGRAMS"), cdiv(n, tiles["ROWS"]))
    launch(
        kernels.listed_kernel, (programs,), x, gate, gate_scales, x if bias is None else bias,
        last, up_scales, gate, index, count, a, count if fired is None else fired, n, tokens, threshold,
        x if each is None else each,
        WIDTH=width, KIND_GATE=gate_kind, KIND_UP=up_kind, SCORED=scored, BIASED=bias is not None,
        GATED=up is not None, VALUE=value, SCORE=score, OWN=each is not None, CLIP=clip,
        COUNTED=fired is not None, TOKENS=_batch(x), **tiles,
    )  # fmt: skip
    return a


@triton_op("hotcold::down_listed", mutates_args=())
def _down_listed(
    a: Tensor, down: Tensor, scales: Tensor, kind: int, width: int, index: Tensor, count: Tensor
) -> Tensor:
    tokens, n = a.shape
    tiles = _tiles("down", a, down, kind)
    partial = a.new_empty(tiles.pop("SPLITS"), tokens, width)
    launch(
        kernels.down_kernel, (cdiv(width, tiles["BLOCK"]), len(partial)), a, down, scales, index, count,
        partial, n, tokens, WIDTH=width, KIND=kind, TOKENS=_batch(a), **tiles,
    )  # fmt: skip
    return _total(partial)


def dot_rows(x: Tensor, w: Rows, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """See reference.dot_rows. Raises ShapeError, as all here do, for what the kernel cannot take."""
    _check(x, w, bias)
    return _dot_rows(x, w.data, w.scales, w.kind, bias, relu)


def s2(scores: Tensor, x: Tensor, up: Rows, rule: LayerRule = PLAIN_RELU) -> Tensor:
    """See reference.s2."""
    _check(x, up)
    _check_values("scores", scores, (len(x), up.n))
    return _s2(scores, x, up.data, up.scales, up.kind, *_parts(rule, up.n), rule.clips_up)


def s3(a: Tensor, down: Rows) -> Tensor:
    """See reference.s3."""
    _check_values("a", a, (len(a), down.n))
    return _s3(a, down.data, down.scales, down.kind, down.width)


def select(
    scores: Tensor, threshold: float, always: Tensor | None = None, counter: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See reference.select."""
    _check_values("scores", scores, tuple(scores.shape))
    ids = int(PLAIN_RELU.value), int(PLAIN_RELU.score)
    return _select(scores, always, counter, *ids, threshold, None)


def select_fired(gates: Tensor, rule: LayerRule) -> tuple[Tensor, Tensor]:
    """See reference.select_fired."""
    _check_values("gates", gates, tuple(gates.shape))
    return _select(gates, None, None, *_parts(rule, gates.shape[1]))


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
    """See reference.predict."""
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
    """See reference.ffn_listed; here, what stands after `count` is undefined."""
    last = gate if up is None else up
    if isinstance(last, Tensor):
        raise ShapeError("known scores need the rows of up")
    _check(x, last)
    if isinstance(gate, Tensor):
        _check_values("scores", gate, (len(x), last.n))
        data, scales, kind = gate, last.scales, last.kind
    else:
        _check(x, gate, bias)
        data, scales, kind = gate.data, gate.scales, gate.kind
    scored, up_data = isinstance(gate, Tensor), None if up is None else up.data
    return _ffn_listed(
        x, data, scales, kind, scored, bias, up_data, last.scales, last.kind, index, count,
        *_parts(rule, last.n), rule.clips_up, fired,
    )  # fmt: skip


def down_listed(a: Tensor, down: Rows, index: Tensor, count: Tensor) -> Tensor:
    """See reference.down_listed."""
    _check_values("a", a, (len(a), down.n))
    return _down_listed(a, down.data, down.scales, down.kind, down.width, index, count)


def ffn_exact(
    x: Tensor, gate: Rows, up: Rows, down: Rows, rule: LayerRule = PLAIN_RELU
) -> tuple[Tensor, Tensor]:
    """See reference.ffn_exact."""
    scores = dot_rows(x, gate)
    index, count = select_fired(scores, rule)
    return down_listed(ffn_listed(x, scores, up, index, count, rule), down, index, count), count


def _parts(rule: LayerRule, n: int) -> tuple[int, int, float, Tensor | None]:
    """A rule as plain values; ShapeError where its thresholds are not those of n neurons."""
    if rule.each is not None and (rule.each.dtype != torch.float32 or tuple(rule.each.shape) != (n,)):
        raise ShapeError("thresholds do not fit the weights", got=tuple(rule.each.shape), expected=(n,))
    return int(rule.value), int(rule.score), rule.threshold, rule.each


def _check(x: Tensor, w: Rows, bias: Tensor | None = None) -> None:
    _check_values("x", x, (len(x), w.width))
    if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (w.n,)):
        got, expected = f"{bias.dtype} {list(bias.shape)}", f"torch.float32 {[w.n]}"
        raise ShapeError("bias does not fit the weights", got=got, expected=expected)


def _check_values(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    """Kernels take float32, row after row, of 1 to MAX_TOKENS tokens."""
    if tuple(values.shape) != shape or len(shape) != 2:
        raise ShapeError(f"{name} does not fit the weights", got=tuple(values.shape), expected=shape)
    if values.dtype != torch.float32 or not values.is_contiguous():
        got = f"{values.dtype}{'' if values.is_contiguous() else ', not contiguous'}"
        raise ShapeError(f"{name} must be contiguous float32", got=got)
    if not 1 <= shape[0] <= MAX_TOKENS:
        raise ShapeError(f"{name} has too many tokens", got=shape[0], expected=f"1 to {MAX_TOKENS}")
