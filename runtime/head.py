"""Which tensor the logits come from."""

from __future__ import annotations

import numpy as np

from hotcold.files.gguf import GGUFFile
from hotcold.model.forms import EMBEDDING, HEAD, head_is_embedding

__all__ = ["EMBEDDING", "head_name"]

_GLANCE = 4096  # elements of the stored array


def head_name(file: GGUFFile) -> str:
    """`output.weight`; the embedding where there is none, or a copy. Raises as `head_is_embedding`."""
    if head_is_embedding(file):
        return EMBEDDING
    head, embedding = file.tensors[HEAD], file.tensors.get(EMBEDDING)
    if embedding is None or (head.type, head.data.size) != (embedding.type, embedding.data.size):
        return HEAD
    one, other = (np.asarray(tensor.data).reshape(-1) for tensor in (head, embedding))
    # Two matrices differ from the first bytes on, so that hundreds of megabytes need not be read.
    same = np.array_equal(one[:_GLANCE], other[:_GLANCE]) and np.array_equal(one, other)
    return EMBEDDING if same else HEAD
