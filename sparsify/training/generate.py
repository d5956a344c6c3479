"""Text written by the dense model itself, to distil on: it covers what the model knows, whatever is at hand.

Each row begins with a random word of the vocabulary, after the special token of `begin` if any, and is then
sampled freely at temperature 1, so that a batch spreads over all that the model was trained on. LLM-QAT
(arXiv 2305.17888) found such data as good as the original corpus for distillation.

Keys and values live in a static cache: nothing is copied from step to step on a CPU, and on a GPU a step is
one compiled graph, so that a batch of hundreds costs little more than one row.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from hotcold.errors import InputError
from hotcold.sparsify.config import Generated

__all__ = ["Sampler"]

_MIN_LETTERS = 3


class Sampler:
    """Samples windows of `length` tokens from a dense model, many at a time."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        tokenizer: Tokenizer,
        length: int,
        settings: Generated,
        *,
        compile: bool | None = None,
    ) -> None:
        """`compile` (by default on a GPU) compiles a step. InputError if no word can begin a text."""
        self._teacher, self._length, self._settings = teacher, length, settings
        self._device = teacher.device
        self._words = _words(tokenizer)
        self._begin = _special_token(tokenizer, settings.begin)
        self._caches: dict[int, StaticCache] = {}
        compiled = self._device.type == "cuda" if compile is None else compile
        self._step = torch.compile(self._plain_step, mode="reduce-overhead") if compiled else self._plain_step

    @torch.no_grad()
    def write(self, rows: int, seed: int) -> Tensor:
        """int64 [rows, length] on the CPU. Same seed, same text."""
        generator = torch.Generator(self._device).manual_seed(seed)
        chooser = torch.Generator().manual_seed(seed)
        first = self._words[torch.randint(len(self._words), (rows,), generator=chooser)]
        head = [first] if self._begin is None else [torch.full_like(first, self._begin), first]
        tokens = torch.zeros(rows, self._length, dtype=torch.int64, device=self._device)
        tokens[:, : len(head)] = torch.stack(head, 1).to(self._device)
        cache = self._cache(rows)
        for position in range(self._length - 1):
            at = torch.full((1,), position, device=self._device)
            step = self._step if position else self._plain_step  # the first one allocates the cache
            scores, candidates = step(tokens[:, position : position + 1].contiguous(), at, cache)
            if position + 1 >= len(head):
                chosen = torch.multinomial(scores, 1, generator=generator)
                tokens[:, position + 1 : position + 2] = candidates.gather(1, chosen)
        return tokens.cpu()

    def _cache(self, rows: int) -> StaticCache:
        """An empty cache; the same one for the same `rows`, as a compiled step knows it by its addresses."""
        if rows in self._caches:
            self._caches[rows].reset()
        else:
            self._caches[rows] = StaticCache(config=self._teacher.config, max_cache_len=self._length)
        return self._caches[rows]

    def _plain_step(self, ids: Tensor, at: Tensor, cache: StaticCache) -> tuple[Tensor, Tensor]:
        """Probabilities and ids of what may follow `ids` [rows, 1] at position `at`; both [rows, top_k]."""
        hidden = self._teacher.model(
            ids, past_key_values=cache, use_cache=True, position_ids=at[None].expand(len(ids), 1)
        ).last_hidden_state[:, -1]
        logits = self._teacher.lm_head(hidden).float()
        values, candidates = logits.topk(min(self._settings.top_k, logits.shape[-1]), dim=-1)
        return values.softmax(-1), candidates


def _special_token(tokenizer: Tokenizer, name: str) -> int | None:
    """The id of the token with which each row begins, or None."""
    if not name:
        return None
    if (token := tokenizer.token_to_id(name)) is None:
        raise InputError("the vocabulary has no such token", where="generated.begin", got=name)
    return token


def _words(tokenizer: Tokenizer) -> Tensor:
    """Tokens that can begin a text: capitalized words without a space before them."""
    texts = (tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size()))
    fitting = [
        token
        for token, text in enumerate(texts)
        if len(text) >= _MIN_LETTERS and text.isascii() and text.isalpha() and text.istitle()
    ]
    if not fitting:
        raise InputError(
            "the vocabulary has no words to start a text with", fix="remove `generated` from the text sources"
        )
    return torch.tensor(fitting)
