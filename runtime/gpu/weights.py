"""A model's weights on a device, from a GGUF file: all layers or some of them, all neurons or hot ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hotcold.errors import UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model.forms import Form
from hotcold.runtime.gpu.reader import Reader
from hotcold.runtime.head import EMBEDDING, head_name
from hotcold.runtime.shape import ModelShape, read_predictors
from hotcold.runtime.triton.firing import LayerRule
from hotcold.runtime.triton.rows import Rows, joined

__all__ = [
    "DeviceFfn",
    "DeviceLayer",
    "DeviceNorm",
    "DevicePredictor",
    "DeviceWeights",
    "host_embedding",
    "read_weights",
]


@dataclass(frozen=True, slots=True)
class DeviceNorm:
    """Of an RMSNorm, or with a bias of a LayerNorm; both [width]."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class DevicePredictor:
    """fc2's rows and `always` stand in the layer's order of neurons: hot ones first, then cold ones."""

    fc1: Rows  # [rank, d_model]
    fc2: Rows  # [d_ff, rank]
    threshold: float
    always: Tensor  # bool [d_ff]


@dataclass(frozen=True, slots=True)
class DeviceFfn:
    """The rows of the neurons on the device. In a dense file `down` is [d_model, d_ff], else [n, d_model].

    `gate` decides which neurons fire: in an FFN without gates it is the one matrix into it, and `up` is None.
    """

    gate: Rows
    up: Rows | None
    down: Rows
    gate_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """One layer. Its neurons are numbered hot ones first; `n_hot` of them are on the device."""

    attn_norm: DeviceNorm
    ffn_norm: DeviceNorm  # the same object where attention and FFN read one norm
    qkv: tuple[Rows, ...]  # q, k and v as one matrix, or apart where their types differ
    qkv_bias: Tensor | None
    o: Rows
    o_bias: Tensor | None
    q_norm: DeviceNorm | None  # of each head
    k_norm: DeviceNorm | None
    window: int  # positions that a query sees; 0: all
    ffn: DeviceFfn | None  # None: all neurons are cold
    down_bias: Tensor | None  # what the FFN adds beside its neurons, wherever they are
    predictor: DevicePredictor | None
    firing: LayerRule  # of the neurons on the device
    n_hot: int


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """What of a model is on one device: consecutive layers, the embedding before the first, the head last."""

    shape: ModelShape
    device: torch.device
    first: int  # number of the first of `layers` in the model
    layers: list[DeviceLayer]
    embedding: Rows | None  # [n_vocab, d_model]
    positions: Rows | None  # learned ones, from that of position 0 on; where the first layer is
    head: Rows | None
    output_norm: DeviceNorm
    dense_file: bool
    converted: set[str]  # types of the file that became F16

    @property
    def nbytes(self) -> int:
        """Bytes of all of it but biases."""
        head = None if self.head is self.embedding else self.head
        parts = [self.embedding, self.positions, head, self.output_norm.weight]
        for layer in self.layers:
            parts += _parts(layer)
        return sum(part.nbytes for part in parts if part is not None)


def _parts(layer: DeviceLayer) -> list[Rows | Tensor | None]:
    parts = [layer.attn_norm.weight, layer.ffn_norm.weight, *layer.qkv, layer.o]
    if layer.ffn:
        parts += [layer.ffn.gate, layer.ffn.up, layer.ffn.down]
    if layer.predictor:
        parts += [layer.predictor.fc1, layer.predictor.fc2, layer.predictor.always]
    return parts


