"""Updates that wait to be sent: an optimizer moves them in the place of the parameters."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stepline.comm.fsdp import local
from stepline.comm.synchronizer import Optimizer

MakeOptimizer = Callable[[dict[str, nn.Parameter]], Optimizer]


class Waiting:
    """`delta <- beta delta + update of this replica's optimizer`, for each of `parameters` (sharded as they are).

    What is sent is taken out of delta and added to the parameters, so that every update arrives, sooner or later, in
    its own size (error feedback). The optimizer moves delta and does not ask where it stands; weight decay is of the
    parameters and is applied there.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], make_optimizer: MakeOptimizer, beta: float
    ) -> None:
        self.parameters, self.beta = dict(parameters), beta
        self.delta = {n: nn.Parameter(torch.zeros_like(p.data)) for n, p in self.parameters.items()}
        self.optimizer = make_optimizer(self.delta) if self.delta else None

    @torch.no_grad()
    def accumulate(self, lr: float) -> None:
        """Adds the update that the parameters' gradients ask for."""
        for name, delta in self.delta.items():
            local(delta.data).mul_(self.beta)
            gradient = self.parameters[name].grad
            delta.grad = torch.zeros_like(delta.data) if gradient is None else gradient
        if self.optimizer is not None:
            self.optimizer.step(lr, 0.0)
        for delta in self.delta.values():
            delta.grad = None

    def local(self) -> dict[str, Tensor]:
        """This rank's part of each delta, live."""
        return {n: local(delta.data) for n, delta in self.delta.items()}

    def describe(self, kind: str, decayed: set[str]) -> dict[str, str]:
        """The optimizer's words, how its updates travel, and whether weight decay applies."""
        words = {} if self.optimizer is None else self.optimizer.describe()
        return {
            n: f"{w.split(',')[0]}, {'' if n in decayed else 'not '}decayed, {kind}" for n, w in words.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors of this replica: `{name}.delta` and the optimizer's."""
        state = {} if self.optimizer is None else dict(self.optimizer.state())
        return state | {f"{n}.delta": delta.data for n, delta in self.delta.items()}
