"""Random Llama weights with a firing pattern planted in the gates, one tensor at a time.

What fires comes out of the weights, as in a trained model. A gate row is

    g_j = A_j · Bᵀ + noise + b_j · m

B spans a subspace of few dimensions, so a low-rank predictor can learn the first term, but not the noise.
m is the mean direction of the FFN's input, along which b_j moves neuron j's gate up or down until the neuron
fires as often as it should. These frequencies follow a power law: a few neurons always, most rarely.

The offsets depend on what enters a layer, so the layers are made one after the other while some hundred
tokens run through them; `calibrate` keeps little of each layer, and `PlantedModel.load` regenerates any
matrix from the seed when it is needed. No more than one layer's matrices are ever in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from hotcold.model.spec import ModelSpec
from hotcold.progress import Progress

__all__ = ["LayerActivity", "PlantedModel", "firing_frequencies", "pseudo_text"]

_POOL = (
    1 << 24
) + 43  # normal numbers shared by all matrices; odd, so that no two rows of a matrix are the same
_MEAN = 1.0  # of an embedding's common part, against a token's own part of 1: enough to move gates by
_GROWTH = 0.2  # rms of what attention and FFN add, against that of the residual stream
_MOST = 0.98  # the greatest firing frequency: an offset for 1 would be infinite
_CALIBRATION_TOKENS = 256


@dataclass(frozen=True, slots=True)
class _Layer:
    """What is needed to regenerate a layer's matrices.

    `basis` float32 [rank, d_model] has orthonormal rows, the first of them m; `offsets` float32 [d_ff] are b.
    """

    basis: np.ndarray
    offsets: np.ndarray
    attention_scale: float
    down_scale: float


@dataclass(frozen=True, slots=True)
class LayerActivity:
    """One layer on the calibration tokens, as data for training a predictor.

    `inputs` float32 [tokens, d_model] is the residual stream before the FFN norm; `fired` is bool
    [tokens, d_ff]. But for its noise a gate is `factors` [d_ff, rank] times `basis` [rank, d_model] times h.
    """

    inputs: np.ndarray
    fired: np.ndarray
    basis: np.ndarray
    factors: np.ndarray


class PlantedModel:
    """A `WeightSource`: a ReLU Llama of the given shape whose neurons fire with mean sparsity `sparsity`.

    `rank` is the dimension of the planted subspace and m together, `noise` the norm of a gate row's noise
    against 1 of its planted part. `stored` rounds a gate matrix as quantization does, because that decides
    what fires. Norms are ones; matrices are float32.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        sparsity: float,
        rank: int,
        noise: float,
        stored: Callable[[np.ndarray], np.ndarray],
        seed: int = 0,
    ) -> None:
        self.config, self.sparsity, self.rank, self.noise, self.seed = config, sparsity, rank, noise, seed
        self._stored = stored
        self.spec = ModelSpec.from_config(config, where="synthetic")
        self._pool = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32)
        self._layers: list[_Layer] = []

    # --- WeightSource

    path = Path("synthetic")

    @property
    def quantized_types(self) -> list[str]:
        """None: the weights are generated, not read."""
        return []

    def names(self) -> set[str]:
        """The names of all tensors, as Hugging Face has them."""
        per_layer = [*_NORMS, *_SHAPES]
        names = {f"model.layers.{i}.{name}.weight" for i in range(self.spec.n_layers) for name in per_layer}
        head = set() if self.spec.tied else {"lm_head.weight"}
        return names | head | {"model.embed_tokens.weight", "model.norm.weight"}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        parts = name.removesuffix(".weight").split(".", 3)
        if len(parts) == 4 and parts[3] in _SHAPES:
            return _SHAPES[parts[3]](self.spec)
        is_vector = "norm" in name
        return (self.spec.d_model,) if is_vector else (self.spec.n_vocab, self.spec.d_model)

    def load(self, name: str) -> np.ndarray:
        """One tensor, float32; those of a layer once it is calibrated."""
        if "norm" in name:
            return np.ones(self.shape(name), np.float32)
        if name == "model.embed_tokens.weight":
            return self._random(name) + _MEAN * self._common()
        if name == "lm_head.weight":
            return self._random(name) / self.spec.d_model**0.5
        layer, kind = int(name.split(".")[2]), name.split(".")[-2]
        planted = self._layers[layer]
        if kind == "gate_proj":
            return self._gate(name, planted.basis) + np.outer(planted.offsets, planted.basis[0])
        scales = {"o_proj": planted.attention_scale, "down_proj": planted.down_scale}
        return self._unit(name) * np.float32(scales.get(kind, 1.0))

    # --- making it

    def calibrate(self) -> Iterator[LayerActivity]:
        """Generate the layers one after the other; yields the activity of some tokens in each."""
        ids = pseudo_text(self.spec.n_vocab, _CALIBRATION_TOKENS, seed=self.seed + 1)
        x = self.load("model.embed_tokens.weight")[ids]
        with Progress("calibrate", total=self.spec.n_layers, unit="layer") as progress:
            for layer in range(self.spec.n_layers):
                x, activity = self._calibrate_layer(layer, x)
                yield activity
                progress.advance(1)

    def _calibrate_layer(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, LayerActivity]:
        """x [tokens, d_model] after the layer, and what was seen in it."""
        name = f"model.layers.{layer}"
        added = self._attention(name, _rms_norm(x))
        attention_scale = _GROWTH * _rms(x) / _rms(added)
        x = x + attention_scale * added
        h = _rms_norm(x)
        basis = self._basis(name, h)
        matrix = self._gate(f"{name}.mlp.gate_proj.weight", basis)
        offsets = self._offsets(name, h @ matrix.T, h @ basis[0])
        matrix = self._stored(matrix + np.outer(offsets, basis[0]))
        gates = h @ matrix.T  # [tokens, d_ff]
        activity = LayerActivity(x, gates > 0, basis, matrix @ basis.T)
        added = np.maximum(gates, 0) * (h @ self._unit(f"{name}.mlp.up_proj.weight").T)
        added = added @ self._unit(f"{name}.mlp.down_proj.weight").T
        down_scale = _GROWTH * _rms(x) / _rms(added)
        self._layers.append(_Layer(basis, offsets, attention_scale, down_scale))
        return x + down_scale * added, activity

    def _basis(self, name: str, h: np.ndarray) -> np.ndarray:
        """Orthonormal rows [rank, d_model]: the mean direction of h, then random ones."""
        rng = np.random.default_rng(_number(name, self.seed))
        directions = rng.standard_normal((self.rank, self.spec.d_model), dtype=np.float32)
        directions[0] = h.mean(axis=0)
        basis = np.linalg.qr(directions.T)[0].T
        return np.ascontiguousarray(basis * np.sign(basis[0] @ directions[0]), dtype=np.float32)

    def _gate(self, name: str, basis: np.ndarray) -> np.ndarray:
        """Gate rows without offsets [d_ff, d_model]: the planted part has rows of norm 1."""
        factors = self._pooled(name + ".factors", (self.spec.d_ff, self.rank - 1))
        planted = (factors / np.float32((self.rank - 1) ** 0.5)) @ basis[1:]
        planted += self._unit(name) * np.float32(self.noise)
        return planted

    def _offsets(self, name: str, gates: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """b [d_ff] such that gate + b·mean is above 0 as often as planned.

        `gates` is [tokens, d_ff], `mean` [tokens] the input's part along m. Over tokens their ratio is nearly
        normal, so that its mean and deviation tell every frequency.
        """
        planned = firing_frequencies(self.spec.d_ff, 1 - self.sparsity)
        planned = np.random.default_rng(_number(name, self.seed + 1)).permutation(planned)
        ratio = gates / mean[:, None]
        quantile = np.vectorize(NormalDist().inv_cdf)(planned)
        return (ratio.std(axis=0) * quantile - ratio.mean(axis=0)).astype(np.float32)

    def _attention(self, name: str, h: np.ndarray) -> np.ndarray:
        """Causal attention of a sequence h [tokens, d_model], unscaled."""
        spec = self.spec
        q, k, v = (
            (h @ self._unit(f"{name}.self_attn.{kind}_proj.weight").T).reshape(len(h), -1, spec.head_dim)
            for kind in "qkv"
        )
        q, k = (_rope(part, spec.rope_theta) for part in (q, k))
        k, v = (np.repeat(part, spec.n_heads // spec.n_kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("thd,shd->hts", q, k, optimize=True) / np.float32(spec.head_dim**0.5)
        scores += np.triu(np.full(scores.shape[1:], -np.inf, np.float32), 1)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", weights, v, optimize=True).reshape(len(h), -1)
        return mixed @ self._unit(f"{name}.self_attn.o_proj.weight").T

    # --- random numbers

    def _common(self) -> np.ndarray:
        """The part [d_model] that all embeddings have in common."""
        return self._pooled("common", (self.spec.d_model,))

    def _unit(self, name: str) -> np.ndarray:
        """A random matrix that keeps the variance of what it is applied to."""
        shape = self.shape(name)
        return self._pooled(name, shape) / np.float32(shape[-1] ** 0.5)

    def _random(self, name: str) -> np.ndarray:
        return self._pooled(name, self.shape(name))

    def _pooled(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Normal numbers from the pool; the name tells where to begin. Drawing them would take minutes."""
        out = np.empty(int(np.prod(shape)), np.float32)
        start, done = _number(name, self.seed) % _POOL, 0
        while done < len(out):
            piece = self._pool[start : start + len(out) - done]
            out[done : done + len(piece)] = piece
            start, done = 0, done + len(piece)
        return out.reshape(shape)


_NORMS = ("input_layernorm", "post_attention_layernorm")
_SHAPES = {
    "self_attn.q_proj": lambda spec: (spec.n_heads * spec.head_dim, spec.d_model),
    "self_attn.k_proj": lambda spec: (spec.n_kv_heads * spec.head_dim, spec.d_model),
    "self_attn.v_proj": lambda spec: (spec.n_kv_heads * spec.head_dim, spec.d_model),
    "self_attn.o_proj": lambda spec: (spec.d_model, spec.n_heads * spec.head_dim),
    "mlp.gate_proj": lambda spec: (spec.d_ff, spec.d_model),
    "mlp.up_proj": lambda spec: (spec.d_ff, spec.d_model),
    "mlp.down_proj": lambda spec: (spec.d_model, spec.d_ff),
}


def firing_frequencies(d_ff: int, mean: float) -> np.ndarray:
    """Frequencies min(_MOST, c / k), k = 1 … d_ff, with c such that their mean is `mean`; float64 [d_ff]."""
    ranks = np.arange(1, d_ff + 1)
    low, high = 0.0, float(d_ff)
    for _ in range(60):  # bisection: the mean grows with c
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(_MOST, middle / ranks).mean() < mean else (low, middle)
    return np.minimum(_MOST, high / ranks)


def pseudo_text(n_vocab: int, n_tokens: int, seed: int) -> np.ndarray:
    """Token ids with the frequencies of words in a text (Zipf's law), int32 [n_tokens]; no text at all."""
    weights = 1 / np.arange(1, n_vocab + 1)
    by_rank = np.random.default_rng(0).permutation(n_vocab)
    ranks = np.random.default_rng(seed).choice(n_vocab, n_tokens, p=weights / weights.sum())
    return by_rank[ranks].astype(np.int32)


def _number(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _rms_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-5)


def _rope(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotate pairs (i, i + head_dim/2) of x [tokens, heads, head_dim] by their position."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = (f(angle).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
