"""The oracle: a slow, plain float32 torch model with the interface of `hotcold.runtime.engine.Engine`.

It computes every neuron and then masks those that a mode would have skipped, so that each formula stands
here as it does in docs/architecture.md. All engine tests compare with it; nothing in it is meant to be fast.

Two GGUF layouts exist and both are read: PowerInfer's (`PWRI`: neuron-major `ffn_down_t`, predictors `fc1`,
`fc2`) and the dense one of stock llama.cpp: `llama` for SiLU models, one-expert `smallthinker` for ReLU ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hotcold.convert.gguf_read import GGUFFile
from hotcold.convert.quantize import dequantize
from hotcold.errors import FormatError, InputError, UnsupportedError
from hotcold.runtime.bundle_files import file_of_role
from hotcold.runtime.shape import ModelShape, activation_thresholds, read_predictors
from hotcold.runtime.stats import Stats

__all__ = ["ReferenceEngine"]

MODES = ("auto", "dense", "exact", "predicted")


class _Weights:
    """Tensors of one file as float32, and a record of which were asked for."""

    def __init__(self, file: GGUFFile, path: Path) -> None:
        self._file, self._path, self._unread = file, path, set(file.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._file.tensors

    def __call__(self, name: str) -> Tensor:
        if name not in self:
            raise FormatError("missing tensor", where=self._path, field=name)
        self._unread.discard(name)
        return torch.from_numpy(np.array(dequantize(self._file.tensors[name])))

    def check_all_read(self) -> None:
        """An unused tensor (a bias, a rope table) means another function than the one computed here."""
        if self._unread:
            raise UnsupportedError(
                "the model has tensors of an unknown kind", where=self._path, got=min(self._unread)
            )


@dataclass(frozen=True, slots=True)
class _Predictor:
    """A neuron is computed iff hot or `fc2 · relu(fc1 · x) >= threshold`; x: residual before the norm."""

    fc1: Tensor  # [rank, d_model]
    fc2: Tensor  # [d_ff, rank]
    threshold: float
    hot: Tensor  # bool [d_ff]

    def __call__(self, x: Tensor) -> Tensor:
        logits = torch.relu(x @ self.fc1.T) @ self.fc2.T
        return self.hot | (logits >= self.threshold)


@dataclass(frozen=True, slots=True)
class _Layer:
    attn_norm: Tensor  # [d_model]
    q: Tensor  # [n_heads * head_dim, d_model]
    k: Tensor  # [n_kv_heads * head_dim, d_model]
    v: Tensor  # [n_kv_heads * head_dim, d_model]
    o: Tensor  # [d_model, n_heads * head_dim]
    ffn_norm: Tensor  # [d_model]
    gate: Tensor  # [d_ff, d_model]
    up: Tensor  # [d_ff, d_model]
    down: Tensor  # [d_ff, d_model], the transpose of HF's
    activation_threshold: float
    predictor: _Predictor | None


def _read_ffn(weights: _Weights, block: str) -> dict[str, Tensor]:
    if f"{block}.ffn_down_t.weight" in weights:
        down = weights(f"{block}.ffn_down_t.weight")
        return {
            "gate": weights(f"{block}.ffn_gate.weight"),
            "up": weights(f"{block}.ffn_up.weight"),
            "down": down,
        }
    if f"{block}.ffn_down_exps.weight" in weights:
        # One expert; its router only ever chooses between one, so its softmax weight is 1.
        weights(f"{block}.ffn_gate_inp.weight")
        gate, up, down = (weights(f"{block}.ffn_{part}_exps.weight")[0] for part in ("gate", "up", "down"))
    else:
        gate, up, down = (weights(f"{block}.ffn_{part}.weight") for part in ("gate", "up", "down"))
    return {"gate": gate, "up": up, "down": down.T.contiguous()}


def _predictors(file: GGUFFile, weights: _Weights, shape: ModelShape) -> list[_Predictor | None]:
    """None for every layer of a dense file."""
    if "blk.0.fc1.weight" not in weights:
        return [None] * shape.n_layers
    return [
        _Predictor(
            fc1=weights(f"blk.{i}.fc1.weight"),
            fc2=weights(f"blk.{i}.fc2.weight"),
            threshold=predictor.threshold,
            hot=torch.from_numpy(predictor.hot),
        )
        for i, predictor in enumerate(read_predictors(file, shape))
    ]


def _read_layers(file: GGUFFile, weights: _Weights, shape: ModelShape) -> list[_Layer]:
    predictors = _predictors(file, weights, shape)
    thresholds = activation_thresholds(file, shape.n_layers)
    return [
        _Layer(
            attn_norm=weights(f"blk.{i}.attn_norm.weight"),
            q=weights(f"blk.{i}.attn_q.weight"),
            k=weights(f"blk.{i}.attn_k.weight"),
            v=weights(f"blk.{i}.attn_v.weight"),
            o=weights(f"blk.{i}.attn_output.weight"),
            ffn_norm=weights(f"blk.{i}.ffn_norm.weight"),
            **_read_ffn(weights, f"blk.{i}"),
            activation_threshold=thresholds[i],
            predictor=predictors[i],
        )
        for i in range(shape.n_layers)
    ]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _gated(activation: str, gate: Tensor, up: Tensor, threshold: float) -> Tensor:
    """act(gate)·up, the neuron's value; a neuron fires iff this is not zero."""
    match activation:
        case "relu":
            return torch.relu(gate) * up
        case "fatrelu":  # ProSparse eq. 3: the value is kept, not shifted
            return torch.where(gate >= threshold, gate, 0.0) * up
        case "drelu":  # TurboSparse: both branches are rectified
            return torch.relu(gate) * torch.relu(up)
        case _:  # ModelShape knows no other activation than these and SiLU
            return torch.nn.functional.silu(gate) * up


