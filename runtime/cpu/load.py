"""Bring a GGUF file into the native engine: which tensor goes into which layout, for which mode.

`dense` wants gate, up and down as panels (every row is read), `exact` the gates as a panel and the up and
down rows by neuron, `predicted` all three rows by neuron. Only one of these is ever held.

An FFN without a gate is `act(up x + bias)`: what decides whether a neuron fires is then up, and the engine
gets it in the gate's place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hotcold.convert.bundle.attention_rows import PROJECTIONS
from hotcold.errors import MismatchError, UnsupportedError
from hotcold.files.gguf import GGUFFile, Tensor
from hotcold.files.gguf_split import forget_pages
from hotcold.files.quantize import as_f16, dequantize
from hotcold.files.stored import check_stored
from hotcold.files.tensor_check import misshapen_tensor, missing_tensor, unexpected_tensors
from hotcold.finite import check_weight
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.cpu.kept_types import KEPT, kept_bytes, log_converted
from hotcold.runtime.head import EMBEDDING, head_name
from hotcold.runtime.shape import ModelShape, check_context, read_predictors

__all__ = ["MODES", "Source", "load_layers", "load_model", "new_model"]

MODES = {"dense": 0, "exact": 1, "predicted": 2}
_ALL = slice(None)


class Source:
    """Tensors of a file as the bytes that the engine packs."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.path = file, file.path
        self._unread = set(file.tensors)
        self.converted: set[str] = set()  # types that became F16

    def __contains__(self, name: str) -> bool:
        return name in self.file.tensors

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The tensor, after a check of its shape; a leading dimension of one (a single expert) is dropped."""
        if name not in self:
            raise missing_tensor(name, self.path)
        self._unread.discard(name)
        tensor = self.file.tensors[name]
        found = (
            tensor.shape[1:] if len(tensor.shape) == len(shape) + 1 and tensor.shape[0] == 1 else tensor.shape
        )
        if found != shape:
            raise misshapen_tensor(name, self.path, tensor.shape, shape)
        return tensor

    def vector(self, name: str, n: int) -> np.ndarray:
        """float32 [n]; FormatError unless all of it is finite."""
        return check_weight(dequantize(self.tensor(name, n)).reshape(n), name, self.path)

    def packable(self, name: str, rows: int, cols: int, part: slice = _ALL) -> tuple[int, np.ndarray]:
        """Type id and bytes of some of the rows; types that the engine has no kernels for become F16.

        FormatError unless all values are finite, and those that become F16 are so there.
        """
        tensor, kind = self.tensor(name, rows, cols), "F16"
        if tensor.type in KEPT:
            kind, values = tensor.type, tensor.data.reshape(rows, -1)[part]
        else:
            self.converted.add(tensor.type)
            values = as_f16(dequantize(tensor).reshape(rows, cols)[part])
        return KEPT.index(kind), check_stored(values, kind, name, self.path)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that may be missing: then ()."""
        return self.file.tensors[name].shape if name in self else ()

    def check_all_read(self, ignored: tuple[str, ...]) -> None:
        """An unused tensor (a bias, a rope table) means another function than the one computed here."""
        endings = tuple(f".{part}" for part in ignored)
        left = [name for name in self._unread if not f".{name}".endswith(endings)]
        if left:
            raise unexpected_tensors(left, self.path)


def _neox_order(n_heads: int, head_dim: int) -> np.ndarray:
    """Rows of an interleaved q or k matrix in the order that puts each head's pairs half a head apart."""
    head = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    return (np.arange(n_heads)[:, None] * head_dim + head).reshape(-1).astype(np.int32)


def load_model(
    file: GGUFFile,
    mode: str,
    n_threads: int,
    n_ctx: int,
    isa: str | None = None,
    attention: GGUFFile | None = None,
) -> tuple[_cpu.Model, ModelShape]:
    """Pack the weights of `file` for `mode`; those of attention by input, where `attention` holds them so.

    Raises FormatError for missing tensors, ShapeError for wrong shapes, UnsupportedError for a model that the
    engine or this mode cannot run, InputError for more context than a model has learned positions for.
    """
    shape = ModelShape.read(file)
    source = Source(file)
    by_input = None if attention is None else _attention_rows(attention, file)
    check_context(file, shape, n_ctx)
    try:
        model = new_model(file, shape, mode, n_threads, n_ctx, isa, attention)
        _load(model, source, file, shape, mode, by_input)
        model.check()
    except ValueError as error:
        raise UnsupportedError(str(error), where=file.path) from error
    for part in (source, by_input):
        if part is not None:
            log_converted(part.file, part.converted)
    return model, shape


