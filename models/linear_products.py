"""The three products of a linear layer, Y = X W^T and its gradients dX = dY W and dW = dY^T X: 2:4 sparse, in FP8 with
one scale for each tensor, and in FP8 with scales of rows."""

import torch
from torch import Tensor, nn

from stepline.kernels import ops
from stepline.kernels.fp8 import E4M3, E5M2, ROW_RESULT, Scaled, as_type, cast, scale_for, scaled_mm
from stepline.kernels.sparse24 import GROUP, sparse_weight
from stepline.kernels.sparse_mm import Algorithm, sparse_mm


class Products(torch.autograd.Function):
    """Y = X W~^T and its gradients. `x` `[tokens, in]`, `weight` `[out, in]`; without beta weights are dense, without
    seed dW is made of the whole gradient.

    W~ is made again in backward: between the two only W is held, which FSDP2 frees.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, beta: Tensor | None, seed: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, beta, seed)
        return x @ (weight if beta is None else sparse_weight(weight, beta)).mT

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, beta, seed = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grad @ (weight if beta is None else sparse_weight(weight, beta))
        dw = None
        if ctx.needs_input_grad[1]:
            gt = grad.mT if seed is None else _estimate(grad, seed)
            dw = (gt @ x).to(weight.dtype)
        return dx, dw, None, None


def _estimate(grad: Tensor, seed: Tensor) -> Tensor:
    """MVUE of `[tokens, out]`, transposed and 2:4 along tokens, whose number is filled up to a multiple of four."""
    padded = nn.functional.pad(grad, (0, 0, 0, -len(grad) % GROUP))
    return ops.estimate(padded, seed)[:, : len(grad)].to(grad.dtype)


class Fp8Products(torch.autograd.Function):
    """As `Products`, of 8-bit operands: `data` `[out, in]` E4M3 times `scale` is W~; `weight` gets the gradient."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        data: Tensor,
        scale: Tensor,
        seed: Tensor | None,
        way: Algorithm | None,
    ) -> Tensor:
        ctx.dtypes = x.dtype, weight.dtype
        xq = cast(x, E4M3)
        ctx.save_for_backward(xq.data, xq.scale, data, scale, seed)
        if way is None:
            # fast sums in the forward product alone, as torchao's
            return scaled_mm(xq, Scaled(data, scale).mT, x.dtype, fast=True)
        alpha = xq.scale * scale
        return sparse_mm(xq.data, data, alpha, x.dtype, way.alg_id, way.split_k, way.split_k_mode)

    @staticmethod
    def backward(ctx, grad: Tensor):
        xd, xs, data, scale, seed = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        amax = grad.abs().amax()
        g = cast(grad, E5M2, amax)
        dx = scaled_mm(g, Scaled(data, scale), x_dtype) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            gt = g.mT
            if seed is not None:
                double = scale_for(2 * amax, E5M2)  # which no value of the estimator exceeds
                gt = Scaled(ops.estimate_cast(grad, seed, double, E5M2), double)
            dw = scaled_mm(gt, Scaled(xd, xs), w_dtype)
        return dx, dw, None, None, None, None


class RowFp8Products(torch.autograd.Function):
    """FP8 products with a scale for each token and for each row of the weight, s_x `[tokens, 1]` and s_w `[out, 1]`:

        Y  = diag(s_x) (X8 W8^T) diag(s_w)
        dX = dY W   = (dY diag(s_w)) W8       dY diag(s_w) cast by token
        dW = dY^T X = (diag(s_x) dY)^T X8     diag(s_x) dY cast by output

    A scale can be taken out of a product where it is not summed over. The one that is, s_w in dX and s_x in dW, goes
    into the gradient before that is cast, so that X and W have one 8-bit copy each.

    `x` `[tokens, in]`; `data` `[out, in]` E4M3 times `scale` `[out, 1]` is W, dense; `weight` gets the gradient. The
    products give bf16 on every device, as CUDA's do (kernels/fp8.py): results of a run in fp32 are rounded to it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, data: Tensor, scale: Tensor) -> Tensor:
        ctx.dtypes = x.dtype, weight.dtype
        xq = cast(x, E4M3, dim=-1)
        ctx.save_for_backward(xq.data, xq.scale, data, scale)
        return as_type(scaled_mm(xq, Scaled(data, scale).mT, ROW_RESULT), x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        xd, xs, data, scale = ctx.saved_tensors
        (x_dtype, w_dtype), one = ctx.dtypes, scale.new_ones(1, data.shape[1])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            g = cast(grad * scale.mT, E5M2, dim=-1)
            dx = scaled_mm(g, Scaled(data, one), ROW_RESULT).to(x_dtype)
        if ctx.needs_input_grad[1]:
            g = cast(grad * xs, E5M2, dim=-2)
            dw = scaled_mm(g.mT, Scaled(xd, one), ROW_RESULT).to(w_dtype)
        return dx, dw, None, None
