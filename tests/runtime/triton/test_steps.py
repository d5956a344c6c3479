"""Every step against its reference, and the reference of attention against torch's own."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from hotcold.model.firing import Score
from hotcold.runtime.triton import step_reference, steps
from hotcold.runtime.triton.firing import LayerRule

DEVICE = "cuda" if "HOTCOLD_TEST_GPU" in os.environ else "cpu"


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(DEVICE)


def cache(rng: np.random.Generator, n_kv_heads: int, n_ctx: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    return tuple(normal(rng, n_kv_heads, n_ctx, head_dim).half() for _ in range(2))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 96), (5, 1), (2, 1100)])
def test_norms(rng, rows, width, biased):
    """With a mean far from zero, which a LayerNorm takes away."""
    x, added, weight = normal(rng, rows, width) + 3, normal(rng, rows, width), normal(rng, width)
    bias = normal(rng, width) if biased else None
    torch.testing.assert_close(steps.norm(x, weight, 1e-5, bias), step_reference.norm(x, weight, 1e-5, bias))
    got, expected = (where.add_norm(x, added, weight, 1e-5, bias) for where in (steps, step_reference))
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


def test_the_layer_norm_is_that_of_its_paper(rng):
    x, weight, bias = normal(rng, 4, 70).double() + 2, normal(rng, 70).double(), normal(rng, 70).double()
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    expected = (x - mean) / (variance + 1e-5).sqrt() * weight + bias
    got = step_reference.norm(x.float(), weight.float(), 1e-5, bias.float())
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [8, 20])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_rotation_fills_the_cache(rng, tokens, n_heads, n_kv_heads, head_dim):
    q, k, v = (normal(rng, tokens, n, head_dim) for n in (n_heads, n_kv_heads, n_kv_heads))
    angle = normal(rng, 12, head_dim // 2)
    positions = torch.arange(7, 7 + tokens, device=DEVICE)
    kept = cache(rng, n_kv_heads, 12, head_dim)
    found, expected = (
        (where.apply_rope(q, k, v, angle.cos(), angle.sin(), positions, *mine), *mine)
        for where, mine in ((steps, [part.clone() for part in kept]), (step_reference, kept))
    )
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-3 if got.dtype == torch.half else 1e-6)
    assert torch.equal(found[1][:, :7], expected[1][:, :7])


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(("seen", "first"), [(7, 0), (90, 80), (300, 255), (300, 256), (700, 100)])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(2, 2, 8), (3, 1, 12)])
def test_attention(rng, seen, first, window, n_heads, n_kv_heads, head_dim):
    """Nothing after a token, nor outside of its window, is looked at: NaN is there."""
    tokens = 3
    keys, values = cache(rng, n_kv_heads, 710, head_dim)
    positions, q = torch.arange(first, first + tokens, device=DEVICE), normal(rng, tokens, n_heads, head_dim)
    expected = step_reference.attend(q, keys, values, positions, seen, window)
    for part in (keys, values):
        part[:, first + tokens :] = float("nan")
        if window:
            part[:, : max(0, first + 1 - window)] = float("nan")
    got = steps.attend(q, keys, values, positions, seen, window)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_reference_of_attention_is_torchs(rng):
    keys, values = cache(rng, 2, 40, 16)
    q = normal(rng, 4, 6, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys[None, :, :4].float(), values[None, :, :4].float(),
        is_causal=True, enable_gqa=True,
    )  # fmt: skip
    got = step_reference.attend(q, keys, values, torch.arange(4, device=DEVICE), 40, 0)
    torch.testing.assert_close(got, expected[0].transpose(0, 1).flatten(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("gated", "clip"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("size", [1, 70, 2500])
def test_activation_counts_what_fires(rng, size, gated, clip):
    gate, up = normal(rng, 2, size), normal(rng, 2, size) if gated else None
    rule = LayerRule(score=Score.GATE_AND_UP if clip else Score.GATE, threshold=0.3)
    counts = [torch.tensor([5, 7], device=DEVICE) for _ in range(2)]
    found = [
        where.activate(gate, up, rule, count[1])
        for where, count in zip((steps, step_reference), counts, strict=True)
    ]
    assert torch.equal(*found) and torch.equal(*counts)
    assert counts[0].tolist() == [5, 7 + int((found[0] != 0).sum())]
    assert torch.equal(steps.activate(gate, up, rule), found[0])
    if not gated:
        assert torch.equal(found[0], torch.where(gate >= 0.3, gate, 0))


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 700), (5, 1)])
def test_leaving_out(rng, tokens, width, counted):
    x, least = normal(rng, tokens, width), normal(rng, width).abs()
    x[0, 0] = float("nan")
    positions = torch.arange(tokens, device=DEVICE) + 1
    positions[-1] = 0
    kept = [torch.ones((), dtype=torch.int64, device=DEVICE) if counted else None for _ in range(2)]
    found, expected = (
        where.leave_out(x, least, positions, count)
        for where, count in zip((steps, step_reference), kept, strict=True)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[-1], x[-1]) or tokens == 1
    if counted:
        assert kept[0] == kept[1] == 1 + found.count_nonzero()
