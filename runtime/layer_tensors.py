"""Tensors that layers may have or not: a file has them in all layers, or in none.

Nothing in the metadata says which biases and norms there are, or in which form a matrix is. So a hole shows
only in that other layers have the tensor; to run such a file without it would compute another model.
"""

from __future__ import annotations

from hotcold.files.gguf import GGUFFile
from hotcold.files.tensor_check import missing_tensor

__all__ = ["check_layers_alike"]

_QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
_OPTIONAL = (
    *_QKV_BIASES, "attn_qkv.bias", "attn_output.bias", "ffn_up.bias", "ffn_down.bias", "ffn_down_t.bias",
    "attn_norm_2.weight", "attn_norm_2.bias",
    "ffn_down.weight", "ffn_down_t.weight",  # of which a file has either, by its form
)  # fmt: skip


def check_layers_alike(file: GGUFFile, n_layers: int) -> None:
    """FormatError for a tensor that is missing in one layer and not in another, or in one of q, k and v."""
    for kind in _OPTIONAL:
        _all_or_none(file, [f"blk.{layer}.{kind}" for layer in range(n_layers)])
    _all_or_none(file, [f"blk.0.{kind}" for kind in _QKV_BIASES])


def _all_or_none(file: GGUFFile, names: list[str]) -> None:
    missing = [name for name in names if name not in file.tensors]
    if missing and len(missing) < len(names):
        raise missing_tensor(missing[0], file.path)
