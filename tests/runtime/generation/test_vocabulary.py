"""Text in, ids out, and back again in pieces that are never half a character."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors

from hotcold.errors import FormatError, InputError, UnsupportedError
from hotcold.runtime.bundle_files import file_of_role
from hotcold.runtime.generation.chat_template import render
from hotcold.runtime.generation.vocabulary import TextStream, Vocabulary


@pytest.fixture(scope="module")
def tokenizer(bundle) -> Tokenizer:
    return bundle.tokenizer


def pieces_of(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [stream.push(token) for token in ids] + [stream.flush()]


@given(text=st.text(max_size=30))
def test_streaming_gives_back_any_text(tokenizer, text):
    pieces = pieces_of(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text


@given(ids=st.lists(st.integers(0, 319), max_size=30))
def test_streaming_equals_decoding_at_once_also_for_broken_bytes(tokenizer, ids):
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    ids = tokenizer.encode("a🦖b").ids
    assert len(ids) == 5  # the last two of its four bytes were never seen together in training
    assert pieces_of(tokenizer, ids) == ["a", "", "", "🦖", "b", ""]


def test_an_unfinished_character_shows_at_the_end(tokenizer):
    ids = tokenizer.encode("a🦖").ids[:-1]
    assert pieces_of(tokenizer, ids)[-1] == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_not_printed(tokenizer):
    ids = [1, *tokenizer.encode("fox").ids, 2]
    assert "".join(pieces_of(tokenizer, ids)) == "fox"


def test_spaces_of_sentencepiece_survive():
    words = {"▁the": 0, "▁lazy": 1, "▁dog": 2, "s": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    assert pieces_of(tokenizer, [0, 1, 2, 3]) == ["the", " lazy", " dog", "s", ""]


def test_load_finds_the_tokens_that_end_a_text(bundle):
    loaded = Vocabulary.load(bundle.path)
    assert loaded.stop_ids == {0, 2}  # <|endoftext|> by its name, <|im_end|> by both
    assert (loaded.bos, loaded.eos) == ("<|im_start|>", "<|im_end|>")
    assert loaded.encode("brown fox") == bundle.tokenizer.encode("brown fox").ids


def test_chat(bundle):
    ids = Vocabulary.load(bundle.path).encode_chat("fox?")
    text = bundle.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nfox?<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == 1 and 2 in ids  # as special tokens, not spelled out


def test_chat_needs_a_template(bundle):
    loaded = Vocabulary.load(bundle.path)
    without = Vocabulary(loaded.tokenizer, loaded.stop_ids, "", "", chat_template=None)
    with pytest.raises(InputError, match="this model has no chat template; drop --chat"):
        without.encode_chat("fox?")


def test_lone_surrogates_are_refused(bundle):
    loaded = Vocabulary.load(bundle.path)
    for encode in (loaded.encode, loaded.encode_chat):
        with pytest.raises(InputError, match="character 1: the prompt is not valid UTF-8"):
            encode("a\udcff")


@pytest.mark.parametrize(
    "template,message",
    [
        ("{{ raise_exception('no system role') }}", "the chat template fails: no system role"),
        ("{% for %}", "the chat template fails"),
        ("{{ 1 / 0 }}", "the chat template fails: division by zero"),
        ("{{ messages.append(1) }}", "the chat template fails"),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails"),
        ("{{ messages[0].content.missing.thing }}", "the chat template fails"),
        ("{% for i in range(1000000) %}x{% endfor %}", "the chat template fails"),
        ("{% for i in range(50000) %}{{ 'x' * 1000 }}{% endfor %}", "produces too much text"),
        ("x" * (1 << 18) + "y", "chat template too long"),
    ],
)
def test_templates_that_fail_or_attack(template, message):
    with pytest.raises(UnsupportedError, match=message):
        render(template, messages=[{"role": "user", "content": "hi"}])


def test_template_functions_of_transformers():
    loop = "{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(loop + "{{ strftime_now('%Y') }}").startswith("120")
    assert render("{% if add_generation_prompt %}\n  go\n{% endif %}") == "  go\n"


def test_every_id_that_ends_a_text_stops_in_llama_cpp_too(make_bundle):
    """eos, eot and eom by their keys, further ones by ours; names that are known besides."""
    llama_cpp = pytest.importorskip("llama_cpp")
    keys = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 7}
    bundle = make_bundle(metadata=keys | {"hotcold.stop_token_ids": [2, 5, 7, 11]})
    file = file_of_role(bundle.path, "dense")
    for source in (bundle.path, file):
        assert Vocabulary.load(source).stop_ids == {0, 2, 5, 7, 11}
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    ends = {i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, i)}
    assert ends == {0, 2, 5, 7}


def test_a_prompt_does_not_end_in_the_token_that_ends_a_text(bundle, tmp_path):
    folder = shutil.copytree(bundle.path, tmp_path / "added")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    assert tokenizer.encode("fox").ids[-1] == 2
    loaded = Vocabulary.load(folder)
    assert loaded.encode("fox") == [1, *bundle.tokenizer.encode("fox").ids]
    assert loaded.encode("") == [1]
    assert loaded.encode_chat("fox") == Vocabulary.load(bundle.path).encode_chat("fox")


def test_two_beginnings_are_said(bundle, capsys):
    loaded = Vocabulary.load(bundle.path)
    assert loaded.encode("<|im_start|>fox")[0] == 1 and capsys.readouterr().err == ""
    assert loaded.encode("<|im_start|><|im_start|>fox")[:2] == [1, 1]
    assert capsys.readouterr().err == (
        "the prompt starts with <|im_start|> twice; hotcold adds it, so leave it out of your prompt\n"
    )


def test_a_limit_of_training_texts_is_none_of_prompts(bundle, tmp_path):
    folder = shutil.copytree(bundle.path, tmp_path / "cut")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = "The quick brown fox jumps"
    assert Vocabulary.load(folder).encode(text) == bundle.tokenizer.encode(text).ids


def test_special_tokens_reach_the_template(make_bundle):
    keys = {"tokenizer.ggml.padding_token_id": 0, "tokenizer.chat_template.tool_use": "tools"}
    bundle = make_bundle(metadata=keys)
    loaded = Vocabulary.load(bundle.path)
    assert loaded.special_tokens["pad_token"] == "<|endoftext|>"
    template = "{{ bos_token }}{{ pad_token }}{{ unk_token is defined }}{{ tools is none }}"
    assert replace(loaded, chat_template=template).chat([]) == "<|im_start|><|endoftext|>FalseTrue"


def test_missing_and_broken_tokenizer(bundle, tmp_path):
    folder = shutil.copytree(bundle.path, tmp_path / "broken")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(FormatError, match=r"tokenizer\.json: not a tokenizer"):
        Vocabulary.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="the bundle has no tokenizer"):
        Vocabulary.load(folder)
