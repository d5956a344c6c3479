"""Bring a model into the native engine: which slot goes into which layout, for which mode.

`dense` wants gate, up and down as panels (every row is read), `exact` the gates as a panel and the up and
down rows by neuron, `predicted` all three rows by neuron. Only one of these is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hotcold.convert.bundle.attention_rows import attention_rows
from hotcold.errors import UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model.spec import ModelSpec
from hotcold.model.tensors import PROJECTIONS, ROWS, parts_of
from hotcold.model.weights import KEPT, FileWeights, Packed
from hotcold.runtime.context import check_context
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.cpu.kept_types import kept_bytes, log_converted
from hotcold.runtime.predictors import read_predictors

__all__ = ["MODES", "load_layers", "load_model", "new_model"]

MODES = {"dense": 0, "exact": 1, "predicted": 2}


def load_model(
    file: GGUFFile,
    mode: str,
    n_threads: int,
    n_ctx: int,
    isa: str | None = None,
    attention: GGUFFile | None = None,
) -> tuple[_cpu.Model, ModelSpec]:
    """Pack the weights of `file` for `mode`; those of attention by input, where `attention` holds them so.

    Raises FormatError for missing tensors, ShapeError for wrong shapes, UnsupportedError for a model that the
    engine or this mode cannot run, InputError for more context than a model has learned positions for.
    """
    weights = FileWeights.read(file)
    by_input = None if attention is None else attention_rows(attention, weights)
    check_context(file, weights.spec, n_ctx)
    files = [part for part in (weights, by_input) if part is not None]
    try:
        model = new_model(weights.spec, [part.file for part in files], mode, n_threads, isa)
        _load_ends(model, weights)
        load_layers(model, weights, mode, range(weights.spec.n_layers), by_input)
        model.check()
    except ValueError as error:
        raise UnsupportedError(str(error), where=file.path) from error
    for part in files:
        log_converted(part.file, part.converted)
    return model, weights.spec


def new_model(
    spec: ModelSpec, files: Sequence[GGUFFile], mode: str, n_threads: int, isa: str | None = None
) -> _cpu.Model:
    """A model without weights, with room for those of the files. ValueError for what the engine cannot be."""
    tensors = [tensor for file in files for tensor in file.tensors.values()]
    return _cpu.Model(
        n_layers=spec.n_layers,
        d_model=spec.d_model,
        d_ff=spec.d_ff,
        n_heads=spec.n_heads,
        n_kv_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        n_vocab=spec.n_vocab,
        norm_eps=spec.norm_eps,
        value=spec.firing.rule.value,
        score=spec.firing.rule.score,
        mode=MODES[mode],
        threads=n_threads,
        # Address space, not memory: padding of narrow rows can quadruple a tensor.
        weight_bytes=4 * sum(map(kept_bytes, tensors)) + (64 << 20),
        isa=isa,
        layer_norm=spec.structure.layer_norm,
        parallel=spec.structure.parallel,
        gated=spec.structure.gated,
    )


def load_layers(
    model: _cpu.Model,
    weights: FileWeights,
    mode: str,
    layers: Sequence[int],
    by_input: FileWeights | None = None,
) -> None:
    """Pack all of these layers: attention (its matrices from `by_input`, if given), FFN and, in predicted
    mode, predictors."""
    _load_positions(model, weights)
    for layer in layers:
        model.set_window(layer, weights.spec.windows[layer])
        model.set_firing(layer, weights.spec.firing.kernel_thresholds(layer))
        _load_attention(model, weights, layer, by_input)
        _load_ffn(model, weights, layer, mode)
        weights.release()
        if by_input is not None:
            by_input.release()
    if mode == "predicted":
        _load_predictors(model, weights, layers)


def _set_panel(model: _cpu.Model, layer: int, slot: str, matrix: Packed) -> None:
    kind = KEPT.index(matrix.type)
    model.set_panel(layer, slot, kind, matrix.data, matrix.n, matrix.width, matrix.order)


def _load_vectors(model: _cpu.Model, weights: FileWeights, layer: int, slots: Sequence[str]) -> None:
    """The norms among these slots, and all biases."""
    for slot in slots:
        parts = parts_of(weights.spec, slot)
        for part in parts if slot.endswith("norm") else parts[1:]:
            name = slot if part == "weight" else f"{slot}_bias"
            model.set_vector(layer, name, weights.vector(slot, layer, part))


def _load_ends(model: _cpu.Model, weights: FileWeights) -> None:
    """Embedding and head, of which one copy in memory is enough, and the norm between."""
    _set_panel(model, 0, "embedding", weights.packed("embedding"))
    if weights.head_is_embedding():
        model.tie_head()
    else:
        _set_panel(model, 0, "head", weights.packed("head"))
    _load_vectors(model, weights, 0, ["output_norm"])


def _load_positions(model: _cpu.Model, weights: FileWeights) -> None:
    """Rotary frequencies, or the rows of the learned positions from that of position 0 on."""
    rope = weights.spec.rope
    model.set_rope(weights.spec.rope_frequencies, rope.attention_factor if rope else 1.0)
    if weights.spec.structure.learned_positions:
        _set_panel(model, 0, "positions", weights.packed("positions"))


def _load_attention(
    model: _cpu.Model, weights: FileWeights, layer: int, by_input: FileWeights | None
) -> None:
    head_norms = ["q_norm", "k_norm"] if weights.spec.structure.head_norm else []
    _load_vectors(model, weights, layer, ["attn_norm", "ffn_norm", *head_norms, *PROJECTIONS])
    if by_input is not None:
        return _load_attention_rows(model, by_input, layer)
    for slot in PROJECTIONS:
        _set_panel(model, layer, slot, weights.packed(slot, layer))


def _load_attention_rows(model: _cpu.Model, weights: FileWeights, layer: int) -> None:
    for group in (PROJECTIONS[:3], PROJECTIONS[3:]):
        rows = [weights.packed(slot + ROWS, layer) for slot in group]
        kinds = [KEPT.index(matrix.type) for matrix in rows]
        model.set_input_rows(layer, "".join(group), kinds, [matrix.data for matrix in rows])


def _load_ffn(model: _cpu.Model, weights: FileWeights, layer: int, mode: str) -> None:
    if weights.by_neuron == (mode == "dense"):
        form = "neuron rows" if weights.by_neuron else "a dense down matrix"
        raise UnsupportedError(f"{mode} mode cannot run a file with {form}", where=weights.path)
    up = weights.packed("up", layer) if weights.spec.structure.gated else None
    gate = weights.packed("gate", layer)
    _load_vectors(model, weights, layer, ["gate", "down"])
    if mode != "predicted":
        _set_panel(model, layer, "gate", gate)
    if mode == "dense":
        if up:
            _set_panel(model, layer, "up", up)
        return _set_panel(model, layer, "down", weights.packed("down", layer))
    rows = [gate if mode == "predicted" else None, up, weights.packed("down" + ROWS, layer)]
    kinds = [KEPT.index(matrix.type) if matrix else 0 for matrix in (gate, *rows[1:])]
    data = [matrix.data if matrix else None for matrix in rows]
    model.set_bundles(layer, data[0], kinds[0], data[1], kinds[1], data[2], kinds[2])


def _load_predictors(model: _cpu.Model, weights: FileWeights, layers: Sequence[int]) -> None:
    predictors = read_predictors(weights)
    for layer in layers:
        predictor = predictors[layer]
        _set_panel(model, layer, "fc1", predictor.fc1())
        _set_panel(model, layer, "fc2", predictor.fc2())
        if (bias := predictor.bias()) is not None:
            model.set_vector(layer, "fc2_bias", bias)
        kind = predictor.kind
        model.set_predictor(layer, threshold=predictor.threshold, relu=kind.relu, normed=kind.normed)
        bits = np.packbits(np.pad(predictor.hot, (0, -len(predictor.hot) % 16)), bitorder="little")
        model.set_hot(layer, bits.view("<u2").astype(np.uint16))