def new_model(
    file: GGUFFile,
    shape: ModelShape,
    mode: str,
    n_threads: int,
    n_ctx: int,
    isa: str | None = None,
    attention: GGUFFile | None = None,
) -> _cpu.Model:
    """A model without weights, with room for those of the files. ValueError for what the engine cannot be."""
    tensors = [tensor for part in (file, attention) if part for tensor in part.tensors.values()]
    return _cpu.Model(
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        n_vocab=shape.n_vocab,
        n_ctx=n_ctx,
        norm_eps=shape.norm_eps,
        value=shape.firing.rule.value,
        score=shape.firing.rule.score,
        mode=MODES[mode],
        threads=n_threads,
        # Address space, not memory: padding of narrow rows can quadruple a tensor.
        weight_bytes=4 * sum(map(kept_bytes, tensors)) + (64 << 20),
        isa=isa,
        layer_norm=shape.form.layer_norm,
        parallel=shape.form.parallel,
        gated=shape.form.gated,
    )


def _load(
    model: _cpu.Model,
    source: Source,
    file: GGUFFile,
    shape: ModelShape,
    mode: str,
    by_input: Source | None,
) -> None:
    d, vocab = shape.d_model, shape.n_vocab
    model.set_panel(0, "embedding", *source.packable("token_embd.weight", vocab, d), vocab, d)
    if _head_is_embedding(source, vocab, d):
        model.tie_head()
    else:
        model.set_panel(0, "head", *source.packable("output.weight", vocab, d), vocab, d)
    _load_norm(model, source, shape, 0, "output_norm", "output_norm")
    load_layers(model, source, file, shape, mode, range(shape.n_layers), by_input)
    unread = ("fc1.weight", "fc2.weight", "ffn_gate_inp.weight", "rope_freqs.weight", "ffn_act.thresholds")
    if by_input is not None:
        unread += tuple(f"{name}.weight" for name in (*PROJECTIONS, "attn_qkv"))
        by_input.check_all_read(())
    source.check_all_read(unread)


def _attention_rows(attention: GGUFFile, file: GGUFFile) -> Source:
    """The file of attention matrices by input; MismatchError unless it is of the model of `file`."""
    key = "hotcold.model_fingerprint"
    got, expected = attention.find(key, str), file.find(key, str)
    if got != expected:
        fix = "export both together"
        raise MismatchError(
            "rows of another model", where=attention.path, got=got, expected=expected, fix=fix
        )
    return Source(attention)


def load_layers(
    model: _cpu.Model,
    source: Source,
    file: GGUFFile,
    shape: ModelShape,
    mode: str,
    layers: Sequence[int],
    by_input: Source | None = None,
) -> None:
    """Pack all of these layers: attention (its matrices from `by_input`, if given), FFN and, in predicted
    mode, predictors."""
    _load_positions(model, source, shape)
    for layer in layers:
        model.set_firing(layer, shape.firing.kernel_thresholds(layer))
        _load_attention(model, source, shape, layer, by_input)
        _load_ffn(model, source, shape, layer, mode)
        forget_pages(file)
        if by_input is not None:
            forget_pages(by_input.file)
    if mode == "predicted":
        _load_predictors(model, source, file, shape, layers)


def _head_is_embedding(source: Source, vocab: int, d: int) -> bool:
    """One copy in memory is enough."""
    if "output.weight" in source:
        source.tensor("output.weight", vocab, d)  # is read here, whether it is needed or not
    return head_name(source.file) == EMBEDDING


def _load_norm(
    model: _cpu.Model, source: Source, shape: ModelShape, layer: int, slot: str, name: str
) -> None:
    model.set_vector(layer, slot, source.vector(f"{name}.weight", shape.d_model))
    if shape.form.layer_norm:
        model.set_vector(layer, f"{slot}_bias", source.vector(f"{name}.bias", shape.d_model))


def _load_positions(model: _cpu.Model, source: Source, shape: ModelShape) -> None:
    """Rotary frequencies, or the rows of the learned positions from that of position 0 on."""
    model.set_rope(shape.rope_frequencies, shape.rope_scale)
    name, first, d = f"{shape.form.positions}.weight", shape.form.first_position, shape.d_model
    if shape.form.positions:
        rows = (source.shape_of(name) or (0,))[0]
        model.set_panel(0, "positions", *source.packable(name, rows, d, slice(first, None)), rows - first, d)


def _load_attention(
    model: _cpu.Model, source: Source, shape: ModelShape, layer: int, by_input: Source | None
) -> None:
    block, d = f"blk.{layer}", shape.d_model
    model.set_window(layer, shape.windows[layer])
    # llama.cpp's Falcon: attn_norm is that of the FFN, and of attention too unless this has its own
    own = "attn_norm_2" if f"{block}.attn_norm_2.weight" in source else "attn_norm"
    _load_norm(model, source, shape, layer, "attn_norm", f"{block}.{own}")
    second = "attn_norm" if shape.form.parallel else "ffn_norm"
    _load_norm(model, source, shape, layer, "ffn_norm", f"{block}.{second}")
    for slot in ("q", "k") if shape.form.head_norm else ():
        model.set_vector(
            layer, f"{slot}_norm", source.vector(f"{block}.attn_{slot}_norm.weight", shape.head_dim)
        )
    for slot in ("q", "k", "v"):
        _load_projection(model, source, shape, layer, slot, bias_only=by_input is not None)
    _load_bias(model, source, layer, "o_bias", f"{block}.attn_output", d)
    if by_input is not None:
        return _load_attention_rows(model, by_input, shape, layer)
    cols = shape.n_heads * shape.head_dim
    model.set_panel(layer, "o", *source.packable(f"{block}.attn_output.weight", d, cols), d, cols)


