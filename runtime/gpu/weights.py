"""A model's weights on a device, from a GGUF file: all layers or some of them, all neurons or hot ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hotcold.errors import UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model.inputs import least_inputs
from hotcold.model.spec import ModelSpec
from hotcold.model.tensors import PROJECTIONS, ROWS
from hotcold.model.weights import FileWeights, Packed
from hotcold.runtime.predictors import Predictor, read_predictors
from hotcold.runtime.triton.firing import LayerRule
from hotcold.runtime.triton.rows import Rows, joined

__all__ = [
    "DeviceFfn",
    "DeviceLayer",
    "DeviceNorm",
    "DevicePredictor",
    "DeviceWeights",
    "host_embedding",
    "read_shape",
    "read_weights",
]


@dataclass(frozen=True, slots=True)
class DeviceNorm:
    """Of an RMSNorm, or with a bias of a LayerNorm; both [width]."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class DevicePredictor:
    """fc2's rows, bias and `always` stand in the layer's order of neurons: hot ones first, then cold ones.

    What the scores are: `hotcold.predictor.kinds.table.Kind`.
    """

    fc1: Rows  # [rank, d_model]
    fc2: Rows  # [d_ff, rank]
    bias: Tensor | None  # [d_ff]
    relu: bool
    normed: bool
    threshold: float
    always: Tensor  # bool [d_ff]

    @property
    def bytes_read(self) -> int:
        """Bytes that every predicted token reads of it."""
        return self.fc1.nbytes + self.fc2.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def input(self, x: Tensor, h: Tensor) -> Tensor:
        """What it reads, of the residual stream x and its norm h."""
        return h if self.normed else x


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

    shape: ModelSpec
    device: torch.device
    first: int  # number of the first of `layers` in the model
    layers: list[DeviceLayer]
    embedding: Rows | None  # [n_vocab, d_model]
    positions: Rows | None  # learned ones, from that of position 0 on; where the first layer is
    head: Rows | None
    output_norm: DeviceNorm
    dense_file: bool
    converted: set[str]  # types of the file that became F16
    least: dict[str, Tensor]  # by site, from which size on inputs count, [layers, inputs]; those with a rule

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
    weights = FileWeights.read(file)
    spec, reader = weights.spec, _Reader(weights, device)
    _check_supported(weights)
    which = range(spec.n_layers) if which is None else which
    orders = [None] * len(which) if hot is None else [_order(chosen, spec.d_ff) for chosen in hot]
    counts = [spec.d_ff] * len(which) if hot is None else [len(chosen) for chosen in hot]
    embedding = reader.rows("embedding") if with_embedding and not which.start else None
    positions = None
    if spec.structure.learned_positions and not which.start:
        positions = reader.rows("positions")
    head = None
    if with_head:
        head = (embedding or reader.rows("embedding")) if weights.head_is_embedding() else reader.rows("head")
    predictors = read_predictors(weights) if with_predictors else None
    layers = [
        _read_layer(reader, i, order, count, predictors and predictors[i])
        for i, order, count in zip(which, orders, counts, strict=True)
    ]
    return DeviceWeights(
        shape=spec,
        device=device,
        first=which.start,
        layers=layers,
        embedding=embedding,
        positions=positions,
        head=head,
        output_norm=reader.norm("output_norm"),
        dense_file=not weights.by_neuron,
        converted=weights.converted,
        least=_read_least(weights, which, device),
    )


def _read_least(weights: FileWeights, which: range, device: torch.device) -> dict[str, Tensor]:
    found = least_inputs(weights.file, weights.spec)
    return {
        site: torch.from_numpy(least[which.start : which.stop]).to(device) for site, least in found.items()
    }


def read_shape(file: GGUFFile) -> ModelSpec:
    """The model of a file whose tensors are all there. Raises as `read_weights` does."""
    if ModelSpec.from_gguf(file).head_dim % 2:
        raise UnsupportedError("heads of an odd width have no halves to turn", where=file.path)
    return FileWeights.read(file).spec


def host_embedding(file: GGUFFile) -> Rows:
    """The embedding in main memory. Raises as `read_weights` does."""
    return _Reader(FileWeights.read(file), torch.device("cpu")).rows("embedding")


def _order(hot: np.ndarray, d_ff: int) -> np.ndarray:
    """All neurons of a layer, the hot ones first."""
    return np.concatenate([hot, np.setdiff1d(np.arange(d_ff, dtype=hot.dtype), hot)])


