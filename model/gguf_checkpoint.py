"""A model in a GGUF file as the Hugging Face checkpoint it was made from: config, names, order of rows.

This is llama.cpp's `convert_hf_to_gguf.py` backwards, so that one table of layers serves every source of
weights. Files are read by hotcold's own reader: `transformers` would hand them to the `gguf` package's, which
trusts them, and would forget activations, rope factors and the pre-tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hotcold.errors import FormatError, UnsupportedError
from hotcold.files.gguf import GGUFFile, Tensor
from hotcold.files.gguf_split import forget_pages, open_gguf
from hotcold.files.quantize import FLOATS, dequantize
from hotcold.files.tensor_check import misshapen_tensor, missing_tensor, unexpected_tensors
from hotcold.finite import check_weight
from hotcold.model.families import FAMILIES
from hotcold.model.firing import FiringRule
from hotcold.model.forms import FORMS, head_is_embedding, read_windows, vocabulary_size
from hotcold.model.rope_factors import check_pairs, rope_parameters
from hotcold.model.spec import split_rope
from hotcold.model.tokenizer.special_tokens import SPECIAL_TOKENS, stop_ids

__all__ = ["GGUFCheckpoint"]

# GGUF architecture -> model type of transformers. Mistral's files say `llama`.
_MODEL_TYPES = {
    "llama": "llama", "bamboo": "bamboo", "qwen2": "qwen2", "qwen3": "qwen3", "smallthinker": "llama",
}  # fmt: skip
_COUNTS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}
_MODULES = FAMILIES["qwen3"].modules  # Llama's names, and those of the norms of heads
_LAYER_NAMES = {name: module for name, module in _MODULES.items() if "{}" in module}
_LAYER_NAMES |= {f"{name}_exps": _MODULES[name] for name in ("ffn_gate", "ffn_up", "ffn_down")}
_LAYER_NAMES["ffn_down_t"] = _MODULES["ffn_down"]
_OUTER_NAMES = {name: module for name, module in _MODULES.items() if "{}" not in module}
_MAX_HEAD = 1 << 16  # frequencies are made of that length before any weight is looked at
_NOT_WEIGHTS = re.compile(
    r"rope_freqs\.weight|blk\.\d+\.((fc1|fc2|ffn_gate_inp)\.weight|ffn_act\.thresholds)"
)
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)")
_OUTER = re.compile(r"(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor of the file; `change` makes of its values what Hugging Face's checkpoint holds."""

    tensor: Tensor
    shape: tuple[int, ...]
    change: Callable[[np.ndarray], np.ndarray]


