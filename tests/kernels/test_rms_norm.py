"""RMSNorm against the formula in float64, by torch's kernel and by the one for CPUs."""

import torch
import torch.nn.functional as F

from stepline.kernels.rms_norm import rms_norm

EPS = 1e-3


def inputs(dtype=torch.float64, dim=24):
    x = torch.randn(3, 5, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.7
    x[0] *= 1e-3  # epsilon decides here
    return x.to(dtype), torch.linspace(-1, 2, dim, dtype=dtype)


def formula(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def test_equals_formula_with_gradients():
    x, weight = inputs()
    torch.testing.assert_close(rms_norm(x, weight, EPS), formula(x, weight))
    x.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))


def test_fp32_gradients_with_a_transposed_gradient():
    x, weight = inputs()
    g = torch.randn(24, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).transpose(0, 2)
    results = []
    for dtype, f in ((torch.float64, formula), (torch.float32, lambda x, w: rms_norm(x, w, EPS))):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        y = f(*leaves)
        y.backward(g.to(dtype))
        results.append((y, *(t.grad for t in leaves)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_bf16_has_fp32_statistics():
    x, _ = inputs(torch.bfloat16, 4096)
    got = rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), EPS)
    error = (got.double() / formula(x.double(), 1) - 1).abs()
    assert got.dtype == torch.bfloat16
    assert error.max() < 2**-8  # one rounding to 8 bits


def test_frozen_weight():
    x, weight = inputs()
    x.requires_grad_()
    rms_norm(x, weight, EPS).sum().backward()
    expected = torch.autograd.grad(F.rms_norm(x, weight.shape, weight, EPS).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
