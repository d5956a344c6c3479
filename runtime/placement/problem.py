"""From a bundle and a budget to a plan, before weights are loaded: sizes come from the GGUF file's header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hotcold.files.gguf import GGUFFile
from hotcold.runtime.cpu.kept_types import kept_bytes
from hotcold.runtime.head import EMBEDDING, head_name
from hotcold.runtime.placement.devices import Fixed, fill
from hotcold.runtime.placement.plan import Costs, LayerLoad, Placement, Problem
from hotcold.runtime.shape import ModelShape
from hotcold.runtime.sizes import format_bytes

__all__ = ["make_problem", "part_bytes", "plan_table", "whole_model"]

_FFN = ("ffn_gate", "ffn_up", "ffn_down")
_ROUTER = "ffn_gate_inp"
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
    shape = ModelShape.read(file)
    if frequencies is None or mode == "dense":
        frequencies = [np.ones(shape.d_ff, np.float32)] * shape.n_layers
    by_layer = [_layer_bytes(file, i, mode) for i in range(shape.n_layers)]
    cache = _cache_bytes(shape, n_ctx)
    always = _gate_share(file) if mode == "exact" else 0.0
    layers = [
        LayerLoad(frequency, -(-ffn // shape.d_ff), frame + cache, frame, always)
        for frequency, (ffn, frame) in zip(frequencies, by_layer, strict=True)
    ]
    head = head_name(file)
    fixed = _fixed(file, shape, n_ctx, head)
    if head != EMBEDDING:  # the hybrid engine then has the embedding in main memory
        fixed = replace(fixed, first=fixed.first - _bytes_of(file, EMBEDDING))
    return Problem(layers, fixed, _bytes_of(file, head), tuple(budgets), costs)


def whole_model(file: GGUFFile, mode: str, n_ctx: int, budgets: Sequence[int]) -> list[int]:
    """The device of each layer if all of it is on one, from the first layer on as far as these bytes go.

    Raises UnsupportedError if not even embedding and head fit.
    """
    shape = ModelShape.read(file)
    cache = _cache_bytes(shape, n_ctx)
    sizes = [sum(_layer_bytes(file, i, mode)) + cache for i in range(shape.n_layers)]
    return fill(sizes, _fixed(file, shape, n_ctx, head_name(file)), budgets)[0]


def _cache_bytes(shape: ModelShape, n_ctx: int) -> int:
    """A layer's keys and values."""
    return 2 * _KV_BYTES * shape.n_kv_heads * shape.head_dim * n_ctx


def _fixed(file: GGUFFile, shape: ModelShape, n_ctx: int, head: str) -> Fixed:
    embedding = _bytes_of(file, EMBEDDING)
    tied = embedding if head == EMBEDDING else 0
    positions = _bytes_of(file, f"{shape.form.positions}.weight")
    norm, logits = 4 * shape.d_model, 4 * shape.n_vocab
    tables = 2 * 4 * n_ctx * (shape.head_dim // 2)
    return Fixed(embedding + positions, _bytes_of(file, head) + norm + logits, tables + _ACTIVATIONS, tied)


def _bytes_of(file: GGUFFile, name: str) -> int:
    """0 for a tensor that is missing: who reads it says so."""
    return kept_bytes(file.tensors[name]) if name in file.tensors else 0


def _gate_share(file: GGUFFile) -> float:
    """Of a neuron's bytes, those that tell whether it fires."""
    gate = _bytes_of(file, "blk.0.ffn_gate.weight") or _bytes_of(file, "blk.0.ffn_up.weight")
    return gate / max(_layer_bytes(file, 0, "exact")[0], 1)


def _layer_bytes(file: GGUFFile, layer: int, mode: str) -> tuple[int, int]:
    """Bytes of a layer's neurons, and of all its other tensors that this mode reads."""
    ffn = frame = 0
    for name, tensor in file.tensors.items():
        if not name.startswith(f"blk.{layer}.") or _ROUTER in name:
            continue
        if any(f".{part}" in name for part in _FFN) and not name.endswith("bias"):
            ffn += kept_bytes(tensor)
        elif mode == "predicted" or not name.endswith(("fc1.weight", "fc2.weight")):
            frame += kept_bytes(tensor)
    return ffn, frame


def part_bytes(file: GGUFFile) -> dict[str, int]:
    """Bytes of a model's weights by part: attention, predictor, gate, up, down, head, other.

    Without gates, what decides whether a neuron fires is in their place.
    """
    form = ModelShape.read(file).form
    kinds = {"attn_": "attention", "fc": "predictor", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}
    sizes = dict.fromkeys([*kinds.values(), "head", "other"], 0)
    head = head_name(file)
    for name, tensor in file.tensors.items():
        if name in (EMBEDDING, f"{form.positions}.weight", "output.weight") and name != head:
            continue  # of embeddings a row is read, of a copy nothing
        part = next((kind for start, kind in kinds.items() if f".{start}" in name), "other")
        part = "gate" if part == "up" and not form.gated else part
        is_vector = len(tensor.shape) == 1 or _ROUTER in name
        part = "head" if name == head else "other" if is_vector else part
        sizes[part] += kept_bytes(tensor)
    return sizes


def plan_table(placement: Placement) -> str:
    """The plan for people: per layer where it lives, then the totals."""
    lines = ["layer  where     hot neurons   share  hit rate      device         CPU  expected ms"]
    for i, layer in enumerate(placement.layers):
        where = f"device {layer.device}" if layer.on_device else "CPU"
        share = len(layer.hot) / layer.d_ff
        lines.append(
            f"{i:5d}  {where:<8}  {len(layer.hot):11d}  {share:6.1%}  {layer.hit_rate:8.1%}"
            f"  {format_bytes(layer.device_bytes):>10}  {format_bytes(layer.cpu_bytes):>10}"
            f"  {1e3 * layer.seconds:11.3f}"
        )
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
