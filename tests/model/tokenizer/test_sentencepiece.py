"""Byte-fallback tokenizers: llama.cpp must split text as `tokenizers` does, whichever way marks spaces."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from hotcold.convert.gguf.write import write_gguf
from hotcold.errors import FormatError
from hotcold.files.gguf import GGUFFile
from hotcold.model.tokenizer.files import tokenizer_metadata
from hotcold.model.tokenizer.gguf import build_tokenizer

SPACE = "▁"
SPECIAL = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


def _words(corpus: list[str]) -> Tokenizer:
    """A BPE over words, as SentencePiece learns it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(corpus * 4, trainer)
    return tokenizer


def _all_merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put two pieces together to a third, in order of the third, as Hugging Face has it."""
    pieces = sorted((p for p in vocabulary if p not in SPECIAL), key=vocabulary.__getitem__)
    splits = ((p[:i], p[i:]) for p in pieces for i in range(1, len(p)))
    return [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]


@pytest.fixture
def make_tokenizer(corpus, tmp_path):
    """make_tokenizer(new) -> a folder with a tokenizer like Llama 2's, in the old or the new spelling."""

    def make(*, new: bool = False, prefix: bool = True) -> Path:
        vocabulary = _words(corpus).get_vocab()
        bpe = models.BPE(
            vocabulary, _all_merges(vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
        tokenizer = Tokenizer(bpe)
        replace = normalizers.Replace(" ", SPACE)
        if new:
            scheme = "always" if prefix else "never"
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
        else:
            prepend = [normalizers.Prepend(SPACE)] if prefix else []
            tokenizer.normalizer = normalizers.Sequence([*prepend, replace])
        tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"})
        )
        return tmp_path

    return make


def test_scores_and_types(make_tokenizer):
    folder = make_tokenizer()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    metadata = tokenizer_metadata(folder, tokenizer.get_vocab_size() + 2, {})
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert "tokenizer.ggml.merges" not in metadata
    types = metadata["tokenizer.ggml.token_type"].tolist()
    assert types[:4] == [2, 3, 3, 6]
    assert types.count(6) == 256
    assert types[-2:] == [5, 5]
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    assert scores["he"] > scores["the"] > scores["▁the"]
    assert [metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == (
        True,
        False,
    )


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_llama_cpp_splits_text_in_the_same_way(make_tokenizer, corpus, tmp_path, new, prefix):
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = make_tokenizer(new=new, prefix=prefix)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    metadata = tokenizer_metadata(folder, tokenizer.get_vocab_size(), {})
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    shape = {"context_length": 8, "embedding_length": 8, "block_count": 1, "feed_forward_length": 8}
    shape |= {"attention.head_count": 1}
    metadata |= {f"llama.{key}": np.uint32(value) for key, value in shape.items()}
    metadata |= {"general.architecture": "llama", "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5)}
    write_gguf(tmp_path / "vocabulary.gguf", metadata, [])
    engine = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
    texts = [*corpus, "the they", "  two  spaces ", "x\ny", "日本 unseen ß"]
    if new and prefix:  # Metaspace puts no space before one that is there, llama.cpp always does
        texts = [text for text in texts if not text.startswith(" ")]
    for text in texts:
        assert engine.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text).ids
    engine.close()


def through_a_file(metadata: dict[str, object], folder: Path) -> Tokenizer:
    write_gguf(folder / "vocabulary.gguf", metadata, [])
    return build_tokenizer(GGUFFile(folder / "vocabulary.gguf"))


@pytest.mark.parametrize("prefix", [False, True])
def test_out_of_a_gguf_file_it_splits_text_as_before(make_tokenizer, corpus, prefix):
    """Also what an old file, such as PowerInfer's converter writes, leaves to be implied."""
    folder = make_tokenizer(prefix=prefix)
    before = Tokenizer.from_file(str(folder / "tokenizer.json"))
    metadata = tokenizer_metadata(folder, before.get_vocab_size() + 3, {})
    if prefix:
        del metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_space_prefix"]
    after = through_a_file(metadata, folder)
    assert after.get_vocab() == before.get_vocab()
    for text in [*corpus, "the they", "  two  spaces ", "x\ny", "日本 unseen ß", "<s>the</s>"]:
        ids = before.encode(text).ids
        assert after.encode(text).ids == ids
        assert after.decode(ids).strip() == text.replace("<s>", "").replace("</s>", "").strip()
    after.save(str(folder / "tokenizer.json"))
    again = tokenizer_metadata(folder, before.get_vocab_size() + 3, {})
    for key in ("tokens", "token_type", "add_bos_token", "add_space_prefix"):
        assert np.array_equal(again[f"tokenizer.ggml.{key}"], metadata.get(f"tokenizer.ggml.{key}", True)), (
            key
        )


@pytest.mark.parametrize("name, value", [("scores", np.zeros(3)), ("token_type", "text"), ("scores", None)])
def test_scores_and_types_must_fit_the_tokens(make_tokenizer, name, value):
    folder = make_tokenizer()
    metadata = tokenizer_metadata(folder, 600, {}) | {f"tokenizer.ggml.{name}": value}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(FormatError) as caught:
        through_a_file(metadata, folder)
    assert caught.value.field == f"tokenizer.ggml.{name}"
