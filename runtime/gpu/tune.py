"""Tile sizes for a model's own matrices, measured when it is loaded for the first time on a GPU.

Weights of several layers take turns, as in a token, so that a matrix is not found in the cache that the call
before has left it in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import cycle
from types import ModuleType

import torch
from triton import next_power_of_2

from hotcold.runtime.gpu.weights import DeviceFfn, DeviceWeights
from hotcold.runtime.triton import tuning
from hotcold.runtime.triton.rows import Rows

__all__ = ["tune_ffns", "tune_weights"]

_LISTED = 0.11  # share of active neurons: what real ReLU gates of a 7B model leave (ProSparse, table 1)


def tune_weights(weights: DeviceWeights, mode: str, ops: ModuleType, device: torch.device) -> None:
    """Measure what this mode runs and has not been measured on this GPU before."""
    for rows in _alike(_products(weights, mode)):
        x = torch.randn(1, rows[0].width, device=device)
        _tune("dot", ops, x, rows, lambda w, x=x: ops.dot_rows(x, w))
    if not weights.dense_file:
        _tune_lists([layer.ffn for layer in weights.layers if layer.ffn], ops, device)


def tune_ffns(ffns: Sequence[tuple[Rows, Rows, Rows]], ops: ModuleType, device: torch.device) -> None:
    """The same for FFNs alone, as (gate, up, down)."""
    x = torch.randn(1, ffns[0][0].width, device=device)
    _tune("dot", ops, x, [gate for gate, _, _ in ffns], lambda w: ops.dot_rows(x, w))
    _tune_lists([DeviceFfn(*ffn) for ffn in ffns], ops, device)


def _products(weights: DeviceWeights, mode: str) -> list[Rows]:
    """Matrices that are read as a whole."""
    products = [weights.head] if weights.head else []
    for layer in weights.layers:
        products += [*layer.qkv, layer.o]
        products += [layer.predictor.fc1, layer.predictor.fc2] if layer.predictor else []
        if layer.ffn and mode != "predicted":
            others = [layer.ffn.up, layer.ffn.down] if mode == "dense" else []
            products += [rows for rows in (layer.ffn.gate, *others) if rows]
    return products


def _alike(products: Sequence[Rows]) -> list[list[Rows]]:
    """In groups of about one shape, and of one type.

    Triton recompiles a kernel if n is not a multiple of 16, which must not happen while a graph is recorded.
    """
    groups: dict[tuple, list[Rows]] = defaultdict(list)
    for rows in products:
        shape = next_power_of_2(rows.n), rows.n % 16 == 0, rows.width
        groups[*shape, rows.data.dtype, rows.kind].append(rows)
    return list(groups.values())


def _tune_lists(ffns: Sequence[DeviceFfn], ops: ModuleType, device: torch.device) -> None:
    """The kernels over lists, on the larger FFNs, as many neurons of each."""
    if not ffns:
        return
    most = max(ffn.gate.n for ffn in ffns)
    large = [ffn for ffn in ffns if 2 * ffn.gate.n >= most]
    n = min(ffn.gate.n for ffn in large)
    x, a = torch.randn(1, large[0].gate.width, device=device), torch.randn(1, n, device=device)
    chances = torch.rand(1, n, device=device)
    index, count = ops.select(chances, 1 - _LISTED)
    scores, downs = a.abs() + 1, [ffn.down.first(n) for ffn in large]  # every listed neuron fires
    if large[0].up:
        ups = [ffn.up.first(n) for ffn in large]
        _tune("listed", ops, x, ups, lambda w: ops.ffn_listed(x, scores, w, index, count))
    else:
        gates, few = [ffn.gate.first(n) for ffn in large], torch.where(chances >= 1 - _LISTED, scores, 0)
        _tune("listed", ops, x, gates, lambda w: ops.ffn_listed(x, w, None, index, count))
        _tune("s3", ops, few, downs, lambda w: ops.s3(few, w))
    _tune("down", ops, a, downs, lambda w: ops.down_listed(a, w, index, count))


def _tune(
    kernel: str, ops: ModuleType, x: torch.Tensor, rows: Sequence[Rows], call: Callable[[Rows], object]
) -> None:
    turn = cycle(rows)
    key = ops.shape_key(kernel, x, rows[0].data, rows[0].kind)
    tuning.tune(kernel, x.device, key, lambda: call(next(turn)))
