"""Special tokens, ends of text and chat templates, between Hugging Face's files and GGUF metadata.

GGUF has a key for one end-of-text id, one of a turn (eot) and one of a message (eom), and llama.cpp stops at
each. Models have more: `hotcold.stop_token_ids` then holds all of them. Named chat templates are written as
the `gguf` package does, the default one without a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hotcold.errors import FormatError
from hotcold.files.json import read_json

if TYPE_CHECKING:
    from hotcold.files.gguf import GGUFFile

__all__ = [
    "SPECIAL_TOKENS",
    "chat_templates",
    "hf_settings",
    "special_metadata",
    "stop_ids",
    "template_files",
    "template_paths",
]

# transformers' name of a special token (`bos_token`, …) -> GGUF's (the spelling of the fourth is theirs)
SPECIAL_TOKENS = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls",
    "mask": "mask",
}  # fmt: skip
_ENDS = ("eos", "eot", "eom")
_STOP_IDS = "hotcold.stop_token_ids"
_TEMPLATE = "tokenizer.chat_template"
_MORE_TEMPLATES = "additional_chat_templates"


def template_files(folder: Path) -> list[Path]:
    """The files of an HF directory that hold one chat template each."""
    default = folder / "chat_template.jinja"
    return [path for path in (default, *sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))) if path.is_file()]


def template_paths(templates: Mapping[str, str], folder: Path) -> list[tuple[Path, str]]:
    """Where transformers keeps these templates in an HF directory, each with its text."""
    more = folder / _MORE_TEMPLATES
    return [
        (folder / "chat_template.jinja" if name == "default" else more / f"{_plain(name)}.jinja", text)
        for name, text in templates.items()
    ]


def _plain(name: str) -> str:
    """A template's name without what has a meaning in paths and keys, as the `gguf` package writes it."""
    return re.sub("[^A-Za-z0-9]", "_", name)


def hf_settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` over the older `special_tokens_map.json`; its `chat_template` maps names to
    templates, those in files of their own included. FormatError for what is broken."""
    files = [folder / "special_tokens_map.json", folder / "tokenizer_config.json"]
    settings: dict[str, Any] = {}
    for path in files:
        settings |= read_json(path) if path.is_file() else {}
    templates = _named(settings.get("chat_template"))
    for path in template_files(folder):
        templates["default" if path.parent == folder else path.stem] = _read(path)
    return settings | {"chat_template": templates}


def _named(templates: object) -> dict[str, str]:
    """One template, or a list of named ones, as transformers writes them."""
    if isinstance(templates, str):
        return {"default": templates}
    entries = templates if isinstance(templates, list) else []
    return {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
    }


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("is not UTF-8", where=path, offset=error.start) from error


def special_metadata(
    settings: Mapping[str, Any], config: Mapping[str, Any], generation: Mapping[str, Any], tokens: list[str]
) -> dict[str, Any]:
    """Ids of the special tokens, by name from the tokenizer's settings, else by number from config.json; all
    ids that end a text, those of generation_config.json included; and the chat templates."""
    ids = {token: i for i, token in enumerate(tokens)}
    found = {}
    for key, name in SPECIAL_TOKENS.items():
        token = settings.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        numbers = [ids[token]] if isinstance(token, str) and token in ids else []
        numbers += _ids(config.get(f"{key}_token_id"), len(tokens))
        if numbers:
            found[f"tokenizer.ggml.{name}_token_id"] = np.uint32(numbers[0])
    ends = [int(end) for end in [found.get("tokenizer.ggml.eos_token_id")] if end is not None]
    for source in (config, generation):
        ends += _ids(source.get("eos_token_id"), len(tokens))
    return found | _end_metadata(list(dict.fromkeys(ends))) | _template_metadata(settings["chat_template"])


def _ids(value: object, n_tokens: int) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int and 0 <= number < n_tokens]


def _end_metadata(ends: list[int]) -> dict[str, Any]:
    keyed = {f"tokenizer.ggml.{name}_token_id": np.uint32(i) for name, i in zip(_ENDS, ends, strict=False)}
    return keyed | ({_STOP_IDS: np.asarray(ends, np.uint32)} if len(ends) > 1 else {})


def _template_metadata(templates: Mapping[str, str]) -> dict[str, Any]:
    named = {_plain(name): text for name, text in templates.items() if name}
    metadata: dict[str, Any] = {}
    if default := named.pop("default", None):
        metadata[_TEMPLATE] = default
    if named:
        metadata["tokenizer.chat_templates"] = sorted(named)
    return metadata | {f"{_TEMPLATE}.{name}": named[name] for name in sorted(named)}


def stop_ids(file: GGUFFile) -> list[int]:
    """The ids that end a text by a file's metadata, the one of `eos` first."""
    keyed = [file.find(f"tokenizer.ggml.{name}_token_id", int) for name in _ENDS]
    more = file.find(_STOP_IDS, np.ndarray, np.empty(0, np.int64)).reshape(-1)
    return list(dict.fromkeys(int(end) for end in [*keyed, *more.tolist()] if end is not None))


def chat_templates(file: GGUFFile) -> dict[str, str]:
    """The chat templates of a file by name."""
    default = file.find(_TEMPLATE, str)
    start = f"{_TEMPLATE}."
    named = {key.removeprefix(start): file.find(key, str) for key in file.metadata if key.startswith(start)}
    return ({} if default is None else {"default": default}) | named
