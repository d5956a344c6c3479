"""From a bundle and a budget to a plan, before weights are loaded: sizes come from the GGUF file's header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hotcold.files.gguf import GGUFFile
from hotcold.model.spec import ModelSpec
from hotcold.model.tensors import ROWS
from hotcold.model.weights import FileWeights, end_names
from hotcold.runtime.cpu.kept_types import kept_bytes
from hotcold.runtime.placement.devices import Fixed, fill
from hotcold.runtime.placement.plan import Costs, LayerLoad, Placement, Problem
from hotcold.runtime.sizes import format_bytes
from hotcold.table import columns

__all__ = ["make_problem", "part_bytes", "plan_table", "whole_model"]

_PARTS = dict.fromkeys("qkvo", "attention") | {
    "fc1": "predictor",
    "fc2": "predictor",
    "gate": "gate",
    "up": "up",
}
_PARTS |= {"down": "down", "down_rows": "down"}
_FFN = ("gate", "up", "down")
_ACTIVATIONS = 64 << 20  # what a block of tokens needs beside the weights
_KV_BYTES = 2


def make_problem(
    file: GGUFFile,
    frequencies: Sequence[np.ndarray] | None,
    *,
    mode: str,
    n_ctx: int,
    budgets: Sequence[int],
    costs: Costs,
) -> Problem:
    """The model of `file` as placement sees it. Without `frequencies`, every neuron is as frequent as any."""
    weights = FileWeights.read(file)
    shape = weights.spec
    if frequencies is None or mode == "dense":
        frequencies = [np.ones(shape.d_ff, np.float32)] * shape.n_layers
    by_layer = _layer_bytes(weights, mode)
    cache = _cache_bytes(shape, n_ctx)
    always = _gate_share(weights) if mode == "exact" else 0.0
    layers = [
        LayerLoad(frequency, -(-ffn // shape.d_ff), frame + cache, frame, always)
        for frequency, (ffn, frame) in zip(frequencies, by_layer, strict=True)
    ]
    embedding, head = end_names(file)
    fixed = _fixed(file, shape, n_ctx, head)
    if head != embedding:  # the hybrid engine then has the embedding in main memory
        fixed = replace(fixed, first=fixed.first - _bytes_of(file, embedding))
    return Problem(layers, fixed, _bytes_of(file, head), tuple(budgets), costs)


def whole_model(file: GGUFFile, mode: str, n_ctx: int, budgets: Sequence[int]) -> list[int]:
    """The device of each layer if all of it is on one, from the first layer on as far as these bytes go.

    Raises UnsupportedError if not even embedding and head fit.
    """
    weights = FileWeights.read(file)
    cache = _cache_bytes(weights.spec, n_ctx)
    sizes = [sum(sizes) + cache for sizes in _layer_bytes(weights, mode)]
    return fill(sizes, _fixed(file, weights.spec, n_ctx, end_names(file)[1]), budgets)[0]


def _cache_bytes(shape: ModelSpec, n_ctx: int) -> int:
    """A layer's keys and values."""
    return 2 * _KV_BYTES * shape.n_kv_heads * shape.head_dim * n_ctx


def _fixed(file: GGUFFile, shape: ModelSpec, n_ctx: int, head: str) -> Fixed:
    name, _ = end_names(file)
    embedding = _bytes_of(file, name)
    tied = embedding if head == name else 0
    positions = (
        kept_bytes(FileWeights.read(file).tensor("positions")) if shape.structure.learned_positions else 0
    )
    norm, logits = 4 * shape.d_model, 4 * shape.n_vocab
    tables = 2 * 4 * n_ctx * (shape.head_dim // 2)
    return Fixed(embedding + positions, _bytes_of(file, head) + norm + logits, tables + _ACTIVATIONS, tied)


def _bytes_of(file: GGUFFile, name: str) -> int:
    """0 for a tensor that is missing: who reads it says so."""
    return kept_bytes(file.tensors[name]) if name in file.tensors else 0


def _gate_share(weights: FileWeights) -> float:
    """Of a neuron's bytes, those that tell whether it fires."""
    return kept_bytes(weights.tensor("gate")) / max(_layer_bytes(weights, "exact")[0][0], 1)


def _layer_bytes(weights: FileWeights, mode: str) -> list[tuple[int, int]]:
    """Of each layer, bytes of its neurons, and of all its other tensors that this mode reads."""
    sizes = np.zeros((weights.spec.n_layers, 2), np.int64)
    for name, (slot, layer, part) in weights.stored_names(with_predictors=mode == "predicted").items():
        if "{}" in weights.naming.names[slot.removesuffix(ROWS)]:
            of_frame = _PARTS.get(slot) not in _FFN or part == "bias"
            sizes[layer, int(of_frame)] += kept_bytes(weights.file.tensors[name])
    return [(ffn, frame) for ffn, frame in sizes.tolist()]


def part_bytes(file: GGUFFile) -> dict[str, int]:
    """Bytes of a model's weights by part: attention, predictor, gate, up, down, head, other.

    Without gates, what decides whether a neuron fires is in their place.
    """
    sizes = dict.fromkeys(["attention", "predictor", *_FFN, "head", "other"], 0)
    (_, head), slots = end_names(file), FileWeights.read(file).stored_names(with_predictors=True)
    for name, tensor in file.tensors.items():
        slot, _, part = slots.get(name, ("", 0, ""))
        if slot in ("embedding", "positions", "head") and name != head:
            continue  # of embeddings a row is read, of a copy nothing
        is_other = part == "bias" and slot != "fc2"
        kind = "head" if name == head else "other" if is_other else _PARTS.get(slot, "other")
        sizes[kind] += kept_bytes(tensor)
    return sizes


def plan_table(placement: Placement) -> str:
    """The plan for people: per layer where it lives, then the totals."""
    rows = []
    for i, layer in enumerate(placement.layers):
        where = f"device {layer.device}" if layer.on_device else "CPU"
        share = len(layer.hot) / layer.d_ff
        rows.append(
            (
                str(i),
                where,
                str(len(layer.hot)),
                f"{share:.1%}",
                f"{layer.hit_rate:.1%}",
                format_bytes(layer.device_bytes),
                format_bytes(layer.cpu_bytes),
                f"{1e3 * layer.seconds:.3f}",
            )
        )
    head = ("layer", "where", "hot neurons", "share", "hit rate", "device", "CPU", "expected ms")
    lines = [columns(head, rows, left=(1,))]
    neurons = sum(layer.d_ff for layer in placement.layers)
    hot = sum(len(layer.hot) for layer in placement.layers)
    for device, sizes in enumerate(zip(placement.budgets, placement.fixed, strict=True)):
        taken, budget, fixed = map(format_bytes, (placement.bytes_on(device), *sizes))
        lines.append(f"device {device}: {taken} of a budget of {budget}, {fixed} of it fixed")
    lines.append(
        f"total: {hot / neurons:.1%} of neurons hot; "
        f"{placement.tokens_per_second:.1f} tokens/s expected ({placement.method})"
    )
    return "\n".join(lines)
