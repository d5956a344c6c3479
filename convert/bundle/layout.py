"""What a bundle's GGUF files hold: metadata and tensors, worked out before anything is written.

The exporter writes these layouts; `verify` works them out again from what lies in a bundle and compares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_VERSION, LlamaFileType

from hotcold.convert.bundle.input_rows import input_role, input_rows_plans
from hotcold.convert.bundle.predictors import hot_neurons
from hotcold.convert.bundle.tensor_plans import Planner, TensorTypes
from hotcold.convert.gguf.llama_cpp import dense_metadata, dense_plans
from hotcold.convert.gguf.write import TensorPlan, planned
from hotcold.convert.powerinfer.model import MAGIC, sparse_metadata, sparse_plans
from hotcold.files.quantize import type_of
from hotcold.model.inputs import metadata_of
from hotcold.model.spec import ModelSpec
from hotcold.model.tokenizer.files import tokenizer_metadata
from hotcold.predictor.bundle import PredictorBundle

__all__ = ["METADATA_VERSION", "ExportOptions", "GGUFLayout", "ModelFiles"]

METADATA_VERSION = 1

_FILE_TYPES = {"F32": "ALL_F32"}  # the others are MOSTLY_ + type


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to write a bundle. Quantizations are names of `quantize.QUANTS`.

    `head_quant` is for embedding and head, and that of the other matrices where None. A neuron that
    fires on `hot_frequency` of the tokens or more is hot: always computed, never predicted. With
    `attention_rows` the attention matrices are written by input too, for a runtime that leaves inputs out;
    a model with input rules has its own matrices by input anyway.
    """

    quant: str = "q4_0"
    head_quant: str | None = None
    predictor_quant: str = "q8_0"
    hot_frequency: float = 0.5
    attention_rows: bool = False

    @property
    def head(self) -> str:
        """The quantization of embedding and head."""
        return self.head_quant or self.quant

    def types(self) -> TensorTypes:
        """The ggml types; UnsupportedError for an unknown quantization."""
        return TensorTypes(type_of(self.quant), type_of(self.head), type_of(self.predictor_quant))


@dataclass(frozen=True, slots=True)
class GGUFLayout:
    """A GGUF file to be written or to be compared with; `role` is that in the manifest."""

    file: str
    role: str
    magic: str
    metadata: dict[str, Any]
    plans: list[TensorPlan]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model of which GGUF files are made. `load` gives weights, `folder` holds the tokenizer, if any."""

    spec: ModelSpec
    config: dict[str, Any]
    options: ExportOptions
    name: str
    fingerprint: str
    folder: Path | None
    load: Callable[[str], np.ndarray]

    def layouts(
        self, predictors: PredictorBundle | None, *, sparse: bool
    ) -> tuple[list[GGUFLayout], list[str]]:
        """The dense file, the one by neurons if `sparse`, the one by input where there is one; and what got
        another type than wished."""
        planner = Planner(self.spec, self.options.types(), self.load)
        own = self._own_metadata(planner.types)
        common = own | self._vocabulary()
        firing = [
            planned(name, values.shape, "F32", lambda values=values: values)
            for name, values in self.spec.firing.tensors(self.spec.d_ff)
        ]
        metadata = dense_metadata(self.spec) | common
        layouts = [GGUFLayout(f"{self.name}.gguf", "dense", "GGUF", metadata, firing + dense_plans(planner))]
        if sparse:
            layers = predictors.layers if predictors else []
            hot = [hot_neurons(layer, self.options.hot_frequency) for layer in layers]
            metadata = sparse_metadata(self.spec, predictors, hot) | common
            plans = firing + sparse_plans(planner, predictors)
            layouts.append(GGUFLayout(f"{self.name}.powerinfer.gguf", "sparse", MAGIC, metadata, plans))
        if role := input_role(self.spec, attention_rows=self.options.attention_rows):
            metadata = {"general.architecture": f"hotcold-{role}"} | own
            plans = input_rows_plans(planner)
            layouts.append(GGUFLayout(f"{self.name}.{role}.gguf", role, "GGUF", metadata, plans))
        return layouts, sorted(set(planner.fallbacks))

    def _own_metadata(self, types: TensorTypes) -> dict[str, Any]:
        file_type = LlamaFileType[_FILE_TYPES.get(types.body, f"MOSTLY_{types.body}")]
        return {
            "general.name": self.name,
            "general.file_type": np.uint32(file_type),
            "general.quantization_version": np.uint32(GGML_QUANT_VERSION),
            "hotcold.version": np.uint32(METADATA_VERSION),
            "hotcold.model_fingerprint": self.fingerprint,
            **self.spec.firing.metadata(),
            **metadata_of(self.spec.inputs),
        }

    def _vocabulary(self) -> dict[str, Any]:
        if self.folder is None:
            return {"tokenizer.ggml.model": "none"}
        return tokenizer_metadata(self.folder, self.spec.n_vocab, self.config)
