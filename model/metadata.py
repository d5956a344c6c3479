"""A model's description in the metadata of GGUF files: read into a `ModelSpec`, and written from one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hotcold.errors import FormatError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.files.tensor_check import misshapen_tensor, missing_tensor
from hotcold.model.families import ARCHITECTURES, Architecture
from hotcold.model.firing import FiringRule
from hotcold.model.inputs import rules_of_file
from hotcold.model.rope_factors import ROPE_FACTORS, check_pairs, read_rope
from hotcold.model.spec import MAX_LAYERS, LayerSpec, ModelSpec
from hotcold.model.tensors import PROJECTIONS, Naming

__all__ = ["hyper_parameters", "per_layer", "read_spec"]

_WINDOWS = "hotcold.attention.windows"  # u32[L]: positions that the queries of a layer see, 0: all
_MAX_HEADS, _MAX_HEAD = 1 << 10, 1 << 12  # frequencies are made before any weight is looked at
_SIZES = ("attention.value_length", "rope.dimension_count")  # that of a head, wherever they are said


def read_spec(file: GGUFFile) -> ModelSpec:
    """The model of a file; raises as `ModelSpec.from_gguf`."""
    name = file.require("general.architecture", str)
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedError("unknown model architecture", where=file.path, got=name, expected=known)
    architecture = ARCHITECTURES[name]
    n_layers, n_vocab = _n_layers(file, name, architecture.naming), _n_vocab(file, name, architecture.naming)
    d_model = file.count(f"{name}.embedding_length")
    n_heads = file.count(f"{name}.attention.head_count", most=_MAX_HEADS)
    learned = architecture.structure.learned_positions
    head_dim = _head_dim(file, name, max(d_model // n_heads, 1), learned)
    layers = _layers(file, name, architecture, n_layers)
    return ModelSpec(
        model_type=architecture.model_type,
        structure=architecture.structure,
        layers=layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=file.count(f"{name}.attention.head_count_kv", n_heads, _MAX_HEADS),
        head_dim=head_dim,
        n_ctx=_n_ctx(file, name, architecture),
        n_vocab=n_vocab,
        norm_eps=_norm_eps(file, name, architecture),
        rope=None if learned else read_rope(file, name, head_dim),
        tied=_is_tied(file, name, architecture.naming),
        firing=_firing(file, architecture, layers),
        biases=_biases(file, architecture, n_layers),
        two_norms=architecture.structure.parallel
        and _any_layer(file, architecture.naming, ("attn_norm",), n_layers, ("weight", "bias")),
        inputs=rules_of_file(file, n_layers),
    )


def _n_layers(file: GGUFFile, name: str, naming: Naming) -> int:
    """A claim of a million layers must not cost more than the tensors that are there."""
    n_layers = file.count(key := f"{name}.block_count")
    layer = re.compile(re.escape(naming.names["down"].partition("{}")[0]) + r"(\d{1,6})\.")
    found = len({match[1] for tensor in file.tensors if (match := layer.match(tensor))})
    if n_layers != found or n_layers > MAX_LAYERS:
        what = "wrong number of layers"
        raise FormatError(what, where=file.path, field=key, got=n_layers, expected=found)
    return n_layers


def _n_vocab(file: GGUFFile, name: str, naming: Naming) -> int:
    """The rows of the embedding. FormatError where it has none, ShapeError where it is said to be another."""
    tensor = f"{naming.names['embedding']}.weight"
    embedding = file.tensors.get(tensor)
    if embedding is None or len(embedding.shape) != 2:
        raise missing_tensor(tensor, file.path)
    rows, width = embedding.shape
    if (said := file.find(f"{name}.vocab_size", int, rows)) != rows:
        raise misshapen_tensor(tensor, file.path, embedding.shape, (said, width))
    return rows


def _head_dim(file: GGUFFile, name: str, default: int, learned: bool) -> int:
    head_dim = file.count(f"{name}.attention.key_length", default, _MAX_HEAD)
    for size in () if learned else _SIZES:
        value = file.count(f"{name}.{size}", head_dim)
        if value != head_dim:
            raise UnsupportedError(f"{size} of another size", where=file.path, got=value, expected=head_dim)
    if not learned:
        check_pairs(file, head_dim)
    return head_dim


def _layers(file: GGUFFile, name: str, architecture: Architecture, n_layers: int) -> tuple[LayerSpec, ...]:
    """One of each layer; their FFNs may be of several widths, 0 being none."""
    sizes = _sizes(file, f"{name}.feed_forward_length", n_layers)
    experts = [file.find(f"{name}.{key}", int, 0) or 1 for key in ("expert_count", "expert_used_count")]
    kind, windows = "gated" if architecture.structure.gated else "ungated", _windows(file, n_layers)
    return tuple(
        LayerSpec(n, window, kind if n else "none", *experts)
        for n, window in zip(sizes, windows, strict=True)
    )


def _sizes(file: GGUFFile, key: str, n_layers: int) -> list[int]:
    if isinstance(file.metadata.get(key), np.ndarray):
        sizes = per_layer(file, key, n_layers, 0)
        if all(type(n) is int and 0 <= n < 1 << 31 for n in sizes):
            return sizes
        raise FormatError("bad value", where=file.path, field=key, got=sizes[:3], expected="sizes")
    return [file.count(key)] * n_layers


def _windows(file: GGUFFile, n_layers: int) -> list[int]:
    """Positions that the queries of each layer see, 0 being all. FormatError for what cannot be that."""
    if _WINDOWS not in file.metadata:
        return [0] * n_layers
    windows = file.require(_WINDOWS, np.ndarray).tolist()
    if len(windows) != n_layers or not all(type(n) is int and 0 <= n < 1 << 31 for n in windows):
        expected = f"{n_layers} integers below {1 << 31}"
        raise FormatError("bad windows", where=file.path, field=_WINDOWS, got=windows[:3], expected=expected)
    return windows


def _n_ctx(file: GGUFFile, name: str, architecture: Architecture) -> int:
    """Positions that the model has learned, or was trained on; 0 where nothing says it."""
    naming = architecture.naming
    table = file.tensors.get(f"{naming.names['positions']}.weight")
    if architecture.structure.learned_positions and table is not None:
        return table.shape[0] - naming.first_position
    return file.find(f"{name}.context_length", int, 0)


def _norm_eps(file: GGUFFile, name: str, architecture: Architecture) -> float:
    key, default, kinds = f"{name}.{architecture.eps_key}", architecture.default_eps, (int, float)
    value = file.require(key, kinds) if default is None else file.find(key, kinds, default)
    if not 0 <= value <= 1:
        raise FormatError("bad value", where=file.path, field=key, got=value, expected="0 to 1")
    return float(value)


def _is_tied(file: GGUFFile, name: str, naming: Naming) -> bool:
    """Whether a file has no head of its own; FormatError in PowerInfer's form, which has one but for OPT."""
    head = f"{naming.names['head']}.weight"
    if head in file.tensors:
        return False
    if file.magic == "PWRI" and name != "opt":
        raise missing_tensor(head, file.path)
    return True


