"""What a model's tensors are called and how their rows lie in a file: the only place that knows.

A slot is what a tensor is for: `q`, `attn_norm`, `gate`, … All of hotcold asks for slots. A `Naming` says
where a format has them. Whatever it does, the rows of a slot are the outputs of its matrix, q, k and v are
apart, and the rotary pairs of q and k are half a head apart. `down_rows` is `down` by input, one row per
neuron, and so is any other slot that ends in `_rows`.

Without gates an FFN is `act(x W + b)`: its first matrix decides which neurons fire, so it is the slot `gate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from hotcold.model.spec import ModelSpec

__all__ = [
    "ALL", "FALCON_GGUF", "GGUF", "PROJECTIONS", "ROWS", "UNGATED_GGUF", "Naming", "Shape", "interleave_rope",
    "parts_of", "place", "rows_of", "shape_of", "shapes_of_model", "slots_of", "split_rope",
]  # fmt: skip

Shape = tuple[int, ...]

PROJECTIONS = ("q", "k", "v", "o")
ALL = slice(None)
ROWS = "_rows"  # ends the slot of a matrix by input
_NORMS = ("attn_norm", "ffn_norm")
_HEADS = {"q": "n_heads", "k": "n_kv_heads", "v": "n_kv_heads"}

GGUF = {
    "embedding": "token_embd",
    "positions": "position_embd",
    "output_norm": "output_norm",
    "head": "output",
    "rope_factors": "rope_freqs",
    "attn_norm": "blk.{}.attn_norm",
    "ffn_norm": "blk.{}.ffn_norm",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "qkv": "blk.{}.attn_qkv",
    "o": "blk.{}.attn_output",
    "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
    "router": "blk.{}.ffn_gate_inp",
    "fc1": "blk.{}.fc1",
    "fc2": "blk.{}.fc2",
}
UNGATED_GGUF = GGUF | {"gate": GGUF["up"]}
# Of two norms, that of the FFN has the name that one for both has.
FALCON_GGUF = UNGATED_GGUF | dict.fromkeys(("norm", "ffn_norm"), GGUF["attn_norm"])
FALCON_GGUF["attn_norm"] = "blk.{}.attn_norm_2"


@dataclass(frozen=True, slots=True)
class Naming:
    """Where a format has a model's tensors.

    `names`: slots to names, without `.weight` and `.bias`, those inside a layer with `{}` for its number;
    `norm` is the one norm of a parallel block. `interleaved`: the rotary pairs of q and k are neighbors.
    `fused`: q, k and v are rows of `qkv`, first those of q (`parts`), or for each key-value head its queries,
    key and value (`heads`). `first_position` is the row of the learned position 0.
    """

    names: Mapping[str, str]
    interleaved: bool = False
    fused: str = ""
    first_position: int = 0


def slots_of(spec: ModelSpec) -> Iterator[tuple[str, int]]:
    """Every slot of a model with its layer, 0 outside of them. A head that is the embedding is none."""
    yield from (("embedding", 0), ("output_norm", 0))
    if spec.structure.learned_positions:
        yield "positions", 0
    if not spec.tied:
        yield "head", 0
    head_norms = ("q_norm", "k_norm") if spec.structure.head_norm else ()
    for i, layer in enumerate(spec.layers):
        ffn = {"gated": ("gate", "up", "down"), "ungated": ("gate", "down"), "none": ()}[layer.ffn]
        norms = _NORMS if ffn else _NORMS[:1]
        yield from ((slot, i) for slot in (*norms, *head_norms, *PROJECTIONS, *ffn))


def parts_of(spec: ModelSpec, slot: str) -> tuple[str, ...]:
    """`weight`, and `bias` where the model has one; those of attention lie beside its matrices by output."""
    slot = "down" if slot == "down" + ROWS else slot
    has_bias = slot in spec.biases or (spec.structure.layer_norm and slot.endswith("norm"))
    return ("weight", "bias") if has_bias else ("weight",)


def shape_of(spec: ModelSpec, slot: str, layer: int = 0, part: str = "weight") -> Shape:
    """The shape of a slot, [outputs, inputs] or [n]."""
    if slot.endswith(ROWS):
        shape = shape_of(spec, slot.removesuffix(ROWS), layer)
        return shape[::-1] if part == "weight" else shape[:1]
    d, q, kv = spec.d_model, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    d_ff = spec.layers[layer].d_ff
    matrices = {
        "embedding": (spec.n_vocab, d), "positions": (spec.n_ctx, d), "head": (spec.n_vocab, d), "q": (q, d),
        "k": (kv, d), "v": (kv, d), "o": (d, q), "gate": (d_ff, d), "up": (d_ff, d), "down": (d, d_ff),
    }  # fmt: skip
    vectors = {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
    shape = matrices.get(slot) or vectors.get(slot, (d,))
    return shape if part == "weight" else shape[:1]


def place(
    spec: ModelSpec, naming: Naming, slot: str, layer: int = 0, part: str = "weight"
) -> tuple[str, Shape]:
    """Name and shape of the tensor that holds a slot: as a whole, or in some of its rows."""
    shape = shape_of(spec, slot, layer, part)
    if slot.endswith(ROWS):
        slot, end = slot.removesuffix(ROWS), "_t"
    else:
        end = ""
    if slot in _NORMS and spec.structure.parallel and not spec.two_norms:
        slot = "norm"
    elif slot in _HEADS and naming.fused:
        slot, shape = "qkv", ((spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim, *shape[1:])
    elif slot == "positions":
        shape = (shape[0] + naming.first_position, *shape[1:])
    return f"{naming.names[slot].format(layer)}{end}.{part}", shape


def rows_of(spec: ModelSpec, naming: Naming, slot: str) -> slice | np.ndarray:
    """Which rows of that tensor they are: a slot's row i is row `rows[i]` of the tensor."""
    import numpy as np  # not above: the table of families is imported with `hotcold`

    if slot == "positions":
        return slice(naming.first_position, None)
    if slot not in _HEADS:
        return ALL
    n = getattr(spec, _HEADS[slot]) * spec.head_dim
    if naming.fused == "heads":
        return _rows_of_heads(spec, slot)
    if naming.fused:
        all_rows = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
        first = {"q": 0, "k": all_rows - 2 * n, "v": all_rows - n}[slot]
        return slice(first, first + n)
    if naming.interleaved and slot != "v":
        return split_rope(np.arange(n, dtype=np.int32), n // spec.head_dim)
    return ALL


def _rows_of_heads(spec: ModelSpec, slot: str) -> np.ndarray:
    """Falcon: the queries of a key-value head, then its key and its value, head after head."""
    import numpy as np

    group = spec.n_heads // spec.n_kv_heads
    rows = np.arange(spec.n_kv_heads * (group + 2) * spec.head_dim)
    heads = rows.reshape(spec.n_kv_heads, group + 2, spec.head_dim)
    return {"q": heads[:, :-2], "k": heads[:, -2], "v": heads[:, -1]}[slot].reshape(-1)


def shapes_of_model(spec: ModelSpec, naming: Naming) -> dict[str, Shape]:
    """Name and shape of every tensor that a file of this model must hold."""
    places = (
        place(spec, naming, slot, layer, part)
        for slot, layer in slots_of(spec)
        for part in parts_of(spec, slot)
    )
    return dict(places)


def interleave_rope(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder q/k rows [n_heads·head_dim, ...] from halves (i, i + head_dim/2) to neighbors (2i, 2i + 1).

    Hugging Face rotates the former pairs (NEOX), GGUF's `llama` architecture the latter.
    """
    rows = weight.reshape(n_heads, 2, -1, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def split_rope(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """The inverse of `interleave_rope`."""
    rows = weight.reshape(n_heads, -1, 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)
