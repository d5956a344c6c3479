"""Text written by the dense model itself, to distil on: it covers what the model knows, whatever is at hand.

Each sequence begins with a random word of the vocabulary and is then sampled freely at temperature 1, so
a batch spreads over all that the model was trained on. LLM-QAT (arXiv 2305.17888) found such data as good as
the original corpus for distillation.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hotcold.errors import InputError
from hotcold.progress import Progress

__all__ = ["write_text"]

_BATCH = 128
_TOP_K = 256  # cuts the tail, in which a small model's sampling goes astray
_MIN_LETTERS = 3


def write_text(
    teacher: PreTrainedModel, tokenizer: Tokenizer, length: int, n_tokens: int, seed: int
) -> Tensor:
    """Sample windows, int64 [ceil(n_tokens / length), length], from the dense model. Same seed, same text."""
    generator = torch.Generator().manual_seed(seed)
    words = _words(tokenizer)
    n = -(-n_tokens // length)
    parts = []
    with Progress("teacher's text", n * length, "tok") as progress, torch.inference_mode():
        for begin in range(0, n, _BATCH):
            size = min(_BATCH, n - begin)
            first = words[torch.randint(len(words), (size,), generator=generator)]
            parts.append(_continue(teacher, first, length, generator, progress))
    return torch.cat(parts)


def _words(tokenizer: Tokenizer) -> Tensor:
    """Tokens that can begin a text: capitalised words without a space before them."""
    texts = (tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size()))
    fitting = [
        token
        for token, text in enumerate(texts)
        if len(text) >= _MIN_LETTERS and text.isascii() and text.isalpha() and text.istitle()
    ]
    if not fitting:
        raise InputError(
            "the vocabulary has no words to begin a text with", fix="set the generated share to 0"
        )
    return torch.tensor(fitting)


def _continue(
    teacher: PreTrainedModel, first: Tensor, length: int, generator: torch.Generator, progress: Progress
) -> Tensor:
    """Sample on from `first` [batch]; int64 [batch, length]."""
    cache = DynamicCache(config=teacher.config)
    tokens = [first[:, None]]
    for _ in range(length - 1):
        hidden = teacher.model(tokens[-1], past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        values, candidates = teacher.lm_head(hidden).float().topk(_TOP_K, dim=-1)
        chosen = torch.multinomial(values.softmax(-1), 1, generator=generator)
        tokens.append(candidates.gather(1, chosen))
        progress.advance(len(first))
    return torch.cat(tokens, dim=1)
