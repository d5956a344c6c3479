"""How GGUF files say a model: one row per `general.architecture`, for the writers and the runtime alike.

An architecture fixes what a file does not say: the kind of norm, the order of rotary pairs, which tensors are
fused, and which activation llama.cpp (or PowerInfer, for its own) applies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hotcold.errors import FormatError
from hotcold.files.tensor_check import misshapen_tensor, missing_tensor

if TYPE_CHECKING:
    from hotcold.files.gguf import GGUFFile
    from hotcold.model.spec import ModelSpec

__all__ = [
    "EMBEDDING", "FORMS", "HEAD", "ROPE_FACTORS", "Form", "head_is_embedding", "hyper_parameters",
    "read_windows", "vocabulary_size",
]  # fmt: skip

EMBEDDING, HEAD = "token_embd.weight", "output.weight"

_WINDOWS = "hotcold.attention.windows"  # u32[L]: positions that the queries of a layer see, 0: all
ROPE_FACTORS = "hotcold.rope.factors"  # f32[head_dim / 2]: as the tensor rope_freqs, where that is not known


@dataclass(frozen=True, slots=True)
class Form:
    """One `general.architecture`.

    `activation` is what llama.cpp or PowerInfer computes with it. `interleaved`: the rotary pairs of q and
    k rows are neighbors, not halves apart. `positions` names the tensor of learned positions, whose row
    `first_position` is that of position 0. `experts`: the FFN is a mixture's only expert.
    `rope_factors`: the tensor `rope_freqs` is known. `default_eps`: the norm's epsilon in files that do not
    say it, as those of PowerInfer's OPT converter.
    """

    activation: str = "silu"
    interleaved: bool = False
    layer_norm: bool = False
    gated: bool = True
    parallel: bool = False
    head_norm: bool = False
    fused_qkv: bool = False
    experts: bool = False
    positions: str = ""
    first_position: int = 0
    rope_factors: bool = False
    default_eps: float | None = None

    @property
    def eps_key(self) -> str:
        """Where the norm's epsilon stands."""
        return "attention.layer_norm_epsilon" if self.layer_norm else "attention.layer_norm_rms_epsilon"


FORMS: dict[str, Form] = {
    "llama": Form(interleaved=True, rope_factors=True),
    "qwen2": Form(),
    "qwen3": Form(head_norm=True),
    "smallthinker": Form("relu", experts=True),
    "gpt2": Form("gelu", layer_norm=True, gated=False, fused_qkv=True, positions="position_embd"),
    "falcon": Form("gelu", layer_norm=True, gated=False, parallel=True, fused_qkv=True),
    # PowerInfer's own
    "bamboo": Form("drelu", interleaved=True),
    "opt": Form(
        "relu", layer_norm=True, gated=False, positions="pos_embd", first_position=2, default_eps=1e-5
    ),
}


def head_is_embedding(file: GGUFFile) -> bool:
    """Whether a file has no head of its own; FormatError in PowerInfer's form, which has one but for OPT."""
    if HEAD in file.tensors:
        return False
    if file.magic == "PWRI" and file.require("general.architecture", str) != "opt":
        raise missing_tensor(HEAD, file.path)
    return True


def vocabulary_size(file: GGUFFile) -> int:
    """The rows of the embedding. FormatError where it has none, ShapeError where it is said to be another."""
    embedding, field = file.tensors.get(EMBEDDING), f"{file.require('general.architecture', str)}.vocab_size"
    if embedding is None or len(embedding.shape) != 2:
        raise missing_tensor(EMBEDDING, file.path)
    rows, width = embedding.shape
    if (said := file.find(field, int, rows)) != rows:
        raise misshapen_tensor(EMBEDDING, file.path, embedding.shape, (said, width))
    return rows


def read_windows(file: GGUFFile, n_layers: int) -> list[int]:
    """Positions that the queries of each layer see, 0 being all; none where the file does not say.

    Raises FormatError for what cannot be that.
    """
    if _WINDOWS not in file.metadata:
        return []
    windows = file.require(_WINDOWS, np.ndarray).tolist()
    fit = len(windows) == n_layers and all(type(n) is int and 0 <= n < 1 << 31 for n in windows)
    if not fit:
        expected = f"{n_layers} integers below {1 << 31}"
        raise FormatError("bad windows", where=file.path, field=_WINDOWS, got=windows[:3], expected=expected)
    return windows


def hyper_parameters(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    """The `{architecture}.*` metadata of llama.cpp and PowerInfer, in the exact types they insist on."""
    form = FORMS[architecture]
    numbers = {
        "block_count": spec.n_layers,
        "context_length": spec.n_ctx,
        "embedding_length": spec.d_model,
        "feed_forward_length": spec.d_ff,
        "attention.head_count": spec.n_heads,
        "attention.head_count_kv": spec.n_kv_heads,
        "vocab_size": spec.n_vocab,
    }
    if spec.head_dim * spec.n_heads != spec.d_model:
        numbers |= {"attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim}
    values: dict[str, Any] = {key: np.uint32(value) for key, value in numbers.items()}
    values[form.eps_key] = np.float32(spec.norm_eps)
    if spec.rope is not None:
        rope = spec.rope if form.rope_factors else spec.rope.as_yarn()  # ours read ROPE_FACTORS instead
        values |= {"rope.dimension_count": np.uint32(spec.head_dim), **rope.metadata()}
    return {f"{architecture}.{key}": value for key, value in values.items()} | _own_keys(spec, form)


def _own_keys(spec: ModelSpec, form: Form) -> dict[str, Any]:
    """What the architecture has no word for, under `hotcold.`: other programs ignore it."""
    own: dict[str, Any] = {}
    if any(spec.windows):
        own[_WINDOWS] = np.asarray(spec.windows, np.uint32)
    divisors = spec.rope.llama3_divisors(spec.head_dim) if spec.rope else None
    if divisors is not None and not form.rope_factors:
        own[ROPE_FACTORS] = divisors
    return own
