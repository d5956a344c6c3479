"""The oracle: a slow, plain float32 torch model with the interface of `hotcold.runtime.engine.Engine`.

It computes every neuron and then masks those that a mode would have skipped, so that each formula stands
here as it does in docs/architecture.md. All engine tests compare with it; nothing in it is meant to be fast.

Two GGUF layouts exist and both are read: PowerInfer's (`PWRI`: neuron-major `ffn_down_t`, predictors `fc1`,
`fc2`) and the dense one of stock llama.cpp. What the architectures are is told in `hotcold.model.forms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hotcold.errors import FormatError, InputError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.files.gguf_split import open_gguf
from hotcold.files.quantize import dequantize
from hotcold.model.firing import Rule, Score, Value, threshold_tensor
from hotcold.model.limits import check_tokens
from hotcold.runtime.bundle_files import file_of_role
from hotcold.runtime.shape import ModelShape, check_context, read_predictors
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

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None where the file has none of this name."""
        return self(name) if name in self else None

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
class _Linear:
    weight: Tensor  # [rows, columns]
    bias: Tensor | None  # [rows]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def rows(self, first: int, n: int) -> _Linear:
        part = slice(first, first + n)
        return _Linear(self.weight[part], None if self.bias is None else self.bias[part])


@dataclass(frozen=True, slots=True)
class _Norm:
    """RMSNorm, or with a bias LayerNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


@dataclass(frozen=True, slots=True)
class _Layer:
    attn_norm: _Norm
    q: _Linear  # [n_heads * head_dim, d_model]
    k: _Linear  # [n_kv_heads * head_dim, d_model]
    v: _Linear  # [n_kv_heads * head_dim, d_model]
    q_norm: _Norm | None  # of each head
    k_norm: _Norm | None
    o: _Linear  # [d_model, n_heads * head_dim]
    ffn_norm: _Norm
    gate: _Linear | None  # [d_ff, d_model]
    up: _Linear  # [d_ff, d_model]
    down: Tensor  # [d_ff, d_model], the transpose of HF's
    down_bias: Tensor | None
    window: int  # positions that a query sees; 0: all
    thresholds: Tensor  # [d_ff], or of no dimension
    predictor: _Predictor | None


def _linear(weights: _Weights, name: str, expert: bool = False) -> _Linear:
    weight = weights(f"{name}.weight")
    return _Linear(weight[0] if expert else weight, weights.get(f"{name}.bias"))


def _norm(weights: _Weights, shape: ModelShape, name: str) -> _Norm:
    bias = weights(f"{name}.bias") if shape.form.layer_norm else None
    return _Norm(weights(f"{name}.weight"), bias, shape.norm_eps)


def _read_attention(weights: _Weights, shape: ModelShape, block: str) -> dict[str, object]:
    # llama.cpp's Falcon: attn_norm is that of the FFN, and of attention too unless this has its own
    own = "attn_norm_2" if f"{block}.attn_norm_2.weight" in weights else "attn_norm"
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    if shape.form.fused_qkv:
        fused = _linear(weights, f"{block}.attn_qkv")
        projections = [fused.rows(0, q), fused.rows(q, kv), fused.rows(q + kv, kv)]
    else:
        projections = [_linear(weights, f"{block}.attn_{slot}") for slot in "qkv"]
    norms = {
        f"{slot}_norm": _norm(weights, shape, f"{block}.attn_{slot}_norm") if shape.form.head_norm else None
        for slot in "qk"
    }
    return {
        "attn_norm": _norm(weights, shape, f"{block}.{own}"),
        "ffn_norm": _norm(weights, shape, f"{block}.{'attn_norm' if shape.form.parallel else 'ffn_norm'}"),
        **dict(zip("qkv", projections, strict=True)),
        **norms,
        "o": _linear(weights, f"{block}.attn_output"),
    }


def _read_ffn(weights: _Weights, shape: ModelShape, block: str) -> dict[str, object]:
    expert = shape.form.experts
    if expert:  # its router only ever chooses between one, so its softmax weight is 1
        weights(f"{block}.ffn_gate_inp.weight")
    suffix = "_exps" if expert else ""
    gate = _linear(weights, f"{block}.ffn_gate{suffix}", expert) if shape.form.gated else None
    up = _linear(weights, f"{block}.ffn_up{suffix}", expert)
    if f"{block}.ffn_down_t.weight" in weights:
        down = _linear(weights, f"{block}.ffn_down_t")
    else:
        down = _linear(weights, f"{block}.ffn_down{suffix}", expert)
        down = _Linear(down.weight.T.contiguous(), down.bias)
    return {"gate": gate, "up": up, "down": down.weight, "down_bias": down.bias}


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
    return [
        _Layer(
            **_read_attention(weights, shape, f"blk.{i}"),
            **_read_ffn(weights, shape, f"blk.{i}"),
            window=shape.windows[i],
            thresholds=_thresholds(weights, shape, i),
            predictor=predictors[i],
        )
        for i in range(shape.n_layers)
    ]


def _thresholds(weights: _Weights, shape: ModelShape, layer: int) -> Tensor:
    each = weights.get(threshold_tensor(layer))
    return torch.tensor(shape.firing.thresholds[layer]) if each is None else each


def _gated(rule: Rule, gate: Tensor, up: Tensor | float, threshold: Tensor) -> Tensor:
    """The neuron's value; a neuron fires iff this is not zero. Without a gate, up is 1."""
    positive = torch.relu(gate)
    match rule.value, rule.score:
        case Value.GATE, Score.GATE_AND_UP:  # TurboSparse: both branches are rectified
            return positive * torch.relu(up)
        case Value.GATE, _:  # ProSparse eq. 3: the value is kept, not shifted
            return torch.where(gate >= threshold, positive, 0.0) * up
        case Value.SQUARE, _:
            return positive**2 * up
        case Value.SHIFTED, _:
            return torch.relu(gate - threshold) * up
    value = {Value.SILU: torch.nn.functional.silu, Value.GELU: torch.nn.functional.gelu}[rule.value](gate)
    if rule.score is Score.ALWAYS:
        return value * up
    score = value.abs() if rule.score is Score.MAGNITUDE else gate
    return value * (score >= threshold) * up


