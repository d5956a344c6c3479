"""Which tensor the logits come from."""

from __future__ import annotations

import numpy as np

from hotcold.convert.forms import EMBEDDING
from hotcold.convert.gguf_read import GGUFFile

__all__ = ["EMBEDDING", "head_name"]

_HEAD = "output.weight"
_GLANCE = 4096  # elements of the stored array


def head_name(file: GGUFFile) -> str:
    """`output.weight`; the embedding where there is none, or a copy: PowerInfer's form always has one."""
    head, embedding = file.tensors.get(_HEAD), file.tensors.get(EMBEDDING)
    if head is None:
        return EMBEDDING
    if embedding is None or (head.type, head.data.size) != (embedding.type, embedding.data.size):
        return _HEAD
    one, other = (np.asarray(tensor.data).reshape(-1) for tensor in (head, embedding))
    # Two matrices differ from the first bytes on, so that hundreds of megabytes need not be read.
    same = np.array_equal(one[:_GLANCE], other[:_GLANCE]) and np.array_equal(one, other)
    return EMBEDDING if same else _HEAD
