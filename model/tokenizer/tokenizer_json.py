"""The only place where `tokenizer.json` is read, so that a broken one is always a named error; and what
encoding adds to a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hotcold.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["added_ids", "read_tokenizer"]

_PROBES = ("a", "1", ".", "e")


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file that exists; FormatError if it is none.

    The library raises bare Exceptions, and where its Rust code panics (a merge of tokens that are not in the
    vocabulary, for one) its own class that is not an Exception.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise FormatError(f"not a tokenizer: {error}", where=path) from error
    # The length of its training texts does not limit ours; transformers ignores it too.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def added_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What encoding puts before a text and after it, BOS and EOS mostly, as seen by doing it.

    UnsupportedError for a post-processor that changes the ids of the text itself.
    """
    bare, full = list[int](), list[int]()
    for text in _PROBES:
        bare = tokenizer.encode(text, add_special_tokens=False).ids
        full = tokenizer.encode(text).ids
        if bare:
            break
    else:  # no text has tokens
        return full, []
    before = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
    if before is None:
        raise UnsupportedError("a post-processor that changes the text's tokens")
    return full[:before], full[before + len(bare) :]
