"""The oracle: a slow, plain float32 torch model with the interface of `hotcold.runtime.engine.Engine`.

It computes every neuron and then masks those that a mode would have skipped, so that each formula stands
here as it does in docs/architecture.md. All engine tests compare with it; nothing in it is meant to be fast.

Two GGUF layouts exist and both are read, by `hotcold.model.weights`: PowerInfer's, by neurons and with
predictors, and the dense one of stock llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hotcold.errors import InputError, UnsupportedError
from hotcold.files.gguf import Tensor as Stored
from hotcold.files.gguf_split import open_gguf
from hotcold.files.quantize import dequantize
from hotcold.model.firing import Rule, Score, Value
from hotcold.model.inputs import least_inputs
from hotcold.model.limits import check_tokens
from hotcold.model.spec import ModelSpec
from hotcold.model.tensors import PROJECTIONS
from hotcold.model.weights import FileWeights, Packed
from hotcold.predictor.kinds.table import Kind
from hotcold.runtime.bundle_files import file_of_role
from hotcold.runtime.context import check_context
from hotcold.runtime.predictors import read_predictors
from hotcold.runtime.stats import Stats

__all__ = ["ReferenceEngine"]

MODES = ("auto", "dense", "exact", "predicted")


@dataclass(frozen=True, slots=True)
class _Predictor:
    """A neuron is computed iff it is hot or its score, as the kind tells, reaches the threshold."""

    kind: Kind
    fc1: Tensor  # [rank, d_model]
    fc2: Tensor  # [d_ff, rank]
    bias: Tensor | None  # [d_ff]
    threshold: float
    hot: Tensor  # bool [d_ff]

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        """bool [tokens, d_ff] for the residual stream x before the norm, and h after it."""
        hidden = (h if self.kind.normed else x) @ self.fc1.T
        scores = (torch.relu(hidden) if self.kind.relu else hidden) @ self.fc2.T
        return self.hot | (scores + (0 if self.bias is None else self.bias) >= self.threshold)


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor  # [rows, columns]
    bias: Tensor | None  # [rows]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


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
    gate: _Linear  # [d_ff, d_model]
    up: _Linear | None  # [d_ff, d_model]
    down: Tensor  # [d_ff, d_model], the transpose of HF's
    down_bias: Tensor | None
    window: int  # positions that a query sees; 0: all
    thresholds: Tensor  # [d_ff], or of no dimension
    predictor: _Predictor | None


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values))


def _linear(weights: FileWeights, slot: str, layer: int) -> _Linear:
    bias = weights.vector(slot, layer, "bias")
    return _Linear(_tensor(weights.floats(slot, layer)), None if bias is None else _tensor(bias))


def _norm(weights: FileWeights, slot: str, layer: int = 0) -> _Norm:
    both = _linear(weights, slot, layer)
    return _Norm(both.weight, both.bias, weights.spec.norm_eps)


def _predictors(weights: FileWeights) -> list[_Predictor | None]:
    """None for every layer of a file without them."""
    if not weights.has("fc1"):
        return [None] * weights.spec.n_layers
    return [
        _Predictor(
            kind=one.kind,
            fc1=_unpacked(one.fc1()),
            fc2=_unpacked(one.fc2()),
            bias=None if (bias := one.bias()) is None else torch.from_numpy(bias),
            threshold=one.threshold,
            hot=torch.from_numpy(one.hot),
        )
        for one in read_predictors(weights)
    ]


def _unpacked(matrix: Packed) -> Tensor:
    return _tensor(dequantize(Stored("", (matrix.n, matrix.width), matrix.type, matrix.data)))


def _read_layer(weights: FileWeights, i: int, predictor: _Predictor | None) -> _Layer:
    spec = weights.spec
    down = _linear(weights, "down_rows", i)
    heads = {
        slot: _norm(weights, slot, i) if spec.structure.head_norm else None for slot in ("q_norm", "k_norm")
    }
    return _Layer(
        **{slot: _linear(weights, slot, i) for slot in (*PROJECTIONS, "gate")},
        **{slot: _norm(weights, slot, i) for slot in ("attn_norm", "ffn_norm")},
        **heads,
        up=_linear(weights, "up", i) if spec.structure.gated else None,
        down=down.weight,
        down_bias=down.bias,
        window=spec.windows[i],
        thresholds=torch.tensor(spec.firing.thresholds[i]),
        predictor=predictor,
    )


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


def _rope(x: Tensor, positions: Tensor, shape: ModelSpec) -> Tensor:
    """Rotate pairs (i, i + head_dim/2) of x [tokens, heads, head_dim] by position · frequency i."""
    frequency = torch.from_numpy(shape.rope_frequencies).double()
    angle = (positions[:, None] * frequency).float()[:, None, :]  # [tokens, 1, half]
    scale = shape.rope.attention_factor
    cos, sin = angle.cos() * scale, angle.sin() * scale
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class ReferenceEngine:
    """One sequence of tokens through a bundle's model; its contract is that of `Engine`."""

    def __init__(self, path: Path, mode: str, n_ctx: int) -> None:
        """Read the GGUF file `path`; `mode` is `dense`, `exact` or `predicted`."""
        file = open_gguf(path)
        weights = FileWeights.read(file)
        self._path, self._shape = path, weights.spec
        check_context(file, self._shape, n_ctx)
        self._embedding, self._head = (_tensor(weights.floats(slot)) for slot in ("embedding", "head"))
        self._output_norm = _norm(weights, "output_norm")
        learned = self._shape.structure.learned_positions
        self._learned = _tensor(weights.floats("positions")) if learned else None
        self._layers = [_read_layer(weights, i, one) for i, one in enumerate(_predictors(weights))]
        self._least = {
            site: torch.from_numpy(least) for site, least in least_inputs(file, self._shape).items()
        }
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
        self._inputs = dict.fromkeys(self._least, (0, 0))

    def stats(self) -> Stats:
        """What was computed since `reset_stats()`."""
        counts = self._fired.copy(), self._predicted.copy(), self._missed.copy()
        return Stats(self._tokens, self._shape.d_ff, *counts, audit=self.audit, inputs=dict(self._inputs))

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
            x = (
                x
                + attention
                + self._ffn(i, x if self._shape.structure.parallel else x + attention, positions)
            )
        self._tokens += len(tokens)
        x = self._output_norm(x if all_logits else x[-1])
        return (x @ self._head.T).numpy()

    def _counted(self, site: str, i: int, x: Tensor, positions: Tensor) -> Tensor:
        """x [tokens, inputs] with 0 for what layer i leaves out there, in each token but the first of all."""
        if site not in self._least:
            return self._largest(x, positions) if site in ("qkv", "o") else x
        x = torch.where((x.abs() >= self._least[site][i]) | (positions[:, None] == 0), x, 0.0)
        seen, kept = self._inputs[site]
        self._inputs[site] = seen + x.numel(), kept + int(x.count_nonzero())
        return x

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
        h = self._counted("qkv", i, layer.attn_norm(x), positions)
        q, k, v = (part(h).unflatten(-1, (-1, shape.head_dim)) for part in (layer.q, layer.k, layer.v))
        q, k = (layer.q_norm(q), layer.k_norm(k)) if layer.q_norm and layer.k_norm else (q, k)
        if shape.rope:
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
        return layer.o(self._counted("o", i, heads, positions))

    def _ffn(self, i: int, x: Tensor, positions: Tensor) -> Tensor:
        """The FFN of layer i on the residual x [tokens, d_model], with the neurons of this mode."""
        layer, shape = self._layers[i], self._shape
        h = self._counted("gate_up", i, layer.ffn_norm(x), positions)
        gate, up = layer.gate(h), layer.up(h) if layer.up else 1.0
        a = _gated(shape.firing.rule, gate, up, layer.thresholds)  # [tokens, d_ff]
        computed = torch.ones_like(a, dtype=torch.bool)
        if self.mode == "predicted":
            computed = layer.predictor(x, h)
            # The first token of a context becomes the attention sink of all others (arXiv 2402.17762):
            # a neuron missed there costs every later token, so it is computed in full.
            computed[positions == 0] = True
        fires = a != 0
        self._fired[i] += int((fires & computed).sum())
        self._predicted[i] += int(computed.sum())
        if self.audit:
            self._missed[i] += int((fires & ~computed).sum())
        out = self._counted("down", i, torch.where(computed, a, 0.0), positions) @ layer.down
        return out if layer.down_bias is None else out + layer.down_bias
