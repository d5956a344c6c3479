"""Activations, training data, the teacher's text, evaluation: the pieces around the training loops."""

import math

import pytest
import torch
from torch.nn import functional

from hotcold.checkpoint import activation_name, ffn_layers
from hotcold.errors import InputError, UnsupportedError
from hotcold.sparsify.activations import recorded_intermediates, set_activation
from hotcold.sparsify.attention import use_grouped_attention
from hotcold.sparsify.data import Windows, read_windows
from hotcold.sparsify.evaluate import Quality, measure, table
from hotcold.sparsify.generate import write_text
from hotcold.sparsify.memory import keep_big_buffers
from hotcold.text import documents, split


def test_relu_takes_the_place_of_silu(dense):
    set_activation(dense, "relu")
    layer, x = ffn_layers(dense)[1], torch.randn(3, 32)
    expected = layer.down(functional.relu(layer.gate(x)) * layer.up(x))
    torch.testing.assert_close(layer.mlp(x), expected)
    assert activation_name(dense) == "relu"


def test_unknown_activation_leaves_the_model_alone(dense):
    with pytest.raises(UnsupportedError, match=r"unknown activation \(got swish, expected relu\)"):
        set_activation(dense, "swish")
    assert activation_name(dense) == "silu"


def test_intermediates_are_recorded_only_inside_the_block(dense):
    ids = torch.arange(12)[None]
    with recorded_intermediates(dense) as seen:
        dense(ids)
    layer = ffn_layers(dense)[0]
    assert [tuple(x.shape) for x in seen] == [(1, 12, 64)] * 2
    assert not layer.down._forward_pre_hooks


def test_windows_cover_everything_once_per_pass_and_depend_on_the_seed():
    ids = torch.arange(20).reshape(10, 2)
    batches = [Windows(ids, seed=3).batch(4) for _ in range(2)]
    assert torch.equal(*batches)
    windows = Windows(ids, seed=3)
    first, second = (torch.cat([windows.batch(5), windows.batch(5)]) for _ in range(2))
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == ids[:, 0].tolist()
    assert not torch.equal(first, second)
    assert not torch.equal(first, Windows(ids, seed=4).batch(10))


def test_windows_of_text_hold_its_tokens(text_file, tokenizer):
    ids = read_windows(split(documents(str(text_file)), "train"), tokenizer, 64, 1000, "story")
    assert ids.shape[1] == 64
    assert len(ids) >= 1000 // 64
    first = next(split(documents(str(text_file)), "train"))
    assert ids[0].tolist() == tokenizer.encode(first.text).ids[:64]


def test_too_little_text(tokenizer):
    with pytest.raises(InputError, match=r"story: too little text \(got 0 tokens, expected at least 64\)"):
        read_windows([], tokenizer, 64, 1000, "story")


def test_the_teacher_writes_the_same_text_for_the_same_seed(dense, tokenizer):
    texts = [write_text(dense, tokenizer, 16, 70, seed) for seed in (1, 1, 2)]
    assert texts[0].shape == (5, 16)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    for first in texts[0][:, 0].tolist():
        assert tokenizer.decode([first]).istitle()


def test_sampling_with_a_cache_follows_the_model(dense, tokenizer):
    dense.lm_head.weight.data.mul_(50)  # all but deterministic: sampling is then argmax
    text = write_text(dense, tokenizer, 12, 12, seed=0)
    with torch.no_grad():
        best = dense(text).logits.argmax(-1)
    assert torch.equal(text[0, 1:], best[0, :-1])


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
    assert "dense 20.00  sparse 25.00  (1.250x, 500 held-out tokens)" in printed
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