def _rope(x: Tensor, positions: Tensor, shape: ModelShape) -> Tensor:
    """Rotate pairs of x [tokens, heads, head_dim]; pair i turns by position · frequency i.

    Pairs are neighbors (2i, 2i+1) if interleaved, else (i, i + head_dim/2), which llama.cpp calls NEOX.
    """
    half, interleaved = x.shape[-1] // 2, shape.form.interleaved
    frequency = torch.from_numpy(shape.rope_frequencies).double()
    angle = (positions[:, None] * frequency).float()[:, None, :]  # [tokens, 1, half]
    cos, sin = angle.cos() * shape.rope_scale, angle.sin() * shape.rope_scale
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = first * cos - second * sin, first * sin + second * cos
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


class ReferenceEngine:
    """One sequence of tokens through a bundle's model; its contract is that of `Engine`."""

    def __init__(self, path: Path, mode: str, n_ctx: int) -> None:
        """Read the GGUF file `path`; `mode` is `dense`, `exact` or `predicted`."""
        file = open_gguf(path)
        weights = _Weights(file, path)
        self._path, self._shape = path, ModelShape.read(file)
        check_context(file, self._shape, n_ctx)
        self._embedding = weights("token_embd.weight")  # [n_vocab, d_model]
        self._head = weights("output.weight") if "output.weight" in weights else self._embedding
        self._output_norm = _norm(weights, self._shape, "output_norm")
        weights.get("rope_freqs.weight")  # ModelShape has read it
        learned = weights(f"{self._shape.form.positions}.weight") if self._shape.form.positions else None
        self._learned = None if learned is None else learned[self._shape.form.first_position :]
        self._layers = _read_layers(file, weights, self._shape)
        weights.check_all_read()
        if mode == "predicted" and self._layers[0].predictor is None:
            raise UnsupportedError("no predictors in this file", where=path, fix="use --mode exact")
        self.mode, self.n_ctx, self.audit = mode, n_ctx, False
        # float16 rounds keys and values as the native engine's cache does; for comparisons with it.
        self.cache_dtype = torch.float32
        self.input_sparsity = 0.0  # as Engine's; the matrices are those of this file
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
        return Stats(self._tokens, self._shape.d_ff, *counts, audit=self.audit)

    def decode(self, token: int) -> np.ndarray:
        """Append one token; logits of the next one, float32 [n_vocab]."""
        return self.prefill([token])

    @torch.no_grad()
    def prefill(self, ids: Sequence[int], all_logits: bool = False) -> np.ndarray:
        """Append tokens; logits after the last one, float32 [n_vocab], or after each, [len(ids), n_vocab]."""
        checked = np.asarray(ids, np.int64)
        check_tokens(checked, self.position, self.n_ctx, self.n_vocab)
        tokens = torch.as_tensor(checked)
        x = self._embedding[tokens]  # the residual stream, [tokens, d_model]
        positions = torch.arange(self.position, self.position + len(tokens))
        if self._learned is not None:
            x = x + self._learned[positions]
        for i in range(len(self._layers)):
            attention = self._attention(i, x, positions)
            # In a parallel block (Falcon) both read the layer's input.
            x = x + attention + self._ffn(i, x if self._shape.form.parallel else x + attention, positions)
        self._tokens += len(tokens)
        x = self._output_norm(x if all_logits else x[-1])
        return (x @ self._head.T).numpy()

    def _largest(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [tokens, inputs] with the smallest inputs of each token but the first of the context set to 0."""
        if not self.input_sparsity:
            return x
        keep = x.shape[-1] - int(self.input_sparsity * x.shape[-1])
        least = x.abs().topk(keep).values[:, -1:]
        return torch.where((x.abs() >= least) | (positions[:, None] == 0), x, 0.0)

    def _attention(self, i: int, x: Tensor, positions: Tensor) -> Tensor:
        """Causal attention of layer i; x [tokens, d_model] is also what enters the cache."""
        layer, shape = self._layers[i], self._shape
        h = self._largest(layer.attn_norm(x), positions)
        q, k, v = (part(h).unflatten(-1, (-1, shape.head_dim)) for part in (layer.q, layer.k, layer.v))
        q, k = (layer.q_norm(q), layer.k_norm(k)) if layer.q_norm and layer.k_norm else (q, k)
        if not shape.form.positions:
            q, k = _rope(q, positions, shape), _rope(k, positions, shape)
        self._keys[i] = torch.cat([self._keys[i], k.to(self.cache_dtype).float()])
        self._values[i] = torch.cat([self._values[i], v.to(self.cache_dtype).float()])
        # Grouped-query attention: each key/value head serves a run of consecutive query heads.
        group = shape.n_heads // shape.n_kv_heads
        keys = self._keys[i].repeat_interleave(group, 1)
        values = self._values[i].repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", q, keys) / shape.head_dim**0.5
        distance = positions[:, None] - torch.arange(len(keys))  # [tokens, cached]
        unseen = (distance < 0) | (distance >= (layer.window or len(keys)))
        weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
        heads = torch.einsum("hts,shd->thd", weights, values).flatten(1)
        return layer.o(self._largest(heads, positions))

    def _ffn(self, i: int, x: Tensor, positions: Tensor) -> Tensor:
        """The FFN of layer i on the residual x [tokens, d_model], with the neurons of this mode."""
        layer, shape = self._layers[i], self._shape
        h = layer.ffn_norm(x)
        gate, up = (layer.gate(h), layer.up(h)) if layer.gate else (layer.up(h), 1.0)
        a = _gated(shape.firing.rule, gate, up, layer.thresholds)  # [tokens, d_ff]
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
        out = torch.where(computed, a, 0.0) @ layer.down
        return out if layer.down_bias is None else out + layer.down_bias
