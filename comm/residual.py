"""Updates that wait to be sent, for parameters whose values travel untransformed and are applied as they are."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stepline.comm.fsdp import local


class Residual:
    """`delta <- beta delta + lr g / (sqrt(v) + eps)`, v the bias-corrected mean of g^2 of this replica.

    What travels is a part of a finished update: without the division a step would have the size of the gradient, and
    with a sign every value that is sent would move by lr, however long it waited.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], beta: float, beta2: float, eps: float) -> None:
        self.parameters, self.beta, self.beta2, self.eps = dict(parameters), beta, beta2, eps
        self.delta = {n: torch.zeros_like(p.data) for n, p in self.parameters.items()}
        self.exp_avg_sq = {n: torch.zeros_like(p.data) for n, p in self.parameters.items()}
        self.updates = torch.zeros(())
        """Steps that were not skipped."""

    def accumulate(self, gradient: Callable[[str], Tensor], lr: float) -> None:
        """Adds this step's update."""
        self.updates += 1
        correction = 1 - self.beta2 ** float(self.updates)
        for name in self.parameters:
            g, v = gradient(name), local(self.exp_avg_sq[name])
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            local(self.delta[name]).mul_(self.beta).addcdiv_(
                g, (v / correction).sqrt_().add_(self.eps), value=lr
            )

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors of this replica."""
        delta = {f"{n}.delta": t for n, t in self.delta.items()}
        return delta | {f"{n}.exp_avg_sq": t for n, t in self.exp_avg_sq.items()}
