"""Bring a GGUF file into the native engine: which tensor goes into which layout, for which mode.

`dense` wants gate, up and down as panels (every row is read), `exact` the gates as a panel and the up and
down rows by neuron, `predicted` all three rows by neuron. Only one of these is ever held.
"""

from __future__ import annotations

import math
import mmap

import numpy as np

from hotcold.convert.gguf_read import GGUFFile, Tensor
from hotcold.convert.quantize import dequantize
from hotcold.errors import FormatError, ShapeError, UnsupportedError
from hotcold.progress import log
from hotcold.runtime import _cpu
from hotcold.runtime.shape import ModelShape, activation_thresholds, read_predictors

__all__ = ["MODES", "load_model"]

MODES = {"dense": 0, "exact": 1, "predicted": 2}
TYPES = {"F32": 0, "F16": 1, "BF16": 2, "Q8_0": 3, "Q4_0": 4}
ACTIVATIONS = {"silu": 0, "relu": 1, "fatrelu": 1, "drelu": 2}


class _Source:
    """Tensors of a file as the bytes that the engine packs."""

    def __init__(self, file: GGUFFile) -> None:
        self._file, self.path = file, file.path
        self._unread = set(file.tensors)
        self.converted: set[str] = set()  # types that became F16

    def __contains__(self, name: str) -> bool:
        return name in self._file.tensors

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The tensor, after a check of its shape; a leading dimension of one (a single expert) is dropped."""
        if name not in self:
            raise FormatError("missing tensor", where=self._file.path, field=name)
        self._unread.discard(name)
        tensor = self._file.tensors[name]
        found = (
            tensor.shape[1:] if len(tensor.shape) == len(shape) + 1 and tensor.shape[0] == 1 else tensor.shape
        )
        if found != shape:
            raise ShapeError(f"tensor {name}", where=self._file.path, got=tensor.shape, expected=shape)
        return tensor

    def vector(self, name: str, n: int) -> np.ndarray:
        return dequantize(self.tensor(name, n)).reshape(n)

    def packable(self, name: str, rows: int, cols: int) -> tuple[int, np.ndarray]:
        """Type id and bytes; types that the engine has no kernels for become F16."""
        tensor = self.tensor(name, rows, cols)
        if tensor.type in TYPES:
            return TYPES[tensor.type], tensor.data.reshape(-1)
        self.converted.add(tensor.type)
        values = dequantize(tensor).reshape(rows, cols)
        return TYPES["F16"], np.ascontiguousarray(values.astype(np.float16)).view(np.uint8).reshape(-1)

    def check_all_read(self, ignored: tuple[str, ...]) -> None:
        """An unused tensor (a bias, a rope table) means another function than the one computed here."""
        left = sorted(name for name in self._unread if not any(part in name for part in ignored))
        if left:
            raise UnsupportedError(
                "the model has tensors of an unknown kind", where=self._file.path, got=left[0]
            )


def _neox_order(n_heads: int, head_dim: int) -> np.ndarray:
    """Rows of an interleaved q or k matrix in the order that puts each head's pairs half a head apart."""
    head = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    return (np.arange(n_heads)[:, None] * head_dim + head).reshape(-1).astype(np.int32)


def load_model(
    file: GGUFFile, mode: str, n_threads: int, n_ctx: int, isa: str | None = None
) -> tuple[_cpu.Model, ModelShape]:
    """Pack the weights of `file` for `mode`.

    Raises FormatError for missing tensors, ShapeError for wrong shapes, UnsupportedError for a model that the
    engine or this mode cannot run.
    """
    shape = ModelShape.read(file)
    source = _Source(file)
    try:
        model = _cpu.Model(
            n_layers=shape.n_layers,
            d_model=shape.d_model,
            d_ff=shape.d_ff,
            n_heads=shape.n_heads,
            n_kv_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            n_vocab=shape.n_vocab,
            n_ctx=n_ctx,
            norm_eps=shape.norm_eps,
            activation=ACTIVATIONS[shape.activation],
            mode=MODES[mode],
            threads=n_threads,
            # Address space, not memory: padding of narrow rows can quadruple a tensor.
            weight_bytes=4 * sum(map(_engine_bytes, file.tensors.values())) + (64 << 20),
            isa=isa,
        )
        _load(model, source, file, shape, mode)
        model.check()
    except ValueError as error:
        raise UnsupportedError(str(error), where=file.path) from error
    if source.converted:
        log(f"{file.path.name}: {', '.join(sorted(source.converted))} became F16, for want of kernels")
    return model, shape


