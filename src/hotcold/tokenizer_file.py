"""The one place where `tokenizer.json` is read: a broken one is a named error, always."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hotcold.errors import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["read_tokenizer"]


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file that exists; FormatError where it is none.

    The library raises bare Exceptions, and where its Rust code panics (a merge of tokens that are not in the
    vocabulary, for one) a class of its own that is no Exception.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise FormatError(f"not a tokenizer: {error}", where=path) from error
