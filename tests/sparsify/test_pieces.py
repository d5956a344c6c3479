"""Activations, training data, the teacher's text, evaluation: the pieces around the training loops."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from hotcold.errors import InputError
from hotcold.model.checkpoint import ffn_layers
from hotcold.model.hooks import recorded_intermediates
from hotcold.sparsify.activations import set_activation
from hotcold.sparsify.config import Generated
from hotcold.sparsify.measure.evaluate import Quality, measure, table
from hotcold.sparsify.training.attention import use_grouped_attention
from hotcold.sparsify.training.generate import Sampler
from hotcold.sparsify.training.memory import keep_big_buffers
from hotcold.sparsify.training.teacher_text import teacher_text


def test_intermediates_are_recorded_only_inside_the_block(dense):
    ids = torch.arange(12)[None]
    with recorded_intermediates(dense) as seen:
        dense(ids)
    layer = ffn_layers(dense)[0]
    assert [tuple(x.shape) for x in seen] == [(1, 12, 64)] * 2
    assert not layer.down._forward_pre_hooks


SETTINGS = Generated(top_k=64)


def test_the_teacher_writes_the_same_text_for_the_same_seed(dense, tokenizer):
    texts = [Sampler(dense, tokenizer, 16, SETTINGS).write(5, seed) for seed in (1, 1, 2)]
    assert texts[0].shape == (5, 16)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    for first in texts[0][:, 0].tolist():
        assert tokenizer.decode([first]).istitle()


def test_text_can_begin_with_a_special_token(dense, tokenizer):
    text = Sampler(dense, tokenizer, 16, replace(SETTINGS, begin="<|end|>")).write(5, 0)
    assert set(text[:, 0].tolist()) == {tokenizer.token_to_id("<|end|>")}
    for second in text[:, 1].tolist():
        assert tokenizer.decode([second]).istitle()
    with pytest.raises(InputError, match=r"generated.begin: the vocabulary has no such token \(got <s>\)"):
        Sampler(dense, tokenizer, 16, replace(SETTINGS, begin="<s>"))


def test_sampling_with_a_cache_follows_the_model(dense, tokenizer):
    dense.lm_head.weight.data.mul_(50)  # all but deterministic: sampling is then argmax
    text = Sampler(dense, tokenizer, 12, SETTINGS).write(1, seed=0)
    with torch.no_grad():
        best = dense(text).logits.argmax(-1)
    assert torch.equal(text[0, 1:], best[0, :-1])


def test_a_cache_is_used_again(dense, tokenizer):
    sampler = Sampler(dense, tokenizer, 16, SETTINGS)
    texts = [sampler.write(rows, seed) for rows, seed in ((3, 0), (3, 1), (2, 0), (3, 0))]
    assert torch.equal(texts[0], texts[3])
    assert torch.equal(texts[1], Sampler(dense, tokenizer, 16, SETTINGS).write(3, 1))


@pytest.mark.slow
def test_a_compiled_step_writes_the_same_text(dense, tokenizer):
    plain, compiled = (Sampler(dense, tokenizer, 16, SETTINGS, compile=c) for c in (False, True))
    for rows, seed in ((4, 0), (4, 1)):
        assert torch.equal(compiled.write(rows, seed), plain.write(rows, seed))


def test_the_teachers_text_is_written_once_part_by_part(dense, tokenizer, tmp_path, monkeypatch):
    wanted = replace(SETTINGS, tokens=16 * 10, batch=4)
    text = teacher_text(dense, tokenizer, 16, wanted, tmp_path, seed=0)
    assert text.shape == (10, 16)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 3
    parts[1].unlink()  # as if killed there
    assert torch.equal(teacher_text(dense, tokenizer, 16, wanted, tmp_path, seed=0), text)
    monkeypatch.setattr(Sampler, "write", None)
    assert torch.equal(teacher_text(dense, tokenizer, 16, wanted, tmp_path, seed=0), text)


def test_measured_perplexity_and_sparsity(dense):
    set_activation(dense, "relu")
    ids = torch.randint(0, 400, (6, 32), generator=torch.Generator().manual_seed(0))
    quality = measure(dense, ids)
    with torch.no_grad(), recorded_intermediates(dense) as seen:
        logits = dense(ids).logits
        zeros = [(x == 0).float().mean().item() for x in seen]
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert quality.perplexity == pytest.approx(math.exp(loss), rel=0.02)  # bfloat16 against float32
    assert quality.sparsity == pytest.approx(zeros, abs=0.01)
    assert 0.3 < quality.mean_sparsity < 0.7
    assert quality.tokens == 6 * 31


def test_the_table_says_what_was_measured():
    printed = table(Quality(20.0, [0.0, 0.0], 500), Quality(25.0, [0.5, 0.7], 500))
    assert "dense 20.00  sparse 25.00  (1.250x, 500 test tokens)" in printed
    assert "60.0%" in printed
    assert printed.splitlines()[-1].split() == ["1", "70.0%"]


def test_grouped_attention_is_attention(dense, tmp_path):
    ids = torch.randint(0, 400, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = dense(ids).logits
    use_grouped_attention(dense)
    torch.testing.assert_close(dense(ids).logits, expected, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path)
    assert "grouped" not in (tmp_path / "config.json").read_text()


def test_glibc_takes_the_settings():
    import platform

    assert keep_big_buffers() == (platform.libc_ver()[0] == "glibc")
