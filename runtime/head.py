"""Which tensor the logits come from."""

from __future__ import annotations

import numpy as np

from hotcold.convert.gguf_read import GGUFFile

__all__ = ["EMBEDDING", "head_name"]

EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def head_name(file: GGUFFile) -> str:
    """`output.weight`; the embedding where there is none, or a copy: PowerInfer's form always has one."""
    tensors = file.tensors
    if _HEAD not in tensors:
        return EMBEDDING
    head, embedding = tensors[_HEAD], tensors.get(EMBEDDING)
    copied = (
        embedding is not None and head.type == embedding.type and np.array_equal(head.data, embedding.data)
    )
    return EMBEDDING if copied else _HEAD
