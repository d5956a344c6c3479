"""A model in a GGUF file as the Hugging Face checkpoint it was made from: config, names, order of rows.

This is llama.cpp's `convert_hf_to_gguf.py` backwards, so that one table of layers serves every source of
weights. Files are read by hotcold's own reader: `transformers` would hand them to the `gguf` package's, which
trusts them, and would forget activations, rope factors and the pre-tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hotcold.errors import FormatError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.files.gguf_split import open_gguf
from hotcold.files.quantize import FLOATS
from hotcold.files.tensor_check import misshapen_tensor, missing_tensor, unexpected_tensors
from hotcold.model.families import ARCHITECTURES, FAMILIES, Structure
from hotcold.model.inputs import CONFIG_KEY, config_entry
from hotcold.model.rope_factors import rope_parameters
from hotcold.model.spec import ModelSpec
from hotcold.model.tensors import ROWS, place, rows_of
from hotcold.model.tokenizer.special_tokens import SPECIAL_TOKENS, stop_ids
from hotcold.model.weights import FileWeights

__all__ = ["GGUFCheckpoint"]

_LLAMA_LIKE = (Structure(), Structure(head_norm=True))
_READ = [name for name, row in ARCHITECTURES.items() if row.structure in _LLAMA_LIKE]


class GGUFCheckpoint:
    """A `huggingface.WeightSource` over a GGUF file, split ones and PowerInfer's included.

    Raises InputError or FormatError where the file cannot be read, UnsupportedError for a model that is not
    Llama-like, ShapeError where heads and matrices do not fit.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = open_gguf(path)
        architecture = file.require("general.architecture", str)
        if architecture not in _READ:
            known = " | ".join(_READ)
            raise UnsupportedError("unknown architecture", where=self.path, got=architecture, expected=known)
        spec = ModelSpec.from_gguf(file)
        spec.check_layers(self.path)
        self.config: dict[str, Any] = _config(file, architecture, spec)
        self._weights = FileWeights(file, spec, ARCHITECTURES[architecture].naming)
        names = self._weights.stored_names()
        if unknown := self._weights.weight_names() - names.keys():
            raise unexpected_tensors(unknown, self.path)
        theirs = FAMILIES[self.config["model_type"]].naming
        self._slots = {
            place(spec, theirs, slot.removesuffix(ROWS), layer, part)[0]: (slot, layer, part)
            for slot, layer, part in names.values()
        }
        for slot, layer, part in names.values():
            self._check_shape(slot, layer, part)

    @property
    def quantized_types(self) -> list[str]:
        """The ggml types, other than floating point, that weights are stored in."""
        return sorted({self._weights.tensor(*slot).type for slot in self._slots.values()} - set(FLOATS))

    def names(self) -> set[str]:
        """The names of all tensors, as Hugging Face has them."""
        return set(self._slots)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor; FormatError where the file has none of this name."""
        slot, layer, part = self._find(name)
        shape = self._weights.tensor(slot, layer, part).shape
        return shape[::-1] if slot.endswith(ROWS) else shape

    def load(self, name: str) -> np.ndarray:
        """One tensor as float32, decoded if it is quantized; FormatError unless all of it is finite."""
        slot, layer, part = self._find(name)
        values = self._weights.floats(slot.removesuffix(ROWS), layer, part)
        self._weights.release()
        return values

    def _find(self, name: str) -> tuple[str, int, str]:
        if name not in self._slots:
            raise missing_tensor(name, self.path)
        return self._slots[name]

    def _check_shape(self, slot: str, layer: int, part: str) -> None:
        """The order of rows is worked out before shapes are compared."""
        tensor, rows = (
            self._weights.tensor(slot, layer, part),
            rows_of(self._weights.spec, self._weights.naming, slot),
        )
        if isinstance(rows, np.ndarray) and tensor.shape[0] != len(rows):
            raise misshapen_tensor(tensor.name, self.path, tensor.shape, f"{len(rows)} rows of whole heads")


def _config(file: GGUFFile, architecture: str, spec: ModelSpec) -> dict[str, Any]:
    """The `config.json` that transformers would need for this model."""
    config = {
        "model_type": spec.model_type,
        "num_hidden_layers": spec.n_layers,
        "max_position_embeddings": file.count(f"{architecture}.context_length"),
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.n_vocab,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
    }
    if spec.rope is not None:
        config["rope_parameters"] = rope_parameters(spec.rope, file.path)
    config |= _window(file, spec) | _inputs(spec)
    if "o" in spec.biases:
        config["attention_bias"] = True
    elif architecture == "smallthinker" and "q" in spec.biases:
        config["model_type"] = "qwen2"
    return config | spec.firing.as_config() | _special_tokens(file, spec.n_vocab)


def _window(file: GGUFFile, spec: ModelSpec) -> dict[str, Any]:
    """hotcold's own key: the same window in every layer is Mistral's."""
    if not any(spec.windows):
        return {}
    if len(set(spec.windows)) > 1:
        got = list(spec.windows)
        raise UnsupportedError("windows that differ between layers", where=file.path, got=got)
    return {"model_type": "mistral", "sliding_window": spec.windows[0]}


def _inputs(spec: ModelSpec) -> dict[str, Any]:
    return {CONFIG_KEY: config_entry(spec.inputs)} if spec.inputs else {}


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