def read_weights(
    file: GGUFFile,
    device: torch.device,
    which: range | None = None,
    hot: Sequence[np.ndarray] | None = None,
    *,
    with_predictors: bool = False,
    with_embedding: bool = True,
    with_head: bool = True,
) -> DeviceWeights:
    """Read the layers `which`, of all layers without it, with the neurons that `hot` names for each, or all.

    The embedding is for the first layer. Raises FormatError, ShapeError or UnsupportedError for a file
    that this backend cannot run.
    """
    shape, reader = ModelShape.read(file), Reader(file, device)
    d, vocab = shape.d_model, shape.n_vocab
    dense_file = "blk.0.ffn_down_t.weight" not in reader
    _check_supported(file, shape, dense_file)
    which = range(shape.n_layers) if which is None else which
    orders = [None] * len(which) if hot is None else [_order(chosen, shape.d_ff) for chosen in hot]
    counts = [shape.d_ff] * len(which) if hot is None else [len(chosen) for chosen in hot]
    embedding = reader.rows(EMBEDDING, vocab, d) if with_embedding and not which.start else None
    positions = _read_positions(reader, shape) if not which.start and shape.form.positions else None
    head = None
    if with_head:
        name = head_name(file)
        shared = embedding if name == EMBEDDING else None
        head = shared or reader.rows(name, vocab, d)
    predictors = read_predictors(file, shape) if with_predictors else None
    layers = [
        _read_layer(reader, shape, i, order, count, predictors)
        for i, order, count in zip(which, orders, counts, strict=True)
    ]
    output_norm = _norm(reader, "output_norm", d, shape.form)
    reader.check_all_known(which, shape.form)
    return DeviceWeights(
        shape,
        device,
        which.start,
        layers,
        embedding,
        positions,
        head,
        output_norm,
        dense_file,
        reader.converted,
    )


def host_embedding(file: GGUFFile, shape: ModelShape) -> Rows:
    """The embedding in main memory. Raises as `read_weights` does."""
    return Reader(file, torch.device("cpu")).rows(EMBEDDING, shape.n_vocab, shape.d_model)


def _order(hot: np.ndarray, d_ff: int) -> np.ndarray:
    """All neurons of a layer, the hot ones first."""
    return np.concatenate([hot, np.setdiff1d(np.arange(d_ff, dtype=hot.dtype), hot)])


def _check_supported(file: GGUFFile, shape: ModelShape, dense_file: bool) -> None:
    """Refuse what a file may say of a model, though none is like that, and the steps have no word for."""
    refused = {
        "SiLU and GELU models run in dense mode only": not shape.firing.gives_zeros and not dense_file,
        "heads of an odd width have no halves to turn": shape.head_dim % 2,
    }
    for what, is_so in refused.items():
        if is_so:
            raise UnsupportedError(what, where=file.path)


def _read_positions(reader: Reader, shape: ModelShape) -> Rows:
    """Learned ones, from that of position 0 on."""
    name, first = f"{shape.form.positions}.weight", shape.form.first_position
    n = reader.file.tensors[name].shape[0] if name in reader else 0
    return reader.rows(name, n, shape.d_model, np.arange(first, n))


def _read_layer(
    reader: Reader,
    shape: ModelShape,
    i: int,
    order: np.ndarray | None,
    n_hot: int,
    predictors: list | None,
) -> DeviceLayer:
    block = f"blk.{i}"
    return DeviceLayer(
        **_read_norms(reader, shape, block),
        **_read_attention(reader, shape, block),
        window=shape.windows[i],
        ffn=_read_ffn(reader, shape, block, order, n_hot) if n_hot else None,
        down_bias=None
        if shape.form.gated
        else reader.bias(f"{_down_name(reader, block)}.bias", shape.d_model),
        predictor=_read_predictor(reader, shape, i, order, predictors[i]) if predictors else None,
        firing=LayerRule.of(shape.firing, i, reader.device, None if order is None else order[:n_hot]),
        n_hot=n_hot,
    )


def _norm(reader: Reader, name: str, n: int, form: Form) -> DeviceNorm:
    bias = reader.vector(f"{name}.bias", n) if form.layer_norm else None
    return DeviceNorm(reader.vector(f"{name}.weight", n), bias)


def _read_norms(reader: Reader, shape: ModelShape, block: str) -> dict[str, DeviceNorm]:
    """Those before attention and FFN. Falcon's may be one; where they are two, `attn_norm` is the FFN's."""
    form, d = shape.form, shape.d_model
    norm = _norm(reader, f"{block}.attn_norm", d, form)
    if not form.parallel:
        return {"attn_norm": norm, "ffn_norm": _norm(reader, f"{block}.ffn_norm", d, form)}
    own = f"{block}.attn_norm_2"
    return {
        "attn_norm": _norm(reader, own, d, form) if f"{own}.weight" in reader else norm,
        "ffn_norm": norm,
    }


