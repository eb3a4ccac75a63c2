"""Rotary position embedding in the rotate-half order (arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of each head by its position's angles.

    Args:
        x: `[batch, seq, heads, head_dim]`.
        cos: `[seq, 1, head_dim]` or `[batch, seq, 1, head_dim]`, the cosines twice over; no gradient.
        sin: likewise; the first half is negative, so that the result is `x * cos + roll(x) * sin`.
    """
    if x.device.type == "cpu" and x.dtype == cos.dtype and not torch.compiler.is_compiling():
        return _CpuRotate.apply(x, cos, sin)
    return (x * cos + _swap(x) * sin).type_as(x)


def _swap(x: Tensor) -> Tensor:
    return x.roll(x.shape[-1] // 2, -1)


class _CpuRotate(torch.autograd.Function):
    """Three passes forward and three backward: the gradient is turned by the opposite angles."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(_swap(x), sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return (grad * cos).addcmul_(_swap(grad), sin, value=-1), None, None
