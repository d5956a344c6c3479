"""How byte-level BPE splits text into words, by the names that GGUF has for it (`tokenizer.ggml.pre`).

llama.cpp has the rules of each name in its code (`llama-vocab.cpp`), Hugging Face in each `tokenizer.json`.
One table serves both directions: a name gives steps that split as llama.cpp does, and steps give the name.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["PRE_TOKENIZERS", "Splitting", "name_of"]

# ("Split", pattern of what stands alone), ("Digits", whether each stands alone), ("Punctuation", behavior),
# ("ByteLevel", whether GPT-2's pattern applies)
Step = tuple[str, Any]


@dataclass(frozen=True, slots=True)
class Splitting:
    """The rules of one name.

    `whole_words`: a word that is in the vocabulary is one token, regardless of merges. `adds_bos`: texts
    begin with the beginning-of-text token, unless a file says otherwise.
    """

    steps: tuple[Step, ...]
    whole_words: bool = False
    adds_bos: bool = False

    def build(self, vocabulary: Collection[str]) -> PreTokenizer:
        """The pre-tokenizer for a vocabulary of byte-level tokens.

        It drops bytes without a token and prevents merges across them, as llama.cpp does. (BPE alone drops
        them first and then merges their neighbors.)
        """
        from tokenizers.pre_tokenizers import Sequence

        parts = [*map(_build, self.steps), *_removal(vocabulary)]
        return parts[0] if len(parts) == 1 else Sequence(parts)


def name_of(pre_tokenizer: dict[str, Any], vocabulary: Collection[str], *, whole_words: bool) -> str | None:
    """What GGUF calls the `pre_tokenizer` of a tokenizer.json; None if llama.cpp has no such name.

    Of several names it is the one with the same `whole_words`. Where there is none, `whole_words` is lost:
    words that are tokens, but that merges do not reach, come apart.
    """
    leaves, removal = _leaves(pre_tokenizer), [_state(step) for step in _removal(vocabulary)]
    if removal and leaves[-1:] == removal:
        leaves.pop()
    steps = tuple(map(_step, leaves))
    same = [
        name for name, splitting in PRE_TOKENIZERS.items() if steps in (splitting.steps, _SPELT.get(name))
    ]
    return next(
        (name for name in same if PRE_TOKENIZERS[name].whole_words == whole_words), next(iter(same), None)
    )


def _build(step: Step) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    kind, setting = step
    match kind:
        case "Split":
            return pre_tokenizers.Split(Regex(setting), "isolated")
        case "Digits":
            return pre_tokenizers.Digits(individual_digits=setting)
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=setting)


def _removal(vocabulary: Collection[str]) -> list[PreTokenizer]:
    """The step that removes bytes without a token, if there are any."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Split

    tokenless = [f"\\x{{{ord(byte):x}}}" for byte in sorted(ByteLevel.alphabet()) if byte not in vocabulary]
    return [Split(Regex(f"[{''.join(tokenless)}]"), "removed")] if tokenless else []


def _leaves(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step.get("type") == "Sequence":
        return [leaf for inner in step["pretokenizers"] for leaf in _leaves(inner)]
    return [step]


def _state(step: PreTokenizer) -> dict[str, Any]:
    return json.loads(step.__getstate__())


def _step(leaf: dict[str, Any]) -> Step:
    kind = leaf.get("type")
    if kind == "Split" and leaf["behavior"] == "Isolated" and not leaf["invert"]:
        return kind, leaf["pattern"].get("Regex")
    if kind == "ByteLevel" and not leaf["add_prefix_space"]:
        return kind, leaf.get("use_regex", True)
    if kind == "Digits":
        return kind, leaf["individual_digits"]
    if kind == "Punctuation":
        return kind, leaf["behavior"]
    return str(kind), None


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_BYTES, _GPT2 = ("ByteLevel", False), ("ByteLevel", True)
_GPT2_SPLIT = ("Split", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_SYMBOLS}{_REST}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")


def _by_case(upper: str, lower: str, numbers: str, end: str = "") -> str:
    """Words are capitals, then small letters, with `end` behind them."""
    begin = r"[^\r\n\p{L}\p{N}]?"
    words = f"{begin}{upper}*{lower}+{end}|{begin}{upper}+{lower}*{end}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_REST}"


# Cases as Hugging Face's patterns have them, and as llama.cpp does, which knows those of ASCII alone.
_CASES = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ASCII_CASES = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_TEKKEN, _GPT4O = (r"\p{N}",), (r"\p{N}{1,3}", f"{_CONTRACTIONS}?")


def _falcon(punctuation: str, *numbers: str) -> tuple[Step, ...]:
    splits = tuple(("Split", pattern) for pattern in (*numbers, "[0-9][0-9][0-9]"))
    return (("Split", punctuation), _GPT2_SPLIT, *splits, _BYTES)


_ASIAN = "[一-龥ࠀ-一가-퟿]"


def _deepseek_coder(asian: str) -> tuple[Step, ...]:
    splits = tuple(("Split", pattern) for pattern in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", asian))
    return (*splits, ("Digits", True), _BYTES)


_gpt2, _digits = Splitting((_GPT2,)), Splitting((("Digits", True), _GPT2))
_llama3 = (("Split", _LLAMA3), _BYTES)
_qwen2 = Splitting((("Split", _QWEN2), _BYTES))
_gpt4o = Splitting((("Split", _by_case(*_ASCII_CASES, *_GPT4O)), _BYTES))

# The first name of a rule is the one that is written.
PRE_TOKENIZERS: dict[str, Splitting] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "gigachat", "trillion"), _gpt2),
    **dict.fromkeys(
        ("smollm", "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b"), _digits
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
        Splitting(_llama3, whole_words=True, adds_bos=True),
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe"), Splitting(_llama3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open"), _qwen2),
    "qwen35": Splitting((("Split", _QWEN35), _BYTES)),
    "tekken": Splitting(
        (("Split", _by_case(*_ASCII_CASES, *_TEKKEN)), _BYTES), whole_words=True, adds_bos=True
    ),
    **dict.fromkeys(("gpt-4o", "llama4"), _gpt4o),
    "deepseek-coder": Splitting(_deepseek_coder(rf"((?!\s){_ASIAN})+")),
    "falcon": Splitting(_falcon(r"[\p{P}\$\+<=>\^~\|`]+")),
    # llama.cpp's default if a file does not say
    "default": Splitting(_falcon(r"[\p{P}\$\+<=>\^~\|]+", r"\p{N}+")),
}
# What Hugging Face's files have where llama.cpp splits slightly differently.
_SPELT: dict[str, tuple[Step, ...]] = {
    "tekken": (("Split", _by_case(*_CASES, *_TEKKEN)), _BYTES),
    "gpt-4o": (("Split", _by_case(*_CASES, *_GPT4O)), _BYTES),
    "deepseek-coder": _deepseek_coder(_ASIAN + "+"),
    "falcon": (("Punctuation", "Contiguous"), _GPT2, ("Digits", False), ("Split", "[0-9][0-9][0-9]")),
}
