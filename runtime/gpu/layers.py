"""What all device engines do alike: norms, products with rows, rotary attention over a static cache.

The residual stream is float32 throughout. Products of up to MAX_TOKENS tokens go through the operators, which
read each weight once as it is stored; longer prompts through torch's dense products in the weights' type.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hotcold.model.spec import ModelSpec
from hotcold.runtime.gpu.weights import DeviceLayer, DeviceNorm, DeviceWeights
from hotcold.runtime.triton.rows import FLOAT, Rows

__all__ = ["Cache", "Layers", "plus"]

MAX_TOKENS = 8
_SMALLEST_BUCKET = 256


class Cache:
    """Keys and values of the device layers, float16 [layers, n_kv_heads, n_ctx, head_dim], in place."""

    def __init__(self, shape: ModelSpec, n_layers: int, n_ctx: int, device: torch.device) -> None:
        size = (n_layers, shape.n_kv_heads, n_ctx, shape.head_dim)
        self.keys = torch.zeros(size, dtype=torch.float16, device=device)
        self.values = torch.zeros(size, dtype=torch.float16, device=device)
        self.n_ctx = n_ctx

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes

    def bucket(self, used: int) -> int:
        """How much of the cache to look at for `used` tokens: few sizes, so that graphs are replayed."""
        size = _SMALLEST_BUCKET
        while size < used:
            size *= 2
        return min(size, self.n_ctx)


class Layers:
    """The steps of a layer on one device, for `weights` and a cache of `n_ctx` tokens."""

    def __init__(self, weights: DeviceWeights, n_ctx: int, device: torch.device, ops: ModuleType) -> None:
        self.weights, self.shape, self.device, self.ops = weights, weights.shape, device, ops
        self.cache = Cache(weights.shape, len(weights.layers), n_ctx, device)
        # Keys are kept in half precision; a CPU has no fast product of halves.
        self._product_type = torch.float16 if device.type == "cuda" else torch.float32
        frequencies = np.asarray(self.shape.rope_frequencies, np.float64)
        if (
            self.shape.structure.learned_positions
        ):  # learned, and in the residual stream already: nothing turns
            frequencies = np.zeros(self.shape.head_dim // 2)
        angle = torch.arange(n_ctx, dtype=torch.float64)[:, None] * torch.from_numpy(frequencies)
        scale = self.shape.rope.attention_factor if self.shape.rope else 1.0
        # How many inputs counted, by site and layer. 16 bytes apart, as Triton compiles for an alignment.
        self.kept = {
            site: torch.zeros(len(least), 2, dtype=torch.int64, device=device)[:, 0]
            for site, least in weights.least.items()
        }
        self._cos, self._sin = ((scale * part).float().to(device) for part in (angle.cos(), angle.sin()))

    def norm(self, x: Tensor, by: DeviceNorm) -> Tensor:
        """The norm of x [tokens, d_model]."""
        return self.ops.norm(x.contiguous(), by.weight, self.shape.norm_eps, by.bias)

    def add_norm(self, x: Tensor, added: Tensor, by: DeviceNorm) -> tuple[Tensor, Tensor]:
        """x + added, both [tokens, d_model], and the norm of that."""
        return self.ops.add_norm(x, added.contiguous(), by.weight, self.shape.norm_eps, by.bias)

    def counted(self, site: str, i: int, x: Tensor, positions: Tensor) -> Tensor:
        """x [tokens, inputs] with 0 for what layer i's input rule leaves out there, if it has one."""
        least = self.weights.least.get(site)
        if least is None:
            return x
        return self.ops.leave_out(x.contiguous(), least[i], positions, self.kept[site][i])

    def listed_that_count(self, i: int, a: Tensor, index: Tensor, count: Tensor, position: Tensor) -> Tensor:
        """The same of one token's listed neurons, a [1, n] by place in the list: what `down` reads."""
        least = self.weights.least.get("down")
        if least is None:
            return a
        place = torch.arange(a.shape[1], device=a.device)
        of_listed = least[i][index.clamp(0, least.shape[1] - 1).long()]
        of_listed = torch.where(place < count, of_listed, float("inf"))
        return self.ops.leave_out(a.contiguous(), of_listed, position, self.kept["down"][i])

    def dot(self, x: Tensor, w: Rows, bias: Tensor | None = None) -> Tensor:
        """x · wᵀ + bias, float32 [tokens, w.n]."""
        if len(x) <= MAX_TOKENS:
            return self.ops.dot_rows(x.contiguous(), w, bias)
        if self.device.type == "cpu":
            return plus(x @ w.dequantize().T, bias)
        dtype = w.data.dtype if w.kind == FLOAT else torch.float16
        return plus((x.to(dtype) @ w.dequantize(dtype).T).float(), bias)

    def logits(self, x: Tensor) -> Tensor:
        """Logits float32 [tokens, n_vocab] of the residual stream."""
        return self.dot(self.norm(x, self.weights.output_norm), self.weights.head)

    def attention(self, i: int, h: Tensor, positions: Tensor, seen: int) -> Tensor:
        """What layer i's attention adds, h [tokens, d_model] being its input after the norm.

        The tokens enter the cache at `positions`, int64 [tokens] on the device; `seen` bounds the cache
        positions that are looked at.
        """
        layer = self.weights.layers[i]
        q, k, v = self._projections(self.counted("qkv", i, h, positions), layer)
        keys, values = self.cache.keys[i], self.cache.values[i]
        q = self.ops.apply_rope(q, k, v, self._cos, self._sin, positions, keys, values)
        if len(q) <= MAX_TOKENS:
            mixed = self.ops.attend(q, keys, values, positions, seen, layer.window)
        else:
            mixed = self._attend_many(q, keys[:, :seen], values[:, :seen], positions, layer.window)
        return self.dot(self.counted("o", i, mixed, positions), layer.o, layer.o_bias)

    def _projections(self, h: Tensor, layer: DeviceLayer) -> list[Tensor]:
        """q, k and v of h, each [tokens, heads, head_dim]."""
        if len(layer.qkv) == 1:
            qkv = self.dot(h, layer.qkv[0], layer.qkv_bias)
        else:
            qkv = plus(torch.cat([self.dot(h, rows) for rows in layer.qkv], -1), layer.qkv_bias)
        shape, found = self.shape, []
        counts = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
        parts = qkv.split([n * shape.head_dim for n in counts], -1)
        for part, norm in zip(parts, (layer.q_norm, layer.k_norm, None), strict=True):
            heads = part.contiguous().unflatten(-1, (-1, shape.head_dim))
            found.append(heads if norm is None else self.norm(heads.flatten(0, 1), norm).view_as(heads))
        return found

    def _attend_many(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int) -> Tensor:
        """`attend` for a block of a prompt, by torch; keys and values are [kv_heads, seen, head_dim].

        The query heads that share a key-value head are laid out as more queries of it, so that grouped-query
        attention needs no copy of the cache.
        """
        tokens, dtype = len(q), self._product_type
        grouped = q.unflatten(1, (keys.shape[0], -1)).permute(1, 2, 0, 3).flatten(1, 2)
        position = torch.arange(keys.shape[1], device=self.device)
        visible = position <= positions[:, None]
        if window:
            visible &= position > positions[:, None] - window
        visible = visible.repeat(grouped.shape[1] // tokens, 1)
        # Not cuDNN's, which torch prefers on an H100: it plans for long at every new length of a prompt.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = torch.nn.functional.scaled_dot_product_attention(
                grouped[None].to(dtype), keys[None].to(dtype), values[None].to(dtype), attn_mask=visible
            )
        return out[0].float().unflatten(1, (-1, tokens)).permute(2, 0, 1, 3).reshape(tokens, -1)

    def predictions(self, layer: DeviceLayer, x: Tensor, h: Tensor, positions: Tensor) -> Tensor:
        """bool [tokens, d_ff], in the layer's order: the neurons to compute for each token.

        x is the residual stream and h its norm. The first token of a context becomes the attention sink of
        all others (arXiv 2402.17762): all of it.
        """
        predictor = layer.predictor
        hidden = self.dot(predictor.input(x, h), predictor.fc1)
        scores = self.dot(hidden.relu() if predictor.relu else hidden, predictor.fc2, predictor.bias)
        return (scores >= predictor.threshold) | predictor.always | (positions == 0)[:, None]


def plus(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias, where there is one."""
    return x if bias is None else x + bias
