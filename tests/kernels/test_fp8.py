"""Casts to 8 bits and their products against float64."""

import pytest
import torch

from stepline.kernels.fp8 import E4M3, E5M2, Scaled, cast, scaled_mm


@pytest.mark.parametrize(("dtype", "relative"), [(E4M3, 2**-4), (E5M2, 2**-3)])
def test_a_cast_rounds_to_the_nearest(dtype, relative):
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    done = cast(x, dtype)
    assert done.float().abs().max().item() == pytest.approx(x.abs().max().item(), rel=1e-6)
    large = x.abs() > x.abs().max() / 100
    assert ((done.float() - x).abs() / x.abs())[large].max() <= relative
    assert torch.equal(
        cast(done.float(), dtype, x.abs().max()).data.float(), done.data.float()
    )  # nothing moves again


def test_what_lies_beyond_amax_is_clipped():
    x = torch.tensor([[1.0, -2.0, 4.0, 8.0]])
    assert cast(x, E4M3, torch.tensor(2.0)).float().tolist() == [[1.0, -2.0, 2.0, 2.0]]
    assert cast(torch.zeros(2, 2), E4M3).float().tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("types", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)])
def test_a_product_is_that_of_the_dequantised_operands(types):
    draw = torch.Generator().manual_seed(0)
    a, b = (
        cast(torch.randn(20, 32, generator=draw), types[0]),
        cast(torch.randn(32, 48, generator=draw), types[1]),
    )
    expected = a.float(torch.float64) @ b.float(torch.float64)
    out = scaled_mm(a, b, torch.float32)
    assert ((out - expected).norm() / expected.norm()).item() < 1e-6
    assert torch.equal(scaled_mm(a, b, torch.bfloat16), out.bfloat16())
    theirs = torch._scaled_mm(a.data, b.data.mT.contiguous().mT, a.scale, b.scale, out_dtype=torch.float32)
    torch.testing.assert_close(out, theirs, rtol=1e-5, atol=1e-5)


def test_what_cuda_would_refuse_is_refused_everywhere():
    half = cast(torch.randn(16, 16), E5M2)
    with pytest.raises(ValueError, match="two E5M2 operands"):
        scaled_mm(half, half, torch.float32)
    narrow = Scaled(torch.zeros(16, 24).to(E4M3), torch.ones(()))
    with pytest.raises(ValueError, match="multiples of 16, not 16 x 24"):
        scaled_mm(half, narrow, torch.float32)
