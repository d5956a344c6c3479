"""What conversions pass from the formats that they read to the format that they write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hotcold.convert.powerinfer.firing_counts import with_frequencies
from hotcold.convert.powerinfer.gpu_index import GpuIndex
from hotcold.errors import InputError
from hotcold.files.gguf import GGUFFile
from hotcold.model.huggingface import WeightSource
from hotcold.predictor.bundle import PredictorBundle

__all__ = ["Model", "Options", "Parts"]


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says besides sources and target; None is what the sources have."""

    pickles_allowed: bool = False
    counted_tokens: int | None = None
    vram_budget: float | None = None  # bytes
    quant: str | None = None
    head_quant: str | None = None
    predictor_quant: str | None = None
    hot_frequency: float | None = None
    name: str | None = None
    attention_rows: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """Weights, and what belongs to them. `folder` holds the tokenizer's files, `file` is the GGUF, if any."""

    weights: Callable[[], WeightSource]  # opened when they are needed: predictors alone come out of any file
    name: str
    fingerprint: str
    folder: Path | None
    file: GGUFFile | None = None
    ready: dict[str, Path] = field(default_factory=dict)  # the GGUF files of a bundle, by format
    predictors: PredictorBundle | None = None  # those in the same file or bundle
    attention_rows: bool = False  # whether a bundle has the attention matrices by input


@dataclass(slots=True)
class Parts:
    """What the sources hold. Of two sources with the same part the later one counts."""

    model: Model | None = None
    bundle: PredictorBundle | None = None
    firing: list[np.ndarray] | None = None  # per layer float32 [d_ff], counts or shares
    firing_tokens: int | None = None  # that the counts are of, where it is known
    gpu: GpuIndex | None = None

    def need_model(self) -> Model:
        """The model, or InputError."""
        return _need(self.model, "a model", "a bundle, a GGUF file or an HF directory")

    def need_predictors(self, options: Options) -> PredictorBundle:
        """The predictors, with the firing statistics that another source gives; InputError for none."""
        bundle = _need(self.bundle, "predictors", "a bundle, predictors, model-pt or a powerinfer file")
        if self.firing is not None:
            tokens = options.counted_tokens or self.firing_tokens
            bundle = with_frequencies(bundle, self.firing, tokens)
        return bundle

    def need_firing(self) -> list[np.ndarray]:
        """How often each neuron fires, in counts or shares; InputError if no source tells."""
        firing = self.firing
        if firing is None and self.bundle is not None:
            known = [layer.firing_frequency for layer in self.bundle.layers]
            firing = known if all(shares is not None for shares in known) else None
        if firing is None and self.gpu is not None:
            firing = [mask.astype(np.float32) for mask in self.gpu.masks()]
        return _need(firing, "firing statistics", "activation files, traces, or predictors trained on traces")


def _need(part: Any, what: str, expected: str) -> Any:
    if part is None:
        raise InputError(f"no source has {what}", expected=expected, fix="add a source that has them")
    return part
