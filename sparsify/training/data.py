"""Training text as windows of equal length: several sources, mixed in given shares, in an order that the
seed alone decides and that can be taken up again at any window.

Windows are made and shuffled in blocks. What is saved is where each source stood when the block began, and
how far into the block we are, so that resuming costs one block, however long the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from hotcold.errors import InputError
from hotcold.text import Document

__all__ = ["PAD", "Batch", "Documents", "Mixture", "Source", "TokenRows", "read_windows"]

PAD = -1  # in windows, where there is no token
_BLOCK = 2048  # windows that are shuffled together


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids int64 [rows, length] and where they are text, bool [rows, length]: the rest is padding."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, windows: Tensor) -> Batch:
        """From windows with `PAD` in them. Padding only ever ends a row, so that attention needs no mask."""
        return cls(windows.clamp_min(0), windows >= 0)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, chosen: slice) -> Batch:
        return Batch(self.ids[chosen], self.mask[chosen])

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.mask.to(device))

    @property
    def counts(self) -> Tensor:
        """How many tokens there are, and how many of them have a next one to be predicted; float64 [2]."""
        pairs = self.mask[:, 1:] & self.mask[:, :-1]
        return torch.stack([self.mask.sum(), pairs.sum()]).double()


class Source(Protocol):
    """Endless windows of one text; it begins anew where it ends."""

    def take(self, n: int) -> Tensor:
        """The next `n` windows, int64 [n, length]."""
        ...

    def state(self) -> dict[str, Any]:
        """Where we are, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""
        ...


class TokenRows:
    """Windows that are there already, int64 [n, length]."""

    def __init__(self, rows: Tensor) -> None:
        self._rows, self._next = rows, 0

    def take(self, n: int) -> Tensor:
        chosen = torch.arange(self._next, self._next + n) % len(self._rows)
        self._next = (self._next + n) % len(self._rows)
        return self._rows[chosen]

    def state(self) -> dict[str, Any]:
        return {"next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


class Documents:
    """Windows cut from documents that are read as they are needed.

    Packed, documents follow each other without a gap; else each begins a window, of which it may fill less.
    InputError, naming `where`, for a text that does not fill one window.
    """

    def __init__(
        self,
        documents: Callable[[], Iterable[Document]],
        tokenizer: Tokenizer,
        length: int,
        *,
        pack: bool = True,
        where: str = "text",
    ) -> None:
        self._open, self._tokenizer, self._length, self._pack = documents, tokenizer, length, pack
        self._where = where
        self.restore({"documents": 0, "tokens": 0, "rest": []})

    def take(self, n: int) -> Tensor:
        return torch.stack([torch.tensor(self._window()) for _ in range(n)])

    def state(self) -> dict[str, Any]:
        return {"documents": self._done, "tokens": self._tokens, "rest": list(self._rest)}

    def restore(self, state: dict[str, Any]) -> None:
        self._done, self._tokens, self._rest = state["documents"], state["tokens"], list(state["rest"])
        self._documents = islice(iter(self._open()), self._done, None)

    def _window(self) -> list[int]:
        while len(self._rest) < self._length:
            ids = self._next_document()
            if not self._pack:
                cut = ids[: self._length]
                return cut + [PAD] * (self._length - len(cut))
            self._rest += ids
        window, self._rest = self._rest[: self._length], self._rest[self._length :]
        return window

    def _next_document(self) -> list[int]:
        document = next(self._documents, None)
        if document is None:
            if self._tokens < self._length:
                got, expected = f"{self._tokens} tokens", f"at least {self._length}"
                raise InputError("too little text", where=self._where, got=got, expected=expected)
            self.restore({"documents": 0, "tokens": 0, "rest": self._rest})
            document = next(self._documents)
        ids = self._tokenizer.encode(document.text).ids
        self._done, self._tokens = self._done + 1, self._tokens + len(ids)
        return ids


class Mixture:
    """Batches drawn from several sources in fixed shares, block by block in a shuffled order."""

    def __init__(self, sources: list[tuple[Source, float]], seed: int, block: int = _BLOCK) -> None:
        self._sources = [source for source, share in sources if share > 0]
        shares = np.array([share for _, share in sources if share > 0])
        # Rounding up to one window each, so that no source is lost in a small block.
        self._counts = [max(1, round(block * share)) for share in (shares / shares.sum()).tolist()]
        self._seed, self._number, self._position = seed, 0, 0
        self._begin = [source.state() for source in self._sources]
        self._windows: Tensor | None = None

    def batch(self, size: int) -> Batch:
        """The next `size` windows."""
        parts: list[Tensor] = []
        while size:
            windows = self._block()
            part = windows[self._position : self._position + size]
            parts.append(part)
            self._position += len(part)
            size -= len(part)
            if self._position == len(windows):
                self._windows, self._position, self._number = None, 0, self._number + 1
        return Batch.of(torch.cat(parts))

    def state(self) -> dict[str, Any]:
        """Where we are, as JSON."""
        self._block()
        return {"block": self._number, "position": self._position, "sources": self._begin}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""
        for source, begin in zip(self._sources, state["sources"], strict=True):
            source.restore(begin)
        self._windows, self._number, self._position = None, state["block"], state["position"]

    def _block(self) -> Tensor:
        if self._windows is None:
            self._begin = [source.state() for source in self._sources]
            windows = torch.cat([s.take(n) for s, n in zip(self._sources, self._counts, strict=True)])
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._number)
            self._windows = windows[torch.randperm(len(windows), generator=generator)]
        return self._windows


def read_windows(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int, n_tokens: int, where: str
) -> Tensor:
    """Tokenise documents until they fill windows of `n_tokens` in all; int64 [n, length].

    There are fewer where the documents end before; documents follow each other without a gap. Raises
    InputError if there is not one window; `where` names the text in its message.
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
