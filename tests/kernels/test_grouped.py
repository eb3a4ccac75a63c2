"""Grouped products against one product for each row, and the ways of rows to experts and back against indexing."""

import pytest
import torch

from stepline.kernels.grouped import combine, dispatch, grouped_mm_linear, loop_linear

COUNTS = torch.tensor([5, 0, 7, 0, 1])


def naive(x, weight, counts):
    groups = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return torch.stack([weight[g] @ row for g, row in zip(groups, x, strict=True)])


@pytest.mark.parametrize("product", [loop_linear, grouped_mm_linear])
def test_products_and_gradients(product):
    torch.manual_seed(0)
    x = torch.randn(13, 8, requires_grad=True)
    weight = torch.randn(5, 16, 8, requires_grad=True)
    grad = torch.randn(13, 16)
    expected = torch.autograd.grad(
        naive(x.double(), weight.double(), COUNTS), (x, weight), grad.double(), retain_graph=True
    )
    out = product(x, weight, COUNTS)
    torch.testing.assert_close(out, naive(x, weight, COUNTS), rtol=1e-5, atol=1e-5)
    for mine, reference in zip(torch.autograd.grad(out, (x, weight), grad), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
    assert (expected[1][1] == 0).all()


def test_what_cuda_would_refuse_is_refused_everywhere():
    with pytest.raises(ValueError, match="multiples of 8, not 12"):
        grouped_mm_linear(torch.zeros(3, 12).bfloat16(), torch.zeros(1, 8, 12).bfloat16(), torch.tensor([3]))


@pytest.mark.parametrize("dropped", [0, 4])
def test_dispatch_and_combine(dropped):
    tokens, top_k = 6, 3
    slots = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(2))[dropped:]
    x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(dispatch(x, slots, top_k), x[slots // top_k])

    y = torch.randn(len(slots), 5, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(tokens, 5, dtype=torch.float64).index_add(0, slots // top_k, y)
    torch.testing.assert_close(combine(y, slots, tokens, top_k), expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: dispatch(x, slots, top_k), x)
    assert torch.autograd.gradcheck(lambda y: combine(y, slots, tokens, top_k), y)