def _check_supported(weights: FileWeights) -> None:
    """Refuse what a file may say of a model, though none is like that, and the steps have no word for."""
    spec = weights.spec
    never_zero = not spec.firing.gives_zeros and weights.by_neuron
    refused = {
        "SiLU and GELU models run in dense mode only": never_zero,
    }
    for what, is_so in refused.items():
        if is_so:
            raise UnsupportedError(what, where=weights.path)


class _Reader:
    """Slots as tensors on a device. What a quantized type is decoded to is the operators' business."""

    def __init__(self, weights: FileWeights, device: torch.device) -> None:
        self.weights, self.device = weights, device

    def rows(self, slot: str, layer: int = 0, order: np.ndarray | None = None) -> Rows:
        """A matrix, or its rows `order`."""
        return _rows(self.weights.packed(slot, layer), order).to(self.device)

    def bias(self, slot: str, layer: int, order: np.ndarray | None = None) -> Tensor | None:
        """A vector that may be missing, or its elements `order`."""
        values = self.weights.vector(slot, layer, "bias")
        if values is None:
            return None
        return torch.tensor(values if order is None else values[order], device=self.device)

    def norm(self, slot: str, layer: int = 0) -> DeviceNorm:
        """One of the norms."""
        weight = torch.tensor(self.weights.vector(slot, layer), device=self.device)
        return DeviceNorm(weight, self.bias(slot, layer))


def _rows(matrix: Packed, order: np.ndarray | None = None) -> Rows:
    rows = Rows.from_gguf(matrix.type, matrix.data, matrix.width)
    for index in (matrix.order, order):
        rows = rows if index is None else rows.take(torch.from_numpy(index.astype(np.int64)))
    return rows


def _read_layer(
    reader: _Reader, i: int, order: np.ndarray | None, n_hot: int, predictor: Predictor | None
) -> DeviceLayer:
    spec = reader.weights.spec
    return DeviceLayer(
        **_read_norms(reader, i),
        **_read_qkv(reader, i),
        o=reader.rows("o", i),
        o_bias=reader.bias("o", i),
        window=spec.windows[i],
        ffn=_read_ffn(reader, i, order, n_hot) if n_hot else None,
        down_bias=reader.bias("down", i),
        predictor=_read_predictor(reader, order, predictor) if predictor else None,
        firing=LayerRule.of(spec.firing, i, reader.device, None if order is None else order[:n_hot]),
        n_hot=n_hot,
    )


def _read_norms(reader: _Reader, i: int) -> dict[str, DeviceNorm | None]:
    """Those before attention and FFN, which may be one, and of q's and k's heads."""
    structure, attn_norm = reader.weights.spec.structure, reader.norm("attn_norm", i)
    is_one = structure.parallel and not reader.weights.spec.two_norms
    return {
        "attn_norm": attn_norm,
        "ffn_norm": attn_norm if is_one else reader.norm("ffn_norm", i),
        **{slot: reader.norm(slot, i) if structure.head_norm else None for slot in ("q_norm", "k_norm")},
    }


def _read_qkv(reader: _Reader, i: int) -> dict[str, object]:
    """The rows of q, k and v, one matrix where their types allow it, joined in main memory; their biases."""
    rows = joined([_rows(reader.weights.packed(slot, i)) for slot in PROJECTIONS[:3]])
    biases = [reader.bias(slot, i) for slot in PROJECTIONS[:3]]
    known = [bias for bias in biases if bias is not None]
    return {
        "qkv": tuple(part.to(reader.device) for part in rows),
        "qkv_bias": torch.cat(known) if known else None,
    }


def _read_ffn(reader: _Reader, i: int, order: np.ndarray | None, n_hot: int) -> DeviceFfn:
    down = reader.weights.held("down")
    kept = order[:n_hot] if down.endswith(ROWS) and order is not None else None
    up = reader.rows("up", i, kept) if reader.weights.spec.structure.gated else None
    return DeviceFfn(
        reader.rows("gate", i, kept), up, reader.rows(down, i, kept), reader.bias("gate", i, kept)
    )


def _read_predictor(reader: _Reader, order: np.ndarray | None, predictor: Predictor) -> DevicePredictor:
    always, bias = predictor.hot if order is None else predictor.hot[order], predictor.bias()
    return DevicePredictor(
        fc1=_rows(predictor.fc1()).to(reader.device),
        fc2=_rows(predictor.fc2(), order).to(reader.device),
        bias=None
        if bias is None
        else torch.tensor(bias if order is None else bias[order], device=reader.device),
        relu=predictor.kind.relu,
        normed=predictor.kind.normed,
        threshold=predictor.threshold,
        always=torch.from_numpy(always).to(reader.device),
    )