def _firing(file: GGUFFile, architecture: Architecture, layers: Sequence[LayerSpec]) -> FiringRule:
    implied, gated = _implied_activation(file, architecture), architecture.structure.gated
    return FiringRule.from_gguf(file, implied, len(layers), layers[0].d_ff, gated=gated)


def _implied_activation(file: GGUFFile, architecture: Architecture) -> str:
    """What llama.cpp computes, or PowerInfer, whose files by neurons are ReLU models."""
    implied = architecture.activation
    by_neuron = (
        file.magic == "PWRI" or f"{architecture.naming.names['down'].format(0)}_t.weight" in file.tensors
    )
    return "relu" if by_neuron and implied != "drelu" else implied


def _biases(file: GGUFFile, architecture: Architecture, n_layers: int) -> frozenset[str]:
    """The slots that have one in any layer, and then in all: a hole must not become another function."""
    naming, qkv = architecture.naming, ("qkv",) if architecture.naming.fused else PROJECTIONS[:3]
    groups = {qkv: PROJECTIONS[:3], ("o",): ("o",), ("down",): ("down",)}
    groups |= {} if architecture.structure.gated else {("gate",): ("gate",)}
    on = (slots for names, slots in groups.items() if _any_layer(file, naming, names, n_layers, ("bias",)))
    return frozenset(slot for slots in on for slot in slots)


def _any_layer(
    file: GGUFFile, naming: Naming, slots: tuple[str, ...], n_layers: int, parts: tuple[str, ...]
) -> bool:
    names = (naming.names[slot].format(layer) for slot in slots for layer in range(n_layers))
    return any(
        f"{name}{end}.{part}" in file.tensors for name in names for end in ("", "_t") for part in parts
    )


def per_layer(file: GGUFFile, field: str, n_layers: int, default: float) -> list[Any]:
    """One number per layer, `default` where there is no such key; FormatError for another number of them."""
    values = file.find(field, np.ndarray)
    if values is None:
        return [default] * n_layers
    if len(values) != n_layers:
        what = "one value per layer"
        raise FormatError(what, where=file.path, field=field, got=len(values), expected=n_layers)
    if np.isnan(values).any():  # infinite ones say that all or none fire
        raise FormatError("not a number", where=file.path, field=field, got=values.tolist())
    return values.tolist()


def hyper_parameters(spec: ModelSpec, name: str) -> dict[str, Any]:
    """The `{architecture}.*` metadata of llama.cpp and PowerInfer, in the exact types they insist on."""
    architecture = ARCHITECTURES[name]
    numbers = {
        "block_count": spec.n_layers,
        "context_length": spec.n_ctx,
        "embedding_length": spec.d_model,
        "feed_forward_length": spec.d_ff,
        "attention.head_count": spec.n_heads,
        "attention.head_count_kv": spec.n_kv_heads,
        "vocab_size": spec.n_vocab,
    }
    if spec.head_dim * spec.n_heads != spec.d_model:
        numbers |= {"attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim}
    values: dict[str, Any] = {key: np.uint32(value) for key, value in numbers.items()}
    values[architecture.eps_key] = np.float32(spec.norm_eps)
    if spec.rope is not None:
        rope = (
            spec.rope if architecture.rope_factors else spec.rope.as_yarn()
        )  # ours read ROPE_FACTORS instead
        values |= {"rope.dimension_count": np.uint32(spec.head_dim), **rope.metadata()}
    return {f"{name}.{key}": value for key, value in values.items()} | _own_keys(spec, architecture)


def _own_keys(spec: ModelSpec, architecture: Architecture) -> dict[str, Any]:
    """What the architecture has no word for, under `hotcold.`: other programs ignore it."""
    own: dict[str, Any] = {}
    if any(spec.windows):
        own[_WINDOWS] = np.asarray(spec.windows, np.uint32)
    divisors = spec.rope.llama3_divisors(spec.head_dim) if spec.rope else None
    if divisors is not None and not architecture.rope_factors:
        own[ROPE_FACTORS] = divisors
    return own
