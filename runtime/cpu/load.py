"""Bring a model into the native engine: which slot goes into which layout, for which mode.

`dense` wants gate, up and down as panels (every row is read), `exact` the gates as a panel and the up and
down rows by neuron, `predicted` all three rows by neuron. Only one of these is ever held.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from hotcold.convert.bundle.input_rows import input_rows, sites_by_input
from hotcold.errors import UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model.inputs import SITES, least_inputs, site_slots
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
    by_input: GGUFFile | None = None,
) -> tuple[_cpu.Model, ModelSpec]:
    """Pack the weights of `file` for `mode`; those that are read by input from `by_input`.

    Raises FormatError for missing tensors, ShapeError for wrong shapes, UnsupportedError for a model that the
    engine or this mode cannot run, InputError for more context than a model has learned positions for.
    """
    weights = FileWeights.read(file)
    rows = None if by_input is None else input_rows(by_input, weights)
    check_context(file, weights.spec, n_ctx)
    files = [part for part in (weights, rows) if part is not None]
    try:
        model = new_model(weights.spec, [part.file for part in files], mode, n_threads, isa)
        _load_ends(model, weights)
        load_layers(model, weights, mode, range(weights.spec.n_layers), rows)
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
    """Pack all of these layers: attention, FFN and, in predicted mode, predictors; from `by_input` what this
    has of their matrices."""
    held = () if by_input is None else _held(by_input.spec, mode)
    by_output = {slot for site in SITES if site not in held for slot in SITES[site]}
    _load_positions(model, weights)
    _load_input_rules(model, weights, layers)
    for layer in layers:
        model.set_window(layer, weights.spec.windows[layer])
        model.set_firing(layer, weights.spec.firing.kernel_thresholds(layer))
        _load_attention(model, weights, layer, by_output)
        _load_ffn(model, weights, layer, mode, by_output)
        weights.release()
        if by_input is not None:
            _load_input_rows(model, by_input, layer, held, mode)
            by_input.release()
    if mode == "predicted":
        _load_predictors(model, weights, layers)


def _held(spec: ModelSpec, mode: str) -> tuple[str, ...]:
    """The sites whose matrices a mode reads by input, of those that the file by input has.

    Neurons that are listed are held by neuron, with their down rows.
    """
    by_neuron = {"dense": (), "exact": ("down",), "predicted": ("gate_up", "down")}[mode]
    return tuple(site for site in sites_by_input(spec) if site not in by_neuron)


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


def _load_input_rules(model: _cpu.Model, weights: FileWeights, layers: Sequence[int]) -> None:
    for site, least in least_inputs(weights.file, weights.spec).items():
        for layer in layers:
            model.set_least_inputs(layer, site, least[layer])


def _load_input_rows(
    model: _cpu.Model, weights: FileWeights, layer: int, held: Sequence[str], mode: str
) -> None:
    """The matrices of the sites that are held by input. Beside the gates of exact mode, ups are by neuron."""
    for site in held:
        slots = [slot for slot in site_slots(weights.spec, site) if slot != "up" or mode == "dense"]
        rows = [weights.packed(slot + ROWS, layer) for slot in slots]
        model.set_input_rows(
            layer, site, [KEPT.index(matrix.type) for matrix in rows], [matrix.data for matrix in rows]
        )


def _load_attention(model: _cpu.Model, weights: FileWeights, layer: int, by_output: Collection[str]) -> None:
    head_norms = ["q_norm", "k_norm"] if weights.spec.structure.head_norm else []
    _load_vectors(model, weights, layer, ["attn_norm", "ffn_norm", *head_norms, *PROJECTIONS])
    for slot in PROJECTIONS:
        if slot in by_output:
            _set_panel(model, layer, slot, weights.packed(slot, layer))


def _load_ffn(
    model: _cpu.Model, weights: FileWeights, layer: int, mode: str, by_output: Collection[str]
) -> None:
    if weights.by_neuron == (mode == "dense"):
        form = "neuron rows" if weights.by_neuron else "a dense down matrix"
        raise UnsupportedError(f"{mode} mode cannot run a file with {form}", where=weights.path)
    _load_vectors(model, weights, layer, ["gate", "down"])
    gated, panels = weights.spec.structure.gated, {"dense": ("gate", "up", "down"), "exact": ("gate",)}
    for slot in panels.get(mode, ()):
        if slot in by_output and (gated or slot != "up"):
            _set_panel(model, layer, slot, weights.packed(slot, layer))
    if mode == "dense":
        return
    slots = ("gate" if mode == "predicted" else None, "up" if gated else None, "down" + ROWS)
    rows: list[object] = []
    for slot in slots:
        matrix = weights.packed(slot, layer) if slot else None
        rows += [matrix.data, KEPT.index(matrix.type)] if matrix else [None, 0]
    model.set_bundles(layer, *rows)


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
