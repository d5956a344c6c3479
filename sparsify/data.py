"""Training text as windows of equal length, in an order that the seed alone decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from hotcold.errors import InputError
from hotcold.text import Document

__all__ = ["Windows", "read_windows"]


class Windows:
    """Token windows [n, length], handed out in batches, shuffled anew after each pass over them."""

    def __init__(self, ids: Tensor, seed: int) -> None:
        self.ids, self._generator = ids, torch.Generator().manual_seed(seed)
        self._order: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, size: int) -> Tensor:
        """The next `size` windows, int64 [size, length]."""
        while len(self._order) < size:
            self._order += torch.randperm(len(self.ids), generator=self._generator).tolist()
        chosen, self._order = self._order[:size], self._order[size:]
        return self.ids[chosen]


def read_windows(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int, n_tokens: int, where: str
) -> Tensor:
    """Tokenise documents until they fill windows of `n_tokens` in all; int64 [n, length].

    There are fewer where the documents end before; documents follow each other without a gap. Raises
    InputError where there is not one window; `where` names the text in its message.
    """
    stream = np.fromiter(_tokens(documents, tokenizer, n_tokens), dtype=np.int64)
    n = len(stream) // length
    if not n:
        raise InputError(
            "too little text", where=where, got=f"{len(stream)} tokens", expected=f"at least {length}"
        )
    return torch.from_numpy(stream[: n * length].reshape(n, length))


def _tokens(documents: Iterable[Document], tokenizer: Tokenizer, n_tokens: int) -> Iterator[int]:
    done = 0
    for document in documents:
        if done >= n_tokens:
            return
        ids = tokenizer.encode(document.text).ids
        done += len(ids)
        yield from ids