def _load_attention_rows(model: _cpu.Model, source: Source, shape: ModelShape, layer: int) -> None:
    d, q, kv = shape.d_model, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    groups = {"qkv": {"attn_q": (d, q), "attn_k": (d, kv), "attn_v": (d, kv)}, "o": {"attn_output": (q, d)}}
    for slot, matrices in groups.items():
        rows = [source.packable(f"blk.{layer}.{name}_t.weight", *size) for name, size in matrices.items()]
        model.set_input_rows(layer, slot, [kind for kind, _ in rows], [data for _, data in rows])


def _load_projection(
    model: _cpu.Model, source: Source, shape: ModelShape, layer: int, slot: str, *, bias_only: bool
) -> None:
    """q, k or v, which may be rows of one fused matrix."""
    heads = {"q": shape.n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads}
    rows, all_rows = heads[slot] * shape.head_dim, sum(heads.values()) * shape.head_dim
    name, total, part = f"blk.{layer}.attn_{slot}", rows, slice(0, rows)
    if shape.form.fused_qkv:
        first = {"q": 0, "k": all_rows - 2 * rows, "v": all_rows - rows}[slot]
        name, total, part = f"blk.{layer}.attn_qkv", all_rows, slice(first, first + rows)
    interleaved = shape.form.interleaved and slot != "v"
    order = _neox_order(heads[slot], shape.head_dim) if interleaved else None
    if not bias_only:
        weight = source.packable(f"{name}.weight", total, shape.d_model, part)
        model.set_panel(layer, slot, *weight, rows, shape.d_model, order)
    if f"{name}.bias" in source:
        bias = source.vector(f"{name}.bias", total)[part]
        model.set_vector(layer, f"{slot}_bias", bias if order is None else bias[order])


def _load_bias(model: _cpu.Model, source: Source, layer: int, slot: str, name: str, n: int) -> None:
    if f"{name}.bias" in source:
        model.set_vector(layer, slot, source.vector(f"{name}.bias", n))


def _load_ffn(model: _cpu.Model, source: Source, shape: ModelShape, layer: int, mode: str) -> None:
    block, d, d_ff = f"blk.{layer}", shape.d_model, shape.d_ff
    sparse_form = f"{block}.ffn_down_t.weight" in source
    if sparse_form == (mode == "dense"):
        form = "neuron rows" if sparse_form else "a dense down matrix"
        raise UnsupportedError(f"{mode} mode cannot run a file with {form}", where=source.path)
    suffix = "_exps" if shape.form.experts else ""
    up = source.packable(f"{block}.ffn_up{suffix}.weight", d_ff, d)
    gate, up = (
        (source.packable(f"{block}.ffn_gate{suffix}.weight", d_ff, d), up) if shape.form.gated else (up, None)
    )
    if not shape.form.gated:
        _load_bias(model, source, layer, "gate_bias", f"{block}.ffn_up", d_ff)
    down_name = f"{block}.ffn_down_t" if sparse_form else f"{block}.ffn_down{suffix}"
    _load_bias(model, source, layer, "down_bias", down_name, d)
    if mode != "predicted":
        model.set_panel(layer, "gate", *gate, d_ff, d)
    if mode == "dense":
        if up:
            model.set_panel(layer, "up", *up, d_ff, d)
        model.set_panel(layer, "down", *source.packable(f"{down_name}.weight", d, d_ff), d, d_ff)
        return
    down = source.packable(f"{down_name}.weight", d_ff, d)
    rows = gate if mode == "predicted" else (gate[0], None)
    model.set_bundles(layer, rows[1], rows[0], up and up[1], up[0] if up else 0, down[1], down[0])


def _load_predictors(
    model: _cpu.Model, source: Source, file: GGUFFile, shape: ModelShape, layers: Sequence[int]
) -> None:
    if "blk.0.fc1.weight" not in source:
        raise UnsupportedError("no predictors in this file", where=file.path, fix="use --mode exact")
    predictors = read_predictors(file, shape)
    for layer in layers:
        predictor = predictors[layer]
        rank = file.tensors[f"blk.{layer}.fc1.weight"].shape[0] if f"blk.{layer}.fc1.weight" in source else 0
        model.set_panel(
            layer,
            "fc1",
            *source.packable(f"blk.{layer}.fc1.weight", rank, shape.d_model),
            rank,
            shape.d_model,
        )
        model.set_panel(
            layer, "fc2", *source.packable(f"blk.{layer}.fc2.weight", shape.d_ff, rank), shape.d_ff, rank
        )
        model.set_predictor_threshold(layer, predictor.threshold)
        bits = np.packbits(np.pad(predictor.hot, (0, -shape.d_ff % 16)), bitorder="little")
        model.set_hot(layer, bits.view("<u2").astype(np.uint16))
