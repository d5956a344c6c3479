"""The sparse SmolLM2-135M that comes with hotcold: FFNs and norms in one file, put into the dense model.

Attention and embedding were not trained, so they are not in the file: they come from the model `smollm2` and
are rounded to Q4_0 as they were during training. FFN weights are stored as the Q4_0 blocks that an export
writes, so that nothing is lost: the checkpoint that is made here is the one that training saved.

The file is safetensors with metadata `format`, `version`, `base` (the fingerprint of the dense model) and
`activation`; per layer N uint8 `layers.N.gate`, `.up` [d_ff, d_model / 32 * 18] and, transposed so that a row
is a neuron, `.down`; float16 `layers.N.input_norm`, `.ffn_norm` [d_model], and `norm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hotcold import storage
from hotcold.errors import FormatError, InputError, MismatchError, ShapeError
from hotcold.model.checkpoint import ffn_layers
from hotcold.shipped import FILE
from hotcold.sparsify.activations import set_activation
from hotcold.sparsify.training.rounding import pack_q4_0, start_rounding, unpack_q4_0

__all__ = ["pack", "unpack"]

_FORMAT, _VERSION = "hotcold-ffn", "1"


def pack(sparse: PreTrainedModel, base_fingerprint: str, path: Path) -> None:
    """Write FFNs and norms of a model whose FFN weights Q4_0 stores exactly."""
    tensors = {}
    for name, weight, transposed in _matrices(sparse):
        rows = weight.detach().float().T if transposed else weight.detach().float()
        tensors[name] = pack_q4_0(rows.contiguous()).numpy()
    tensors |= {name: weight.detach().half().numpy() for name, weight in _norms(sparse)}
    metadata = {"base": base_fingerprint, "activation": sparse.config.hidden_act}
    metadata |= {"format": _FORMAT, "version": _VERSION}
    storage.write_tensors(path, dict(sorted(tensors.items())), metadata)


@torch.no_grad()
def unpack(dense: PreTrainedModel, base_fingerprint: str, path: Path = FILE) -> PreTrainedModel:
    """`dense`, changed in place to the sparse model of the file.

    Raises InputError where there is no file, FormatError for another one, MismatchError for another dense
    model, ShapeError for another size.
    """
    if not path.is_file():
        raise InputError(
            "these trained FFNs are not installed", where=path, fix="train your own with --method relu"
        )
    metadata, tensors = _read(path)
    if metadata["base"] != base_fingerprint:
        raise MismatchError(
            "made for a different dense model", where=path, got=base_fingerprint, expected=metadata["base"]
        )
    dense.requires_grad_(False)
    for name, weight, transposed in list(_matrices(dense)):
        rows = unpack_q4_0(torch.from_numpy(_tensor(tensors, name, path)))
        _put(weight, rows.T if transposed else rows, name, path)
    for name, weight in _norms(dense):
        _put(weight, torch.from_numpy(_tensor(tensors, name, path).astype(np.float32)), name, path)
    set_activation(dense, metadata["activation"])
    start_rounding(dense)
    return dense


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise FormatError("cannot be read", where=path, got=str(error)) from error
    if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
        raise FormatError("not packed FFNs", where=path, field="format", got=metadata, expected=_FORMAT)
    return metadata, tensors


def _tensor(tensors: dict[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    if name not in tensors:
        raise FormatError("missing tensor", where=path, field=name)
    return tensors[name]


def _put(weight: Tensor, value: Tensor, name: str, path: Path) -> None:
    if weight.shape != value.shape:
        raise ShapeError(name, where=path, got=tuple(value.shape), expected=tuple(weight.shape))
    weight.copy_(value)


def _matrices(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, weight, and whether it is stored transposed."""
    for i, layer in enumerate(ffn_layers(model)):
        yield f"layers.{i}.gate", layer.gate.weight, False
        yield f"layers.{i}.up", layer.up.weight, False
        yield f"layers.{i}.down", layer.down.weight, True


def _norms(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    for i, layer in enumerate(model.model.layers):
        yield f"layers.{i}.input_norm", layer.input_layernorm.weight
        yield f"layers.{i}.ffn_norm", layer.post_attention_layernorm.weight
    yield "norm", model.model.norm.weight
