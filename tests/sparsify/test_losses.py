"""Each term of the loss against its definition, in values and in gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hotcold.errors import InputError
from hotcold.sparsify.losses import kl_from_hidden, l1_norm, relative_error


@pytest.mark.parametrize(("reduction", "count"), [("mean", 2 * 3 * 8), ("token_sum", 2 * 3), ("sum", 1)])
def test_l1_gradient_is_the_sign_over_the_count(reduction, count):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0, :4] = 0  # neurons that did not fire get no push
    x.requires_grad_(True)
    loss = l1_norm(x, reduction)
    loss.backward()
    assert loss.item() == pytest.approx(x.abs().sum().item() / count, rel=1e-5)
    torch.testing.assert_close(x.grad, x.detach().sign() / count)


def test_unknown_reduction():
    with pytest.raises(InputError, match=r"got median, expected mean \| token_sum \| sum"):
        l1_norm(torch.ones(2, 2), "median")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 600), st.integers(0, 2**31 - 1))
def test_chunked_kl_equals_autograd(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(tokens, 8, generator=generator) for _ in range(2))
    heads = [torch.randn(40, 8, generator=generator) for _ in range(2)]
    plain, chunked = (student.clone().requires_grad_(True) for _ in range(2))
    log_q, log_p = (functional.log_softmax(h @ w.T, -1) for h, w in zip((plain, teacher), heads, strict=True))
    expected = functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    got = kl_from_hidden(chunked, teacher, *heads)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    (3 * expected).backward()
    (3 * got).backward()
    torch.testing.assert_close(chunked.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_kl_of_a_model_with_itself_is_zero():
    hidden, head = torch.randn(300, 8), torch.randn(40, 8)
    assert kl_from_hidden(hidden, hidden, head, head).item() == pytest.approx(0, abs=1e-5)


def test_relative_error_does_not_see_what_all_tokens_share():
    target = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    target = target - target.mean((0, 1))
    output = target + 0.1
    error = relative_error(output, target)
    assert relative_error(output + 1000, target + 1000).item() == pytest.approx(error.item(), rel=1e-2)
    assert relative_error(torch.zeros_like(target), target).item() == pytest.approx(1, rel=1e-5)