def _rope(x: Tensor, positions: Tensor, base: float, interleaved: bool) -> Tensor:
    """Rotate pairs of x [tokens, heads, head_dim]; pair i turns by position · base^(-2i/head_dim).

    Pairs are neighbours (2i, 2i+1) if `interleaved`, else (i, i + head_dim/2), which llama.cpp calls NEOX.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (positions[:, None] * frequency).float()[:, None, :]  # [tokens, 1, half]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


class ReferenceEngine:
    """One sequence of tokens through a bundle's model; its contract is that of `Engine`."""

    def __init__(self, path: Path, mode: str, n_ctx: int) -> None:
        """Read the GGUF file `path`; `mode` is `dense`, `exact` or `predicted`."""
        file = GGUFFile(path)
        weights = _Weights(file, path)
        self._path, self._shape = path, ModelShape.read(file)
        self._embedding = weights("token_embd.weight")  # [n_vocab, d_model]
        self._head = weights("output.weight") if "output.weight" in weights else self._embedding
        self._output_norm = weights("output_norm.weight")
        self._layers = _read_layers(file, weights, self._shape)
        weights.check_all_read()
        if mode == "predicted" and self._layers[0].predictor is None:
            raise UnsupportedError("no predictors in this file", where=path, fix="use --mode exact")
        self.mode, self.n_ctx, self.audit = mode, n_ctx, False
        # float16 rounds keys and values as the native engine's cache does; for comparisons with it.
        self.cache_dtype = torch.float32
        self.n_vocab, self.n_threads = len(self._embedding), torch.get_num_threads()
        self.reset()
        self.reset_stats()

    @classmethod
    def load(
        cls, bundle: str | Path, mode: str = "auto", n_threads: int | None = None, n_ctx: int = 2048
    ) -> ReferenceEngine:
        """Open a bundle folder. `auto` means `predicted` here; `n_threads` is torch's, for the whole process.

        Raises InputError for what is no bundle or no mode, UnsupportedError for a model of an unknown kind.
        """
        if mode not in MODES:
            raise InputError("unknown mode", got=mode, expected=", ".join(MODES))
        if n_threads is not None:
            torch.set_num_threads(n_threads)
        role = "dense" if mode == "dense" else "sparse"
        return cls(file_of_role(bundle, role), "predicted" if mode == "auto" else mode, n_ctx)

    @property
    def position(self) -> int:
        """Number of tokens in the cache."""
        return len(self._keys[0])

    def reset(self) -> None:
        """Forget all tokens."""
        shape = self._shape
        self._keys = [torch.empty(0, shape.n_kv_heads, shape.head_dim) for _ in self._layers]
        self._values = [torch.empty(0, shape.n_kv_heads, shape.head_dim) for _ in self._layers]

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._tokens = 0
        self._fired, self._predicted, self._missed = np.zeros((3, self._shape.n_layers), np.int64)

    def stats(self) -> Stats:
        """What was computed since `reset_stats()`."""
        counts = self._fired.copy(), self._predicted.copy(), self._missed.copy()
        return Stats(self._tokens, len(self._layers[0].up), *counts, audit=self.audit)

    def decode(self, token: int) -> np.ndarray:
        """Append one token; logits of the next one, float32 [n_vocab]."""
        return self.prefill([token])

    @torch.no_grad()
    def prefill(self, ids: Sequence[int], all_logits: bool = False) -> np.ndarray:
        """Append tokens; logits after the last one, float32 [n_vocab], or after each, [len(ids), n_vocab]."""
        tokens = torch.as_tensor(np.asarray(ids, np.int64))
        self._check(tokens)
        x = self._embedding[tokens]  # the residual stream, [tokens, d_model]
        positions = torch.arange(self.position, self.position + len(tokens))
        for i in range(len(self._layers)):
            x = x + self._attention(i, x, positions)
            x = x + self._ffn(i, x, positions)
        self._tokens += len(tokens)
        x = _rms_norm(x if all_logits else x[-1], self._output_norm, self._shape.norm_eps)
        return (x @ self._head.T).numpy()

    def _check(self, tokens: Tensor) -> None:
        if tokens.ndim != 1 or not len(tokens):
            raise InputError("no tokens to compute")
        if self.position + len(tokens) > self.n_ctx:
            raise InputError(
                "the context is full", got=self.position + len(tokens), expected=f"at most {self.n_ctx}"
            )
        if tokens.min() < 0 or tokens.max() >= self.n_vocab:
            worst = int(tokens.max()) if tokens.min() >= 0 else int(tokens.min())
            raise InputError(
                "token id outside of the vocabulary", got=worst, expected=f"0 to {self.n_vocab - 1}"
            )

    def _attention(self, i: int, x: Tensor, positions: Tensor) -> Tensor:
        """Causal attention of layer i; x [tokens, d_model] is also what enters the cache."""
        layer, shape = self._layers[i], self._shape
        h = _rms_norm(x, layer.attn_norm, shape.norm_eps)
        q, k, v = ((h @ w.T).unflatten(-1, (-1, shape.head_dim)) for w in (layer.q, layer.k, layer.v))
        q = _rope(q, positions, shape.rope_base, shape.interleaved_rope)
        k = _rope(k, positions, shape.rope_base, shape.interleaved_rope)
        self._keys[i] = torch.cat([self._keys[i], k.to(self.cache_dtype).float()])
        self._values[i] = torch.cat([self._values[i], v.to(self.cache_dtype).float()])
        # Grouped-query attention: each key/value head serves a run of consecutive query heads.
        group = shape.n_heads // shape.n_kv_heads
        keys = self._keys[i].repeat_interleave(group, 1)
        values = self._values[i].repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", q, keys) / shape.head_dim**0.5
        future = torch.arange(len(keys)) > positions[:, None]  # [tokens, cached]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, values).flatten(1) @ layer.o.T

    def _ffn(self, i: int, x: Tensor, positions: Tensor) -> Tensor:
        """The FFN of layer i on the residual x [tokens, d_model], with the neurons of this mode."""
        layer, shape = self._layers[i], self._shape
        h = _rms_norm(x, layer.ffn_norm, shape.norm_eps)
        gate, up = h @ layer.gate.T, h @ layer.up.T
        a = _gated(shape.activation, gate, up, layer.activation_threshold)  # [tokens, d_ff]
        computed = torch.ones_like(a, dtype=torch.bool)
        if self.mode == "predicted":
            computed = layer.predictor(x)
            # The first token of a context becomes the attention sink of all others (arXiv 2402.17762):
            # a neuron missed there costs every later token, so it is computed in full.
            computed[positions == 0] = True
        fires = a != 0
        self._fired[i] += int((fires & computed).sum())
        self._predicted[i] += int(computed.sum())
        if self.audit:
            self._missed[i] += int((fires & ~computed).sum())
        return torch.where(computed, a, 0.0) @ layer.down
