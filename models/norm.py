"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn

from stepline.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, equation 4)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`x` and result `[..., dim]`; the statistics of half-precision inputs are in fp32."""
        return rms_norm(x, self.weight, self.eps)
