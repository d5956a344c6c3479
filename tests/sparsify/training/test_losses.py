"""Each term of the loss against its definition, in values and in gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hotcold.errors import InputError
from hotcold.sparsify.training.losses import (
    cross_entropy_from_hidden,
    kl_from_hidden,
    l1_divisor,
    l1_sum,
    squared_error,
)


@pytest.mark.parametrize(("reduction", "count"), [("mean", 2 * 3 * 8), ("token_sum", 2 * 3), ("sum", 1)])
def test_l1_gradient_is_the_sign_over_the_count(reduction, count):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0, :4] = 0  # neurons that did not fire get no push
    x.requires_grad_(True)
    loss = l1_sum(x) / l1_divisor(reduction, tokens=6, d_ff=8)
    loss.backward()
    assert loss.item() == pytest.approx(x.abs().sum().item() / count, rel=1e-5)
    torch.testing.assert_close(x.grad, x.detach().sign() / count)


def test_padding_counts_in_no_term():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert l1_sum(x, mask).item() == pytest.approx(x[mask].abs().sum().item(), rel=1e-5)
    expected = (x - y)[mask].square().mean(-1).sum()
    assert squared_error(x, y, mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_unknown_reduction():
    with pytest.raises(InputError, match=r"got median, expected mean \| token_sum \| sum"):
        l1_divisor("median", 1, 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 600), st.integers(0, 2**31 - 1))
def test_chunked_kl_equals_autograd(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(tokens, 8, generator=generator) for _ in range(2))
    head, teacher_head = (torch.randn(40, 8, generator=generator) for _ in range(2))
    plain, chunked = ([x.clone().requires_grad_(True) for x in (student, head)] for _ in range(2))
    log_q = functional.log_softmax(plain[0] @ plain[1].T, -1)
    log_p = functional.log_softmax(teacher @ teacher_head.T, -1)
    expected = functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    got = kl_from_hidden(chunked[0], teacher, chunked[1], teacher_head)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    (3 * expected).backward()
    (3 * got).backward()
    for a, b in zip(chunked, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_kl_of_a_model_with_itself_is_zero():
    hidden, head = torch.randn(300, 8), torch.randn(40, 8)
    assert kl_from_hidden(hidden, hidden, head, head).item() == pytest.approx(0, abs=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 600), st.integers(0, 2**31 - 1))
def test_chunked_cross_entropy_equals_autograd(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(tokens, 8, generator=generator), torch.randn(40, 8, generator=generator)
    targets = torch.randint(40, (tokens,), generator=generator)
    plain, chunked = ([x.clone().requires_grad_(True) for x in (hidden, head)] for _ in range(2))
    expected = functional.cross_entropy(plain[0] @ plain[1].T, targets, reduction="sum")
    got = cross_entropy_from_hidden(*chunked, targets)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    expected.backward()
    got.backward()
    for a, b in zip(chunked, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
