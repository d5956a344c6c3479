"""From a bundle and a budget to a plan, before any weight is read: sizes come from the GGUF file's header."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hotcold.convert.gguf_read import GGUFFile
from hotcold.runtime.placement import Costs, LayerLoad, Placement, Problem, format_bytes
from hotcold.runtime.shape import ModelShape

__all__ = ["make_problem", "part_bytes", "plan_table"]

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
    budget: int,
    costs: Costs,
) -> Problem:
    """The model of `file` as placement sees it. Without `frequencies`, every neuron is as frequent as any."""
    shape = ModelShape.read(file)
    if frequencies is None or mode == "dense":
        frequencies = [np.ones(shape.d_ff, np.float32)] * shape.n_layers
    by_layer = [_layer_bytes(file, i, mode) for i in range(shape.n_layers)]
    cache = 2 * _KV_BYTES * shape.n_kv_heads * shape.head_dim * n_ctx
    layers = [
        LayerLoad(frequency, -(-ffn // shape.d_ff), frame + cache, frame)
        for frequency, (ffn, frame) in zip(frequencies, by_layer, strict=True)
    ]
    outer = sum(tensor.data.nbytes for name, tensor in file.tensors.items() if not name.startswith("blk."))
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    tables = 2 * 4 * n_ctx * (shape.head_dim // 2)
    logits = 4 * shape.n_vocab
    fixed = outer + tables + logits + _ACTIVATIONS
    return Problem(layers, fixed, file.tensors[head].data.nbytes, budget, costs)


def _layer_bytes(file: GGUFFile, layer: int, mode: str) -> tuple[int, int]:
    """Bytes of a layer's neurons, and of all its other tensors that this mode reads."""
    ffn = frame = 0
    for name, tensor in file.tensors.items():
        if not name.startswith(f"blk.{layer}.") or _ROUTER in name:
            continue
        if any(part in name for part in (f".{part}" for part in _FFN)):
            ffn += tensor.data.nbytes
        elif mode == "predicted" or not name.endswith(("fc1.weight", "fc2.weight")):
            # Norms are kept in float32, whatever their type in the file.
            vector = len(tensor.shape) == 1
            frame += 4 * math.prod(tensor.shape) if vector else tensor.data.nbytes
    return ffn, frame


def part_bytes(file: GGUFFile) -> dict[str, int]:
    """Bytes of a file's tensors by part: attention, predictor, gate, up, down, head, other."""
    kinds = {"attn_": "attention", "fc": "predictor", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}
    sizes = dict.fromkeys([*kinds.values(), "head", "other"], 0)
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    for name, tensor in file.tensors.items():
        part = next((kind for start, kind in kinds.items() if f".{start}" in name), "other")
        is_vector = len(tensor.shape) == 1 or _ROUTER in name
        part = "head" if name == head else "other" if is_vector else part
        if name != "token_embd.weight" or part == "head":
            sizes[part] += tensor.data.nbytes
    return sizes


def plan_table(placement: Placement) -> str:
    """The plan for people: per layer where it lives, then the totals."""
    lines = ["layer  where   hot neurons   share  hit rate      device         CPU  expected ms"]
    for i, layer in enumerate(placement.layers):
        where = "device" if layer.on_device else "CPU"
        share = len(layer.hot) / layer.d_ff
        lines.append(
            f"{i:5d}  {where:<6}  {len(layer.hot):11d}  {share:6.1%}  {layer.hit_rate:8.1%}"
            f"  {format_bytes(layer.device_bytes):>10}  {format_bytes(layer.cpu_bytes):>10}"
            f"  {1e3 * layer.seconds:11.3f}"
        )
    neurons = sum(layer.d_ff for layer in placement.layers)
    hot = sum(len(layer.hot) for layer in placement.layers)
    lines.append(
        f"total: {hot / neurons:.1%} of neurons hot; {format_bytes(placement.device_bytes)} of a budget of "
        f"{format_bytes(placement.budget)} on the device, {format_bytes(placement.fixed_bytes)} of it fixed; "
        f"{placement.tokens_per_second:.1f} tokens/s expected ({placement.method})"
    )
    return "\n".join(lines)
