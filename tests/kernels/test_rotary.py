"""Rotation of heads against complex numbers."""

import pytest
import torch

from stepline.kernels.rotary import rotate

ANGLES = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def tables(dtype):
    cos, sin = ANGLES.cos().to(dtype).unsqueeze(1), ANGLES.sin().to(dtype).unsqueeze(1)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


@pytest.mark.parametrize(
    ("dtype", "table_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 2e-2),
    ],
)
def test_equals_complex_product_with_gradient(dtype, table_dtype, tolerance):
    g = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 2, 7, 3, 10, dtype=torch.float64, generator=g).to(dtype).unbind()
    turn = torch.polar(torch.ones_like(ANGLES), ANGLES).unsqueeze(1)

    def turned(t, by):
        z = torch.complex(t[..., :5].double(), t[..., 5:].double()) * by
        return torch.cat((z.real, z.imag), -1)

    x.requires_grad_()
    y = rotate(x, *tables(table_dtype))
    y.backward(grad)
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(y.double(), turned(x.detach(), turn), rtol=0, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), turned(grad, turn.conj()), rtol=0, atol=tolerance)
