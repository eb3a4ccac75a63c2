"""The dense feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from stepline.models.config import ModelConfig


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (arXiv 2002.05202, equation 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.w2 = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` and result `[batch, seq, hidden]`."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
