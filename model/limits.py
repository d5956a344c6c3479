"""What a model accepts: token ids that its embedding has, and no more positions than it has learned.

Call these before ids index a table of weights: the table would raise a bare IndexError, or on a GPU end the
process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from hotcold.errors import InputError
from hotcold.model.ffn_modules import learned_positions

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["check_ids", "check_tokenizer", "check_tokens", "check_window", "n_embeddings"]


def check_ids(ids: np.ndarray, n_vocab: int) -> None:
    """Raise InputError for a token id that is not in an embedding of `n_vocab` rows."""
    if ids.size and (ids.min() < 0 or ids.max() >= n_vocab):
        worst = int(ids.max() if ids.min() >= 0 else ids.min())
        raise InputError("token id outside of the vocabulary", got=worst, expected=f"0 to {n_vocab - 1}")


def n_embeddings(model: PreTrainedModel) -> int:
    """How many token ids the model has a vector for."""
    return cast("nn.Embedding", model.get_input_embeddings()).num_embeddings


def check_tokens(tokens: np.ndarray, position: int, n_ctx: int, n_vocab: int) -> None:
    """Raise InputError for tokens [n] that an engine cannot append at `position`."""
    if tokens.ndim != 1 or not len(tokens):
        raise InputError("no tokens given")
    if position + len(tokens) > n_ctx:
        got, limit = position + len(tokens), f"at most {n_ctx}"
        raise InputError("the context is full", got=got, expected=limit, fix="raise it with -c")
    check_ids(tokens, n_vocab)


def check_tokenizer(tokenizer: Tokenizer, model: PreTrainedModel) -> None:
    """Raise InputError if the tokenizer has tokens that the model has no embeddings for."""
    rows = n_embeddings(model)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        fix = "use the model's own tokenizer, or resize the embeddings"
        raise InputError(
            "the tokenizer has more tokens than the model has embeddings",
            got=largest + 1,
            expected=rows,
            fix=fix,
        )


def check_window(model: PreTrainedModel, length: int) -> None:
    """Raise InputError for more tokens in a row than the model has learned positions for."""
    most = learned_positions(model)
    if most is not None and length > most:
        what, fix = (
            "the window is longer than the positions that the model has learned",
            "lower it with --window",
        )
        raise InputError(what, got=length, expected=f"at most {most}", fix=fix)
