"""Canon layers: each token's representation takes up those of the tokens just before it (arXiv 2512.17351)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepline.models.cache import LayerCache
from stepline.models.config import CANON_TAPS, ModelConfig


class Canon(nn.Module):
    """y_t = x_t + sum over j in 0..3 of w_j * x_(t-j), with * channel by channel (arXiv 2512.17351).

    A causal depthwise convolution with a residual, no bias and no activation. The weights are one vector, tap after
    tap, `[4 * dim]`: optimizers treat it as a norm's, without decay. They begin with zeros, so that the layer does
    nothing at first.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CANON_TAPS * dim))

    def forward(self, x: Tensor, positions: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """`x` and result `[batch, seq, dim]`.

        positions: `[batch, seq]`, of each token in its document, beyond whose beginning nothing is read.
        before: `[batch, 3, dim]`, the inputs ahead of `x`; default: zeros.
        """
        taps, seq = self.weight.view(CANON_TAPS, -1), x.shape[1]
        wide = F.pad(x, (0, 0, CANON_TAPS - 1, 0)) if before is None else torch.cat((before, x), 1)
        y = x
        for j, tap in enumerate(taps.unbind()):
            shifted = wide[:, CANON_TAPS - 1 - j :][:, :seq]
            if positions is None or j == 0:
                y = torch.addcmul(y, shifted, tap)
            else:
                y = y + torch.where((positions >= j).unsqueeze(-1), shifted * tap, 0)
        return y


def is_canon(name: str) -> bool:
    """Whether a parameter of this name is a Canon layer's."""
    return name.endswith("_canon.weight")


def make_canon(config: ModelConfig, place: str, dim: int) -> Canon | None:
    """The layer at `place`, A or C, of a block whose norms have width `dim`, if `config` asks for one."""
    return Canon(dim) if place in config.canon else None


def mix(canon: Canon | None, x: Tensor, positions: Tensor | None, cache: LayerCache | None) -> Tensor:
    """`x` through the layer, if there is one, behind the tokens that `cache` holds; arguments as in `Canon`."""
    if canon is None:
        return x
    return canon(x, positions, None if cache is None else cache.before(canon, x))
