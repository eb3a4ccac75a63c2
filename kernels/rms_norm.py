"""RMSNorm (arXiv 1910.07467, equation 4): torch's on CUDA and under compile, few passes on CPUs without."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; `x` and result `[..., dim]`.

    The statistics of half-precision inputs are in fp32.
    """
    exact = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    if x.device.type == "cpu" and exact and not torch.compiler.is_compiling():
        return _CpuRMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _CpuRMSNorm(torch.autograd.Function):
    """With n = x * rstd: dx = rstd * (g w - n mean(g w n)), dw = sum of g n."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        rstd.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        # LayerNorm's fused backward, told that the mean is 0, gives the same but for -rstd * mean(g w)
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(rstd), rstd, weight, None, [True, True, False]
        )
        mean = (grad @ weight).unsqueeze_(-1).mul_(rstd).div_(x.shape[-1])
        return dx.add_(mean), dw, None
