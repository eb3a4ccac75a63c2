"""Casts to 8 bits and their products against float64."""

import numpy as np
import pytest
import torch

from stepline.kernels.fp8 import E4M3, E5M2, Scaled, cast, has_fp8, scale_for, scaled_mm


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


@pytest.mark.parametrize(("dtype", "most"), [(E4M3, 448), (E5M2, 57344)])
def test_scales_are_the_products_that_every_device_makes(dtype, most):
    """CUDA would divide by a number through its reciprocal, which is another number in half of the cases."""
    amax = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 100
    expected = amax.numpy() * np.float32(1 / most)
    assert np.array_equal(scale_for(amax, dtype).numpy(), expected)
    assert not np.array_equal(amax.numpy() / np.float32(most), expected)


def test_what_lies_beyond_amax_is_clipped():
    x = torch.tensor([[1.0, -2.0, 4.0, 8.0]])
    assert cast(x, E4M3, torch.tensor(2.0)).float().tolist() == [[1.0, -2.0, 2.0, 2.0]]
    assert cast(torch.zeros(2, 2), E4M3).float().tolist() == [[0, 0], [0, 0]]
    for size in (1e-36, 1e-40):  # whose scale for 57344 is no normal number
        tiny = torch.tensor([0.0, size, -size / 4])
        torch.testing.assert_close(cast(tiny, E5M2).float(), tiny, rtol=0.13, atol=0)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("dim", [-1, -2])
def test_rows_and_columns_have_their_own_scales(dtype, dim):
    """Each is what a cast of it alone gives."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 6)[:, None]
    x[2] = 0
    x = x if dim == -1 else x.mT
    done = cast(x, dtype, dim=dim)
    assert done.scale.shape == ((6, 1) if dim == -1 else (1, 6))
    assert torch.equal(done.mT.float(), done.float().mT)
    for i in range(6):
        one, part = cast(x.select(-3 - dim, i), dtype), done.data.select(-3 - dim, i)
        assert done.scale.flatten()[i] == one.scale
        assert torch.equal(part.float(), one.data.float())


@pytest.mark.parametrize("types", [(E4M3, E4M3), (E5M2, E4M3)])
def test_a_product_with_scales_of_rows_is_that_of_the_dequantised_operands(types):
    """In float64, to half of bf16's last place in every value that is no small difference of large ones."""
    draw, spread = torch.Generator().manual_seed(0), torch.logspace(-4, 4, 48)
    a = cast(torch.randn(20, 32, generator=draw) * spread[:20, None], types[0], dim=-1)
    b = cast(torch.randn(32, 48, generator=draw) * spread, types[1], dim=-2)
    left, right = a.float(torch.float64), b.float(torch.float64)
    out, size = scaled_mm(a, b, torch.bfloat16), left.abs() @ right.abs()
    assert ((out.double() - left @ right).abs() <= (left @ right).abs() * 2**-8 + size * 2**-20).all()
    if torch.__version__ >= (2, 13):  # before, that of CPUs took one scale alone
        theirs = torch._scaled_mm(
            a.data, b.data.mT.contiguous().mT, a.scale, b.scale, out_dtype=torch.bfloat16
        )
        torch.testing.assert_close(out, theirs, rtol=2**-7, atol=0)


def test_a_product_with_scales_of_rows_is_torchs_own(unavailable):
    """Which on CPUs takes them from torch 2.13 on."""
    if torch.__version__ < (2, 13):
        unavailable("this torch's product on CPUs takes one scale alone")
    draw = torch.Generator().manual_seed(0)
    a = cast(torch.randn(20, 32, generator=draw), E5M2, dim=-1)
    b = cast(torch.randn(32, 48, generator=draw), E4M3, dim=-2)
    theirs = torch._scaled_mm(a.data, b.data.mT.contiguous().mT, a.scale, b.scale, out_dtype=torch.bfloat16)
    torch.testing.assert_close(scaled_mm(a, b, torch.bfloat16), theirs, rtol=2**-7, atol=0)


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


def rows(a: Scaled) -> Scaled:
    """With a scale for each row."""
    return cast(a.float(), a.data.dtype, dim=-1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a, b: (cast(a.float(), E5M2), cast(b.float(), E5M2), torch.float32), "two E5M2 operands"),
        (lambda a, b: (a, Scaled(b.data[:, :24], b.scale), torch.float32), "multiples of 16, not 16 x 24"),
        (
            lambda a, b: (Scaled(a.data[:, :8], a.scale), Scaled(b.data[:8], b.scale), torch.float32),
            "not 8 x 32",
        ),
        (lambda a, b: (a, b.mT, torch.float32), "are not"),
        (
            lambda a, b: (Scaled(a.float(), a.scale), b, torch.float32),
            "not torch.float32 and torch.float8_e4m3fn",
        ),
        (lambda a, b: (a, b, torch.float64), "give bf16, fp16 or fp32, not torch.float64"),
        (lambda a, b: (Scaled(a.data, a.scale.double()), b, torch.float32), "one fp32 number"),
        (lambda a, b: (Scaled(a.data, a.scale.expand(16)), b, torch.float32), "one fp32 number"),
        (lambda a, b: (rows(a), b, torch.bfloat16), r"\[16, 1\] and \[1, 32\], not \(16, 1\) and \(\)"),
        (lambda a, b: (rows(a).mT, rows(b.mT).mT, torch.bfloat16), r"not \(1, 16\) and \(1, 32\)"),
        (lambda a, b: (rows(a), rows(b.mT).mT, torch.float32), "give bf16, not torch.float32"),
        (lambda a, b: (rows(a), rows(b.mT).mT, torch.float16), "give bf16, not torch.float16"),
        (
            lambda a, b: (rows(a), cast(b.float(), E5M2, dim=-2), torch.bfloat16),
            "second operand is E4M3, not torch.float8_e5m2",
        ),
    ],
)
def test_what_cuda_would_refuse_is_refused_everywhere(change, sentence):
    draw = torch.Generator().manual_seed(0)
    a, b = cast(torch.randn(16, 16, generator=draw), E4M3), cast(torch.randn(16, 32, generator=draw), E4M3)
    a, b, dtype = change(a, b)
    with pytest.raises(ValueError, match=sentence):
        scaled_mm(a, b, dtype)


def test_what_the_device_can_is_a_constant_of_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    torch._dynamo.reset()

    def run(x):
        return x + 1 if has_fp8(torch.device("cuda", 0)) and not has_fp8(x.device) else x

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1]