def _engine_bytes(tensor: Tensor) -> int:
    return tensor.data.nbytes if tensor.type in TYPES else 2 * math.prod(tensor.shape)


def _load(model: _cpu.Model, source: _Source, file: GGUFFile, shape: ModelShape, mode: str) -> None:
    d, vocab = shape.d_model, shape.n_vocab
    model.set_panel(0, "embedding", *source.packable("token_embd.weight", vocab, d), vocab, d)
    if _head_is_embedding(source, vocab, d):
        model.tie_head()
    else:
        model.set_panel(0, "head", *source.packable("output.weight", vocab, d), vocab, d)
    model.set_vector(0, "output_norm", source.vector("output_norm.weight", d))
    half = shape.head_dim // 2
    model.set_rope((float(shape.rope_base) ** (-np.arange(half, dtype=np.float64) / half)).astype(np.float32))
    for layer, threshold in enumerate(activation_thresholds(file, shape.n_layers)):
        model.set_activation_threshold(layer, threshold)
        _load_attention(model, source, shape, layer)
        _load_ffn(model, source, shape, layer, mode)
        _forget_pages(file)
    if mode == "predicted":
        _load_predictors(model, source, file, shape)
    source.check_all_read(("fc1.weight", "fc2.weight", "ffn_gate_inp.weight"))


def _head_is_embedding(source: _Source, vocab: int, d: int) -> bool:
    """PowerInfer's form always has output.weight, for tied models too: one copy in memory is enough."""
    if "output.weight" not in source:
        return True
    head, embedding = source.tensor("output.weight", vocab, d), source.tensor("token_embd.weight", vocab, d)
    return head.type == embedding.type and np.array_equal(head.data, embedding.data)


def _load_attention(model: _cpu.Model, source: _Source, shape: ModelShape, layer: int) -> None:
    block, d = f"blk.{layer}", shape.d_model
    heads = {"q": shape.n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads}
    for slot, n in heads.items():
        rows = n * shape.head_dim
        order = _neox_order(n, shape.head_dim) if shape.interleaved_rope and slot != "v" else None
        model.set_panel(layer, slot, *source.packable(f"{block}.attn_{slot}.weight", rows, d), rows, d, order)
    cols = shape.n_heads * shape.head_dim
    model.set_panel(layer, "o", *source.packable(f"{block}.attn_output.weight", d, cols), d, cols)
    for norm in ("attn_norm", "ffn_norm"):
        model.set_vector(layer, norm, source.vector(f"{block}.{norm}.weight", d))


def _load_ffn(model: _cpu.Model, source: _Source, shape: ModelShape, layer: int, mode: str) -> None:
    block, d, d_ff = f"blk.{layer}", shape.d_model, shape.d_ff
    sparse_form = f"{block}.ffn_down_t.weight" in source
    if sparse_form == (mode == "dense"):
        form = "neuron rows" if sparse_form else "a dense down matrix"
        raise UnsupportedError(f"{mode} mode cannot run a file with {form}", where=source.path)
    suffix = "_exps" if f"{block}.ffn_down_exps.weight" in source else ""
    gate = source.packable(f"{block}.ffn_gate{suffix}.weight", d_ff, d)
    up = source.packable(f"{block}.ffn_up{suffix}.weight", d_ff, d)
    if mode == "dense":
        model.set_panel(layer, "gate", *gate, d_ff, d)
        model.set_panel(layer, "up", *up, d_ff, d)
        model.set_panel(layer, "down", *source.packable(f"{block}.ffn_down{suffix}.weight", d, d_ff), d, d_ff)
        return
    down = source.packable(f"{block}.ffn_down_t.weight", d_ff, d)
    if mode == "exact":
        model.set_panel(layer, "gate", *gate, d_ff, d)
    model.set_bundles(
        layer, gate[1] if mode == "predicted" else None, gate[0], up[1], up[0], down[1], down[0]
    )


def _load_predictors(model: _cpu.Model, source: _Source, file: GGUFFile, shape: ModelShape) -> None:
    if "blk.0.fc1.weight" not in source:
        raise UnsupportedError("no predictors in this file", where=file.path, fix="use --mode exact")
    for layer, predictor in enumerate(read_predictors(file, shape)):
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


def _forget_pages(file: GGUFFile) -> None:
    """Let go of the file's pages that were packed, so that the model is not in memory twice."""
    if isinstance(file.buffer, mmap.mmap):
        file.buffer.madvise(mmap.MADV_DONTNEED)