def _read_attention(reader: Reader, shape: ModelShape, block: str) -> dict[str, object]:
    """The projections with their biases, and the norms of q's and k's heads."""
    qkv, qkv_bias = _read_qkv(reader, shape, block)
    norms = {
        f"{slot}_norm": _norm(reader, f"{block}.attn_{slot}_norm", shape.head_dim, shape.form)
        if shape.form.head_norm
        else None
        for slot in ("q", "k")
    }
    return norms | {
        "qkv": qkv,
        "qkv_bias": qkv_bias,
        "o": reader.rows(f"{block}.attn_output.weight", shape.d_model, shape.n_heads * shape.head_dim),
        "o_bias": reader.bias(f"{block}.attn_output.bias", shape.d_model),
    }


def _read_qkv(reader: Reader, shape: ModelShape, block: str) -> tuple[tuple[Rows, ...], Tensor | None]:
    """The rows of q, k and v, one matrix where their types allow it, joined in main memory; their biases."""
    if shape.form.fused_qkv:
        name, n = f"{block}.attn_qkv", (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
        return (reader.rows(f"{name}.weight", n, shape.d_model),), reader.bias(f"{name}.bias", n)
    rows, biases = [], []
    for slot, n_heads in (("q", shape.n_heads), ("k", shape.n_kv_heads), ("v", shape.n_kv_heads)):
        name, n = f"{block}.attn_{slot}", n_heads * shape.head_dim
        order = _halves(n_heads, shape) if shape.form.interleaved and slot != "v" else None
        rows.append(reader.host_rows(f"{name}.weight", n, shape.d_model, order))
        biases.append(reader.bias(f"{name}.bias", n, order))
    has_bias = any(bias is not None for bias in biases)
    whole = [
        torch.zeros(part.n, device=reader.device) if bias is None else bias
        for part, bias in zip(rows, biases, strict=True)
    ]
    return tuple(part.to(reader.device) for part in joined(rows)), torch.cat(whole) if has_bias else None


def _halves(n_heads: int, shape: ModelShape) -> np.ndarray:
    """Rows of an interleaved q or k matrix in the order that puts each head's pairs half a head apart."""
    head = np.concatenate([np.arange(0, shape.head_dim, 2), np.arange(1, shape.head_dim, 2)])
    return (np.arange(n_heads)[:, None] * shape.head_dim + head).reshape(-1)


def _read_ffn(
    reader: Reader, shape: ModelShape, block: str, order: np.ndarray | None, n_hot: int
) -> DeviceFfn:
    d, d_ff = shape.d_model, shape.d_ff
    down = _down_name(reader, block)
    by_neuron, suffix = down.endswith("_t"), "_exps" if down.endswith("_exps") else ""
    kept = order[:n_hot] if by_neuron and order is not None else None
    down_rows = reader.rows(f"{down}.weight", *((d_ff, d) if by_neuron else (d, d_ff)), kept)
    up = reader.rows(f"{block}.ffn_up{suffix}.weight", d_ff, d, kept)
    if shape.form.gated:
        return DeviceFfn(reader.rows(f"{block}.ffn_gate{suffix}.weight", d_ff, d, kept), up, down_rows)
    return DeviceFfn(up, None, down_rows, reader.bias(f"{block}.ffn_up.bias", d_ff, kept))


def _down_name(reader: Reader, block: str) -> str:
    """Rows by neuron, the matrix of a mixture's only expert, or an ordinary one."""
    names = (f"{block}.ffn_down{kind}" for kind in ("_t", "_exps"))
    return next((name for name in names if f"{name}.weight" in reader), f"{block}.ffn_down")


def _read_predictor(
    reader: Reader, shape: ModelShape, i: int, order: np.ndarray | None, known: object
) -> DevicePredictor:
    if f"blk.{i}.fc1.weight" not in reader:
        raise UnsupportedError("no predictors in this file", where=reader.file.path, fix="use --mode exact")
    rank = reader.file.tensors[f"blk.{i}.fc1.weight"].shape[0]
    always = known.hot if order is None else known.hot[order]
    return DevicePredictor(
        fc1=reader.rows(f"blk.{i}.fc1.weight", rank, shape.d_model),
        fc2=reader.rows(f"blk.{i}.fc2.weight", shape.d_ff, rank, order),
        threshold=known.threshold,
        always=torch.from_numpy(always).to(reader.device),
    )
