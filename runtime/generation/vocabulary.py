"""Between text and token ids: the bundle's tokenizer, its chat template, the tokens that end a text, and
streaming, which must not print half a character.

Special tokens and the chat template come from the GGUF metadata, where llama.cpp looks for them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from hotcold.errors import InputError
from hotcold.files.gguf import GGUFFile
from hotcold.files.gguf_split import open_gguf
from hotcold.model.tokenizer.gguf import build_tokenizer
from hotcold.model.tokenizer.special_tokens import SPECIAL_TOKENS, chat_templates, stop_ids
from hotcold.model.tokenizer.tokenizer_json import added_ids, read_tokenizer
from hotcold.progress import log
from hotcold.runtime.bundle_files import file_of_role
from hotcold.runtime.generation.chat_template import render

__all__ = ["TextStream", "Vocabulary"]

# Tokens that end a text or a turn under these names, besides the ones that the metadata gives (llama.cpp,
# `llama-vocab.cpp`, does the same: an instruct model's `eos` is often only one of them).
_STOP_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "<end_of_utterance>",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Everything in a bundle that is about text.

    `chat_template` is the default one; `special_tokens` are those that templates know beside `bos_token` and
    `eos_token`: `unk_token`, `pad_token`, ….
    """

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    bos: str
    eos: str
    chat_template: str | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, bundle: str | Path) -> Self:
        """Read `tokenizer.json` and the metadata of a GGUF file of the bundle, or one GGUF file alone.

        Raises InputError or FormatError if one of them is missing or broken, UnsupportedError for a
        vocabulary of another kind than BPE or SentencePiece.
        """
        if Path(bundle).is_file():
            file = open_gguf(bundle)
            tokenizer = build_tokenizer(file)
        else:
            file = open_gguf(file_of_role(bundle, "dense", "sparse"))
            tokenizer = _read_tokenizer(Path(bundle) / "tokenizer.json")
        special = {name: _token_text(tokenizer, file, key) for name, key in SPECIAL_TOKENS.items()}
        return cls(
            tokenizer=tokenizer,
            stop_ids=_stop_ids(tokenizer, file),
            bos=special.pop("bos"),
            eos=special.pop("eos"),
            chat_template=chat_templates(file).get("default"),
            special_tokens={f"{name}_token": token for name, token in special.items()},
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text to be continued: after a beginning-of-text token if the tokenizer adds one, and never
        before the end-of-text token that some add."""
        before, _ = added_ids(self.tokenizer)
        return self._checked([*before, *self._ids(_valid(text))])

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a conversation in which the user has said `text` and the model is to answer.

        Raises InputError if the model has no chat template, UnsupportedError if the template fails.
        """
        return self._checked(self._ids(self.chat([{"role": "user", "content": _valid(text)}])))

    def chat(self, messages: list[dict[str, str]], **variables: object) -> str:
        """The prompt that the chat template makes of a conversation; raises as above."""
        if self.chat_template is None:
            raise InputError("this model has no chat template", fix="drop --chat")
        special = {"bos_token": self.bos, "eos_token": self.eos, **self.special_tokens}
        known = {name: token for name, token in special.items() if token}
        return render(self.chat_template, messages=messages, **(known | variables))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _checked(self, ids: list[int]) -> list[int]:
        """The ids of a prompt; logs what is rarely intended."""
        bos = self.tokenizer.token_to_id(self.bos)
        if bos is not None and ids[:2] == [bos, bos]:
            log(f"the prompt starts with {self.bos} twice; hotcold adds it, so leave it out of your prompt")
        return ids


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise InputError("the bundle has no tokenizer", where=path, fix="export the bundle again")
    return read_tokenizer(path)


def _stop_ids(tokenizer: Tokenizer, file: GGUFFile) -> frozenset[int]:
    named = (tokenizer.token_to_id(name) for name in _STOP_NAMES)
    return frozenset(token for token in (*named, *stop_ids(file)) if token is not None)


def _token_text(tokenizer: Tokenizer, file: GGUFFile, key: str) -> str:
    token = file.find(f"tokenizer.ggml.{key}_token_id", int, -1)
    return (tokenizer.id_to_token(token) if 0 <= token < 1 << 32 else None) or ""


def _valid(text: str) -> str:
    """Python represents invalid UTF-8 as lone surrogates, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not valid UTF-8", where=f"character {error.start}") from None
    return text


class TextStream:
    """Turns token ids into text as they come; what it returns, joined, is the decoded text.

    A character may be spread over several tokens, and some decoders (sentencepiece) treat the first token of
    a text in another way. So a few earlier tokens are decoded too, and a text that ends in the replacement
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
