"""Synthetic bundles: the shapes of well-known models with random weights, for speed without downloads.

The files are those of any bundle, written by the same code, so that both llama.cpp and hotcold read them as
they read a real model. Which neurons fire, and which are predicted, follows from the weights (see `planted`);
the model's text means nothing. Every name and report says that it is synthetic.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hotcold import __version__
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.bundle.manifest import Manifest
from hotcold.errors import InputError
from hotcold.eval.synthetic.planted import LayerActivity, PlantedModel
from hotcold.files.gguf import Tensor
from hotcold.files.quantize import dequantize, quantize, type_of
from hotcold.identify import identify
from hotcold.ownership import check_replaceable
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle
from hotcold.progress import log

__all__ = ["SHAPES", "Synthetic", "write_synthetic"]

_HOT = 0.5  # neurons that fire on this share of the tokens are always computed, as `hotcold export` has it
_MISSED = 0.04  # share of the firing neurons that a predictor may miss on the tokens it is calibrated on


def _shape(
    d_model: int, d_ff: int, n_layers: int, heads: int, kv_heads: int, **more: object
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_act": "relu",
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        **more,
    }


SHAPES = {
    "llama-2-7b": _shape(4096, 11008, 32, 32, 32),
    "llama-2-13b": _shape(5120, 13824, 40, 40, 40),
    "mistral-7b": _shape(4096, 14336, 32, 32, 8, max_position_embeddings=32768),
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True, rope_theta=1e5),
}


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Which synthetic model. `n_layers` None means all; `predictor_rank` None a sixteenth of d_model.

    In Q8_0 such a predictor is as many bytes as one of twice the rank in Q4_0, and hardly rounded: the great
    mean of its input would multiply what Q4_0 rounds off. `noise` is what no predictor can know of a gate,
    against 1 for what it can. Raises InputError for an unknown shape or an impossible figure.
    """

    shape: str
    sparsity: float = 0.89
    quant: str = "q4_0"
    n_layers: int | None = None
    predictor_quant: str = "q8_0"
    predictor_rank: int | None = None
    noise: float = 0.36
    seed: int = 0
    attention_rows: bool = False

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise InputError("unknown synthetic shape", got=self.shape, expected=" | ".join(SHAPES))
        if not 0.05 <= self.sparsity <= 0.995:
            raise InputError("--sparsity out of range", got=self.sparsity, expected="0.05 to 0.995")
        if self.n_layers is not None and self.n_layers < 1:
            raise InputError("--layers must be at least 1", got=self.n_layers)
        rank = self.predictor_rank
        if rank is not None and (rank < 64 or rank % 64):
            raise InputError("--predictor-rank out of range", got=rank, expected="a multiple of 64")
        if not 0 <= self.noise <= 10:
            raise InputError("--noise out of range", got=self.noise, expected="0 to 10")
        type_of(self.quant)
        type_of(self.predictor_quant)

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        shape = SHAPES[self.shape]
        return {**shape, "num_hidden_layers": self.n_layers or shape["num_hidden_layers"]}

    @property
    def rank(self) -> int:
        """Rows of fc1: a multiple of 64, so that they are whole blocks and come in pairs of either sign."""
        return self.predictor_rank or max(64, self.config["hidden_size"] // 16 // 64 * 64)

    @property
    def name(self) -> str:
        layers = self.config["num_hidden_layers"]
        return f"synthetic-{self.shape}-{layers}l-s{self.sparsity:g}-{self.quant}"

    @property
    def fingerprint(self) -> str:
        """64 hex digits over everything that the files depend on."""
        made_by = {**asdict(self), "hotcold": __version__}
        return hashlib.sha256(repr(sorted(made_by.items())).encode()).hexdigest()


def write_synthetic(synthetic: Synthetic, folder: str | Path) -> Path:
    """Write the bundle under `folder`, unless it exists; returns its path.

    StorageError if something else has its name.

    Eight layers of the 7B shape take about two minutes, and in Q4_0 2 GB of disk.
    """
    out = Path(folder) / f"{synthetic.name}-{synthetic.fingerprint[:8]}"
    if (
        out.is_dir()
        and identify(out).kind == "bundle"
        and Manifest.read(out).model_fingerprint == synthetic.fingerprint
    ):
        return out
    check_replaceable(out, "bundle")
    model = PlantedModel(
        synthetic.config,
        sparsity=synthetic.sparsity,
        rank=synthetic.rank // 2,
        noise=synthetic.noise,
        stored=lambda gate: _stored(gate, type_of(synthetic.quant)),
        seed=synthetic.seed,
    )
    log(f"{synthetic.name}: generating synthetic weights")
    export_bundle(
        model,
        out,
        name=synthetic.name,
        fingerprint=synthetic.fingerprint,
        predictors=_predictors(synthetic, model),
        options=ExportOptions(
            synthetic.quant,
            predictor_quant=synthetic.predictor_quant,
            hot_frequency=_HOT,
            attention_rows=synthetic.attention_rows,
        ),
    )
    return out


def _predictors(synthetic: Synthetic, model: PlantedModel) -> PredictorBundle:
    """Calibrate the model; the predictors that follow from its planted factors."""
    type_name = type_of(synthetic.predictor_quant)
    layers = []
    for activity in model.calibrate():
        fc1, fc2 = planted_predictor(activity)
        frequency = activity.fired.mean(axis=0, dtype=np.float32)
        threshold = _threshold(activity, _stored(fc1, type_name), _stored(fc2, type_name), frequency)
        layers.append(LayerPredictor(fc1, fc2, threshold, frequency))
    return PredictorBundle(synthetic.fingerprint, layers, 1 - _MISSED, {"synthetic": asdict(synthetic)})


def planted_predictor(activity: LayerActivity) -> tuple[np.ndarray, np.ndarray]:
    """fc1 [2·rank, d_model], fc2 [d_ff, 2·rank] with fc2·relu(fc1·x) = factors·basis·x, the noiseless gate.

    Each direction of the basis goes in with both signs, as relu(t) - relu(-t) = t.
    """
    fc1 = np.concatenate([activity.basis, -activity.basis])
    fc2 = np.concatenate([activity.factors, -activity.factors], axis=1)
    return fc1, fc2


def _stored(weight: np.ndarray, type_name: str) -> np.ndarray:
    """A matrix after quantization."""
    return dequantize(Tensor("predictor", weight.shape, type_name, quantize(weight, type_name)))


def _threshold(activity: LayerActivity, fc1: np.ndarray, fc2: np.ndarray, frequency: np.ndarray) -> float:
    """The logit below which lie `_MISSED` of all firing neurons; hot ones are never missed."""
    logits = np.maximum(activity.inputs @ fc1.T, 0) @ fc2.T
    cold = activity.fired & (frequency < _HOT)
    missable = cold.sum() / max(activity.fired.sum(), 1)
    share = min(1.0, _MISSED / missable) if missable else 0.0
    return float(np.quantile(logits[cold], share)) if missable else 0.0
