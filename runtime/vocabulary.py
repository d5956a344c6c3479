"""Between text and token ids: the bundle's tokenizer, its chat template, the tokens that end a text, and
streaming, which must not print half a character.

Special tokens and the chat template come from the GGUF metadata, where llama.cpp looks for them too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn, Self

from tokenizers import Tokenizer

from hotcold.convert.gguf_read import GGUFFile
from hotcold.convert.gguf_split import open_gguf
from hotcold.convert.gguf_tokenizer import build_tokenizer
from hotcold.errors import InputError, UnsupportedError
from hotcold.runtime.bundle_files import file_of_role
from hotcold.tokenizer_file import read_tokenizer

__all__ = ["TextStream", "Vocabulary"]

# Tokens that end a text or a turn under these names, besides the ones that the metadata gives (llama.cpp,
# `llama-vocab.cpp`, does the same: an instruct model's `eos` is often only one of them).
_STOP_NAMES = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

_MAX_TEMPLATE = 1 << 18  # characters of a chat template
_MAX_CHAT = 1 << 22  # characters that one may expand to


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a bundle knows about text."""

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    bos: str
    eos: str
    chat_template: str | None

    @classmethod
    def load(cls, bundle: str | Path) -> Self:
        """Read `tokenizer.json` and the metadata of a GGUF file of the bundle, or one GGUF file alone.

        Raises InputError or FormatError where one of them is missing or broken, UnsupportedError for a
        vocabulary of another kind than BPE or SentencePiece.
        """
        if Path(bundle).is_file():
            file = open_gguf(bundle)
            tokenizer = build_tokenizer(file)
        else:
            file = open_gguf(file_of_role(bundle, "dense", "sparse"))
            tokenizer = _read_tokenizer(Path(bundle) / "tokenizer.json")
        return cls(
            tokenizer=tokenizer,
            stop_ids=_stop_ids(tokenizer, file),
            bos=_token_text(tokenizer, file, "bos_token_id"),
            eos=_token_text(tokenizer, file, "eos_token_id"),
            chat_template=file.find("tokenizer.chat_template", str),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text, with a beginning-of-text token only if the tokenizer itself adds one."""
        return self.tokenizer.encode(_valid(text)).ids

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a conversation in which the user has said `text` and the model is to answer.

        Raises InputError if the model has no chat template, UnsupportedError if the template fails.
        """
        if self.chat_template is None:
            raise InputError("this model has no chat template", fix="leave out --chat")
        messages = [{"role": "user", "content": _valid(text)}]
        chat = render(self.chat_template, messages=messages, bos_token=self.bos, eos_token=self.eos)
        return self.tokenizer.encode(chat, add_special_tokens=False).ids


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise InputError("the bundle has no tokenizer", where=path, fix="export the bundle again")
    return read_tokenizer(path)


def _stop_ids(tokenizer: Tokenizer, file: GGUFFile) -> frozenset[int]:
    named = (tokenizer.token_to_id(name) for name in _STOP_NAMES)
    keyed = (file.find(f"tokenizer.ggml.{key}", int) for key in _STOP_KEYS)
    return frozenset(token for token in (*named, *keyed) if token is not None)


def _token_text(tokenizer: Tokenizer, file: GGUFFile, key: str) -> str:
    token = file.find(f"tokenizer.ggml.{key}", int, -1)
    return (tokenizer.id_to_token(token) if 0 <= token < 1 << 32 else None) or ""


def _valid(text: str) -> str:
    """Python carries bytes that are no UTF-8 as lone surrogates, which no tokenizer knows."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not valid UTF-8", where=f"character {error.start}") from None
    return text


def render(template: str, **variables: object) -> str:
    """Expand a chat template as transformers does, but within bounds: it came with a model."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if len(template) > _MAX_TEMPLATE:
        raise UnsupportedError(
            "chat template too long", got=len(template), expected=f"at most {_MAX_TEMPLATE}"
        )

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
    try:
        compiled = environment.from_string(template)
        return _bounded(compiled.generate(add_generation_prompt=True, **variables))
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, OverflowError) as error:
        raise UnsupportedError(f"the chat template fails: {error}", fix="leave out --chat") from error


def _bounded(pieces: Iterable[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece
        if len(text) > _MAX_CHAT:
            raise UnsupportedError(
                "the chat template expands without end", expected=f"{_MAX_CHAT} characters"
            )
    return text


class TextStream:
    """Turns token ids into text as they come; what it returns, joined, is the decoded text.

    A character may be spread over several tokens, and some decoders (sentencepiece) treat the first token of
    a text in another way. So a few tokens before are decoded along, and a text that ends in the replacement
    character, the sign of an unfinished one, is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # printed, but the decoder may need to see them
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes, often all of its own, sometimes none."""
        self._pending.append(token)
        text = self._new_text()
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._emit(text)

    def flush(self) -> str:
        """What was held back, at the end: bytes that never became a character, as replacement characters."""
        return self._emit(self._new_text())

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _emit(self, text: str) -> str:
        if text:
            self._context, self._pending = self._pending, []
        return text