class GGUFCheckpoint:
    """A `hf_checkpoint.WeightSource` over a GGUF file, split ones and PowerInfer's included.

    Raises InputError or FormatError where the file cannot be read, UnsupportedError for a model that is not
    Llama-like, ShapeError where heads and matrices do not fit.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = open_gguf(path)
        self._architecture = self._file.require("general.architecture", str)
        if self._architecture not in _MODEL_TYPES:
            known = " | ".join(_MODEL_TYPES)
            raise UnsupportedError(
                "unknown architecture", where=self.path, got=self._architecture, expected=known
            )
        self.config: dict[str, Any] = _config(self._file, self._architecture)
        self._weights: dict[str, _Weight] = {}
        for tensor in self._file.tensors.values():
            if not _NOT_WEIGHTS.fullmatch(tensor.name):
                name, weight = self._weight(tensor)
                if name in self._weights:
                    raise FormatError("two tensors for one weight", where=self.path, got=tensor.name)
                self._weights[name] = weight
        self._check_layers()

    @property
    def quantized_types(self) -> list[str]:
        """The ggml types, other than floating point, that weights are stored in."""
        return sorted({weight.tensor.type for weight in self._weights.values()} - set(FLOATS))

    def names(self) -> set[str]:
        """The names of all tensors, as Hugging Face has them."""
        return set(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor; FormatError where the file has none of this name."""
        return self._find(name).shape

    def load(self, name: str) -> np.ndarray:
        """One tensor as float32, decoded if it is quantized; FormatError unless all of it is finite."""
        weight = self._find(name)
        values = weight.change(check_weight(dequantize(weight.tensor), weight.tensor.name, self.path))
        forget_pages(self._file)
        return values

    def _find(self, name: str) -> _Weight:
        if name not in self._weights:
            raise missing_tensor(name, self.path)
        return self._weights[name]

    def _weight(self, tensor: Tensor) -> tuple[str, _Weight]:
        """A tensor under its Hugging Face name."""
        if (match := _BLOCK.fullmatch(tensor.name)) and match[2] in _LAYER_NAMES:
            name = f"{_LAYER_NAMES[match[2]].format(int(match[1]))}.{match[3]}"
            return name, self._layer_weight(tensor, match[2])
        if (match := _OUTER.fullmatch(tensor.name)) and match[1] in _OUTER_NAMES:
            return f"{_OUTER_NAMES[match[1]]}.{match[2]}", _Weight(tensor, tensor.shape, _same)
        raise unexpected_tensors([tensor.name], self.path)

    def _layer_weight(self, tensor: Tensor, kind: str) -> _Weight:
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        if kind in heads and FORMS[self._architecture].interleaved:
            n_heads = self.config[heads[kind]]
            if tensor.shape[0] != n_heads * self.config["head_dim"]:
                expected = f"{n_heads} heads of {self.config['head_dim']} rows"
                raise misshapen_tensor(tensor.name, self.path, tensor.shape, expected)
            return _Weight(tensor, tensor.shape, lambda values: split_rope(values, n_heads))
        if kind.endswith("_exps"):
            if len(tensor.shape) != 3 or tensor.shape[0] != 1:
                raise misshapen_tensor(tensor.name, self.path, tensor.shape, "one expert")
            return _Weight(tensor, tensor.shape[1:], lambda values: values[0])
        if kind == "ffn_down_t":
            return _Weight(tensor, tensor.shape[::-1], np.transpose)
        return _Weight(tensor, tensor.shape, _same)

    def _check_layers(self) -> None:
        """A claim of a million layers must not cost more than the tensors that are there."""
        found = {name.split(".")[2] for name in self._weights if name.startswith("model.layers.")}
        if len(found) != self.config["num_hidden_layers"]:
            field = f"{self._architecture}.block_count"
            got = self.config["num_hidden_layers"]
            raise FormatError(
                "not the layers of this file", where=self.path, field=field, got=got, expected=len(found)
            )


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _config(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """The `config.json` that transformers would need for this model."""
    if architecture == "smallthinker" and file.require("smallthinker.expert_count", int) != 1:
        got = file.metadata["smallthinker.expert_count"]
        raise UnsupportedError("a mixture of experts", where=file.path, got=got, expected="one expert")
    config = {key: file.count(f"{architecture}.{name}") for key, name in _COUNTS.items()}
    n_heads = config["num_attention_heads"]
    head_dim = _head_dim(file, architecture, config["hidden_size"] // n_heads)
    config |= {
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": vocabulary_size(file),
        "num_key_value_heads": file.count(f"{architecture}.attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "rms_norm_eps": file.require(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": rope_parameters(file, architecture, head_dim),
        "tie_word_embeddings": head_is_embedding(file),
    }
    config |= _window(file, config["num_hidden_layers"])
    if "blk.0.attn_output.bias" in file.tensors:
        config["attention_bias"] = True
    elif architecture == "smallthinker" and "blk.0.attn_q.bias" in file.tensors:
        config["model_type"] = "qwen2"
    size = config["num_hidden_layers"], config["intermediate_size"]
    if size[0] > len(file.tensors):  # lists are made of that length
        field = f"{architecture}.block_count"
        raise FormatError("not the layers of this file", where=file.path, field=field, got=size[0])
    rule = FiringRule.from_gguf(file, FORMS[architecture].activation, *size)
    return config | rule.as_config() | _special_tokens(file, config["vocab_size"])


def _head_dim(file: GGUFFile, architecture: str, default: int) -> int:
    head_dim = file.count(f"{architecture}.attention.key_length", max(default, 1), _MAX_HEAD)
    for name in ("attention.value_length", "rope.dimension_count"):
        value = file.count(f"{architecture}.{name}", head_dim)
        if value != head_dim:
            raise UnsupportedError(f"{name} of another size", where=file.path, got=value, expected=head_dim)
    check_pairs(file, head_dim)
    return head_dim


def _window(file: GGUFFile, n_layers: int) -> dict[str, Any]:
    """hotcold's own key: the same window in every layer is Mistral's."""
    windows = read_windows(file, n_layers)
    if not any(windows):
        return {}
    if len(set(windows)) > 1:
        raise UnsupportedError("windows that differ between layers", where=file.path, got=windows)
    return {"model_type": "mistral", "sliding_window": windows[0]}


def _special_tokens(file: GGUFFile, n_vocab: int) -> dict[str, int | list[int]]:
    fields = {name: f"tokenizer.ggml.{key}_token_id" for name, key in SPECIAL_TOKENS.items()}
    found: dict[str, int | list[int]] = {
        f"{name}_token_id": _token_id(file, field, n_vocab)
        for name, field in fields.items()
        if field in file.metadata
    }
    ends = [end for end in stop_ids(file) if 0 <= end < n_vocab]
    return found | ({"eos_token_id": ends} if len(ends) > 1 else {})


def _token_id(file: GGUFFile, field: str, n_vocab: int) -> int:
    number = file.require(field, int)
    if not 0 <= number < n_vocab:
        expected = f"below {n_vocab}"
        raise FormatError("no such token", where=file.path, field=field, got=number, expected=expected)
    return number
