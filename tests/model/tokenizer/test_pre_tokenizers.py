"""Splitting text into words: as llama.cpp does for each name, and a name for what Hugging Face writes."""

import json
import random

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Split

from hotcold.files.gguf import GGUFFile
from hotcold.model.tokenizer.gguf import build_tokenizer
from hotcold.model.tokenizer.pre_tokenizers import PRE_TOKENIZERS, name_of
from hotcold.model.tokenizer.tokenizer_json import added_ids

PIECES = [
    "the", " word", "B", "é", "日本", "😀", "1", "23", "12345", " ", "  ", "\n", "\n\n", "\t", "\r\n", "'s",
    "'LL", "’", "'", ".", "!!", "_", "\u00a0", "\u3000", "٣", "٤٥٦", "½", "²", "e\u0301", "{", "0x1F", "\x16",
    "aB", "Ab", "É", "Ж", "жд", "가", "//", "`", "$", "<=", "don't", "，", "。",
]  # fmt: skip
# llama.cpp and tokenizers have tables of different Unicode versions: unassigned code points differ.
ASSIGNED = st.text(st.characters(exclude_categories=["Cs", "Cn"]), min_size=1)
MIXED = st.lists(st.sampled_from(PIECES), min_size=1, max_size=15).map("".join)


@pytest.fixture(scope="session")
def vocabulary():
    """Tokens and merges across all that could be a border: any difference in splitting shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=ByteLevel.alphabet(), show_progress=False, max_token_length=8,
        special_tokens=["<s>"],
    )  # fmt: skip
    choose = random.Random(1)
    tokenizer.train_from_iterator(["".join(choose.choices(PIECES, k=12)) for _ in range(3000)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


def write_vocabulary(path, pre, tokens, merges, *, ends=()):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if merges is not None:
        writer.add_token_merges(merges)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name in ends:
        writer.add_bool(f"tokenizer.ggml.add_{name}_token", True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=[*PRE_TOKENIZERS, None])
def both_tokenizers(request, vocabulary, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    path = write_vocabulary(tmp_path / "v.gguf", request.param, *vocabulary)
    return build_tokenizer(GGUFFile(path)), llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def test_words_and_beginnings_are_those_of_llama_cpp(both_tokenizers):
    ours, theirs = both_tokenizers

    @settings(max_examples=150, deadline=None)
    @given(st.one_of(MIXED, ASSIGNED))
    def check(text):
        assert ours.encode(text).ids == theirs.tokenize(text.encode(), add_bos=True, special=True)

    check()


@pytest.mark.parametrize("ends", [("bos",), ("eos",), ("bos", "eos")])
def test_the_ends_of_a_text_are_those_of_llama_cpp(vocabulary, tmp_path, ends):
    llama_cpp = pytest.importorskip("llama_cpp")
    path = write_vocabulary(tmp_path / "v.gguf", "gpt-2", *vocabulary, ends=ends)
    ours, theirs = build_tokenizer(GGUFFile(path)), llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ids = ours.encode("the word").ids
    assert ids == theirs.tokenize(b"the word", add_bos=True, special=True)
    assert (ids[0] == 0, ids[-1] == 1) == ("bos" in ends, "eos" in ends)
    assert added_ids(ours) == ([0] * ("bos" in ends), [1] * ("eos" in ends))


@pytest.mark.parametrize(
    ("pre", "has_merges", "said"),
    [
        ("gpt-2", True, ""),
        (None, True, "v.gguf: no tokenizer.ggml.pre: "),
        ("gpt-2", False, "v.gguf: no tokenizer.ggml.merges; "),
    ],
)
def test_what_a_vocabulary_lacks_is_said(vocabulary, tmp_path, capsys, pre, has_merges, said):
    tokens, merges = vocabulary
    path = write_vocabulary(tmp_path / "v.gguf", pre, tokens, merges if has_merges else None)
    ids = build_tokenizer(GGUFFile(path)).encode("the").ids
    assert capsys.readouterr().err.startswith(said) and (len(ids) == 1) == has_merges
    build_tokenizer(GGUFFile(path))
    assert len(capsys.readouterr().err.splitlines()) == bool(said)


def test_the_vocabulary_tells_rules_apart(vocabulary, tmp_path):
    text = "É12345 don't\u3000the `$²½e\u0301 жд\n\nAb!!'LL // 日本，٤٥٦"
    seen = {
        splitting: build_tokenizer(GGUFFile(write_vocabulary(tmp_path / name, name, *vocabulary))).encode(
            text
        )
        for name, splitting in PRE_TOKENIZERS.items()
    }
    assert len({tuple(encoded.ids) for encoded in seen.values()}) == len(seen)


def steps(*parts):
    return {"type": "Sequence", "pretokenizers": [json.loads(part.__getstate__()) for part in parts]}


def split(pattern):
    return Split(Regex(pattern), "isolated")


BYTES, GPT2 = ByteLevel(add_prefix_space=False, use_regex=False), ByteLevel(add_prefix_space=False)
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("expected", "whole_words", "parts"),
    [
        ("gpt-2", False, [GPT2]),
        ("smollm", False, [Digits(individual_digits=True), GPT2]),
        ("llama-bpe", True, [split(WORDS + r"\p{N}{1,3}" + REST), BYTES]),
        ("smaug-bpe", False, [split(WORDS + r"\p{N}{1,3}" + REST), BYTES]),
        ("qwen2", False, [split(WORDS + r"\p{N}" + REST), BYTES]),
        ("qwen2", True, [split(WORDS + r"\p{N}" + REST), BYTES]),
        ("tekken", True, [split(TEKKEN), BYTES]),
        ("falcon", False, [Punctuation("contiguous"), GPT2, Digits(False), split("[0-9][0-9][0-9]")]),
        (None, False, [Digits(individual_digits=False), GPT2]),
        (None, False, []),
        (None, False, [GPT2, Split(Regex(r"[\x{c0}]"), "removed")]),
    ],
)
def test_what_hugging_face_writes_has_a_name(expected, whole_words, parts):
    assert name_of(steps(*parts), ByteLevel.alphabet(), whole_words=whole_words) == expected


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@pytest.mark.parametrize("missing", ["", "\u0116"])
def test_what_is_built_from_a_name_has_that_of_its_rules(name, missing):
    vocabulary, splitting = set(ByteLevel.alphabet()) - {missing}, PRE_TOKENIZERS[name]
    built = json.loads(splitting.build(vocabulary).__getstate__())
    found = name_of(built, vocabulary, whole_words=splitting.whole_words)
    assert found is not None
    assert PRE_TOKENIZERS[found] == splitting
