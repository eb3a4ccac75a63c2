"""Grouped products against one product for each row, and the ways of rows to experts and back against indexing."""

from types import SimpleNamespace

import pytest
import torch

from stepline.kernels import grouped
from stepline.kernels.grouped import combine, dispatch, grouped_mm_linear, loop_linear
from stepline.models.config import ModelConfig
from stepline.models.moe import MoE, Routing

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


@pytest.mark.parametrize("rows", [0, 13])
def test_no_rows_are_no_grouped_product(rows):
    """Of a rank that no token was sent to; its experts have a gradient of zeros all the same."""
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(rows, 8))
    assert grouped._as_one_product(on_gpu) == (rows > 0)
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(5, 16, 8, requires_grad=True)
    out = loop_linear(x, weight, torch.zeros(5, dtype=torch.int64))
    found = torch.autograd.grad(out, (x, weight), torch.zeros(0, 16))
    assert (out.shape, found[0].shape) == ((0, 16), (0, 8))
    assert torch.equal(found[1], torch.zeros_like(weight))


def in_bf16(product, leaves, grad):
    x, weight = (t.detach().requires_grad_() for t in leaves)
    out = product(x, weight, COUNTS)
    assert out.dtype == torch.bfloat16
    return [out.detach(), *torch.autograd.grad(out, (x, weight), grad)]


def test_products_and_gradients_in_bf16():
    """Each way against float64 of the same inputs: a sum in fp32, rounded once."""
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(s).bfloat16() for s in ((13, 32), (5, 16, 32), (13, 16)))
    exact = [t.double().requires_grad_() for t in (x, weight)]
    out = naive(*exact, COUNTS)
    expected = [out.detach(), *torch.autograd.grad(out, exact, grad.double())]
    found = [in_bf16(product, (x, weight), grad) for product in (loop_linear, grouped_mm_linear)]
    for mine, other, reference in zip(*found, expected, strict=True):
        step = 2.0**-8 * reference.abs() + 1e-5  # half of bf16's, and the errors of fp32
        assert ((mine.double() - reference).abs() <= step).all()
        assert ((other.double() - reference).abs() <= step).all()
    assert (found[0][2][1] == 0).all()
    assert (found[1][2][1] == 0).all()


@pytest.mark.parametrize(
    "options", [{}, {"score": "sigmoid", "balance": "switch", "shared_size": 8}, {"capacity": 0.8}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_by_either_product(dtype, options, monkeypatch):
    """Result, gradients and counts of a whole layer by one product for each expert and by one for all."""
    config = ModelConfig(
        vocab_size=2, hidden_size=16, num_layers=1, num_heads=2, ffn_size=24, ffn="moe",
        moe={"experts": 5, "top_k": 2, **options},
    )  # fmt: skip
    torch.manual_seed(1)
    layer = MoE(config)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
        p.data = p.data.to(dtype)
    x = torch.randn(2, 7, 16).to(dtype).requires_grad_()
    grad = torch.randn(2, 7, 16).to(dtype)
    routing = Routing(torch.ones(2, 7, dtype=torch.bool), torch.tensor(0.1))
    layer.counting, found = True, []
    for product in (loop_linear, grouped_mm_linear):
        monkeypatch.setattr("stepline.models.moe.grouped_linear", product)
        layer.load.zero_()
        out = layer(x, routing)
        gradients = torch.autograd.grad(out, (x, *layer.parameters()), grad)
        found.append([out.detach(), *gradients, layer.load.clone()])
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-6  # of a sum's terms, each rounded
    for mine, other in zip(*found, strict=True):
        largest = mine.abs().max()
        assert largest > 0
        assert (mine - other).abs().max() <= tolerance * largest
    assert torch.equal(found[0][-1], found[1][-1])


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
