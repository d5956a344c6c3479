"""A model's weights on a device, from a GGUF file: all layers or some in a row, all neurons or the hot ones.

Tensors are read one at a time; what a quantised type is decoded to, and when, is the operators' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hotcold.convert.gguf_read import GGUFFile
from hotcold.convert.quantize import dequantize
from hotcold.errors import FormatError, ShapeError, UnsupportedError
from hotcold.runtime.head import EMBEDDING, head_name
from hotcold.runtime.shape import ModelShape, activation_thresholds, read_predictors
from hotcold.runtime.triton.reference import PLAIN_RELU
from hotcold.runtime.triton.rows import Rows, joined

__all__ = ["DeviceFfn", "DeviceLayer", "DevicePredictor", "DeviceWeights", "read_weights"]

_KEPT = ("F32", "F16", "BF16", "Q8_0", "Q4_0")  # other types become F16


@dataclass(frozen=True, slots=True)
class DevicePredictor:
    """fc2's rows and `always` stand in the layer's order of neurons: hot ones first, then cold ones."""

    fc1: Rows  # [rank, d_model]
    fc2: Rows  # [d_ff, rank]
    threshold: float
    always: Tensor  # bool [d_ff]


@dataclass(frozen=True, slots=True)
class DeviceFfn:
    """The rows of the neurons on the device. In a dense file `down` is [d_model, d_ff], else [n, d_model]."""

    gate: Rows
    up: Rows
    down: Rows


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """One layer. Its neurons are numbered hot ones first; `n_hot` of them are on the device."""

    attn_norm: Tensor  # [d_model]
    ffn_norm: Tensor
    qkv: tuple[Rows, ...]  # q, k and v as one matrix, or apart where their types differ
    qkv_bias: Tensor | None
    o: Rows
    o_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim], of each head
    k_norm: Tensor | None
    window: int  # positions that a query sees; 0: all
    ffn: DeviceFfn | None  # None: all neurons are cold
    predictor: DevicePredictor | None
    firing: float  # a gate fires from this value on
    n_hot: int


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """What of a model is on one device: consecutive layers, the embedding before the first, the head last."""

    shape: ModelShape
    device: torch.device
    first: int  # number of the first of `layers` in the model
    layers: list[DeviceLayer]
    embedding: Rows | None  # [n_vocab, d_model]
    head: Rows | None
    output_norm: Tensor
    dense_file: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        head = None if self.head is self.embedding else self.head
        outer = [part for part in (self.embedding, head, self.output_norm) if part is not None]
        return sum(part.nbytes for part in outer) + sum(
            part.nbytes for layer in self.layers for part in _parts(layer)
        )


def _parts(layer: DeviceLayer) -> list[Rows | Tensor]:
    parts: list[Rows | Tensor] = [layer.attn_norm, layer.ffn_norm, *layer.qkv, layer.o]
    if layer.ffn:
        parts += [layer.ffn.gate, layer.ffn.up, layer.ffn.down]
    if layer.predictor:
        parts += [layer.predictor.fc1, layer.predictor.fc2, layer.predictor.always]
    return parts


class _Reader:
    """Tensors of a file, checked, on the device."""

    def __init__(self, file: GGUFFile, device: torch.device) -> None:
        self.file, self.device = file, device
        self._unread = set(file.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.file.tensors

    def vector(self, name: str, n: int) -> Tensor:
        values = dequantize(self._tensor(name, (n,))).reshape(n)
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def bias(self, name: str, n: int, order: np.ndarray | None = None) -> Tensor | None:
        """A vector that may be missing."""
        if name not in self:
            return None
        values = self.vector(name, n)
        return values if order is None else values[torch.from_numpy(order).to(self.device)]

    def rows(self, name: str, n: int, width: int, order: np.ndarray | None = None) -> Rows:
        """The matrix [n, width], or its rows `order`. A leading dimension of one expert is dropped."""
        return self.host_rows(name, n, width, order).to(self.device)

    def host_rows(self, name: str, n: int, width: int, order: np.ndarray | None = None) -> Rows:
        """The same in main memory."""
        tensor = self._tensor(name, (n, width))
        if tensor.type in _KEPT:
            rows = Rows.from_gguf(tensor.type, np.asarray(tensor.data), width)
        else:
            rows = Rows.of(torch.from_numpy(np.array(dequantize(tensor))).reshape(n, width).half())
        return rows if order is None else rows.take(torch.from_numpy(order.astype(np.int64)))

    def _tensor(self, name: str, shape: tuple[int, ...]) -> object:
        if name not in self.file.tensors:
            raise FormatError("missing tensor", where=self.file.path, field=name)
        self._unread.discard(name)
        tensor = self.file.tensors[name]
        if tuple(tensor.shape) not in (shape, (1, *shape)):
            raise ShapeError(f"tensor {name}", where=self.file.path, got=tensor.shape, expected=shape)
        return tensor

    def check_all_known(self, layers: range) -> None:
        """A tensor of a kind not read here (a bias, a norm of heads) means another function."""
        known = ("fc1.weight", "fc2.weight", "ffn_gate", "ffn_up", "ffn_down")
        outer = ("token_embd.weight", "output.weight", "rope_freqs.weight")
        left = sorted(
            name
            for name in self._unread.difference(outer)
            if (not name.startswith("blk.") or int(name.split(".")[1]) in layers)
            and (name.endswith(".bias") or not any(part in name for part in known))
        )
        if left:
            what = "the GPU backend does not know this kind of tensor"
            raise UnsupportedError(what, where=self.file.path, got=left[0], fix="use --backend cpu")


def read_weights(
    file: GGUFFile,
    device: torch.device,
    which: range | None = None,
    hot: Sequence[np.ndarray] | None = None,
    *,
    with_predictors: bool = False,
    with_head: bool = True,
) -> DeviceWeights:
    """Read the layers `which`, of all layers without it, with the neurons that `hot` names for each, or all.

    The embedding comes with the first layer. Raises FormatError, ShapeError or UnsupportedError for a file
    that this backend cannot run.
    """
    shape, reader = ModelShape.read(file), _Reader(file, device)
    _check_supported(file, shape)
    d, vocab = shape.d_model, shape.n_vocab
    dense_file = "blk.0.ffn_down_t.weight" not in reader
    which = range(shape.n_layers) if which is None else which
    orders = [None] * len(which) if hot is None else [_order(chosen, shape.d_ff) for chosen in hot]
    counts = [shape.d_ff] * len(which) if hot is None else [len(chosen) for chosen in hot]
    embedding = reader.rows("token_embd.weight", vocab, d) if not which.start else None
    head = None
    if with_head:
        name = head_name(file)
        shared = embedding if name == EMBEDDING else None
        head = shared or reader.rows(name, vocab, d)
    predictors = read_predictors(file, shape) if with_predictors else None
    firing = activation_thresholds(file, shape.n_layers)
    layers = [
        _read_layer(reader, shape, i, order, count, predictors, firing[i])
        for i, order, count in zip(which, orders, counts, strict=True)
    ]
    output_norm = reader.vector("output_norm.weight", d)
    reader.check_all_known(which)
    return DeviceWeights(shape, device, which.start, layers, embedding, head, output_norm, dense_file)


def _order(hot: np.ndarray, d_ff: int) -> np.ndarray:
    """All neurons of a layer, the hot ones first."""
    return np.concatenate([hot, np.setdiff1d(np.arange(d_ff, dtype=hot.dtype), hot)])


def _check_supported(file: GGUFFile, shape: ModelShape) -> None:
    """Gated FFNs after RMSNorms, one after the other, with rotary positions: Llama, Qwen, Mistral, Bamboo."""
    form = shape.form
    if form.layer_norm or form.parallel or form.positions or not form.gated:
        got = file.metadata["general.architecture"]
        what = "the GPU backend runs models with RMSNorm and gated FFNs only"
        raise UnsupportedError(what, where=file.path, got=got, fix="use --backend cpu")


def _read_layer(
    reader: _Reader,
    shape: ModelShape,
    i: int,
    order: np.ndarray | None,
    n_hot: int,
    predictors: list | None,
    firing: float,
) -> DeviceLayer:
    block, d = f"blk.{i}", shape.d_model
    return DeviceLayer(
        attn_norm=reader.vector(f"{block}.attn_norm.weight", d),
        ffn_norm=reader.vector(f"{block}.ffn_norm.weight", d),
        **_read_attention(reader, shape, block),
        window=shape.windows[i],
        ffn=_read_ffn(reader, shape, block, order, n_hot) if n_hot else None,
        predictor=_read_predictor(reader, shape, i, order, predictors[i]) if predictors else None,
        firing=max(firing, PLAIN_RELU),
        n_hot=n_hot,
    )


def _read_attention(reader: _Reader, shape: ModelShape, block: str) -> dict[str, object]:
    """The projections with their biases, and the norms of q's and k's heads."""
    qkv, qkv_bias = _read_qkv(reader, shape, block)
    norms = {
        f"{slot}_norm": reader.vector(f"{block}.attn_{slot}_norm.weight", shape.head_dim)
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


def _read_qkv(reader: _Reader, shape: ModelShape, block: str) -> tuple[tuple[Rows, ...], Tensor | None]:
    """The rows of q, k and v, one matrix where their types allow it, joined in main memory; their biases."""
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
    reader: _Reader, shape: ModelShape, block: str, order: np.ndarray | None, n_hot: int
) -> DeviceFfn:
    d, d_ff = shape.d_model, shape.d_ff
    if f"{block}.ffn_down_t.weight" in reader:
        kept = None if order is None else order[:n_hot]
        parts = {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down_t"}
        return DeviceFfn(
            **{part: reader.rows(f"{block}.{n}.weight", d_ff, d, kept) for part, n in parts.items()}
        )
    suffix = "_exps" if f"{block}.ffn_down_exps.weight" in reader else ""
    gate, up = (reader.rows(f"{block}.ffn_{part}{suffix}.weight", d_ff, d) for part in ("gate", "up"))
    return DeviceFfn(gate, up, reader.rows(f"{block}.ffn_down{suffix}.weight", d, d_ff))


def _read_predictor(
    reader: _Reader, shape: ModelShape, i: int, order: np.ndarray | None, known: object
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
