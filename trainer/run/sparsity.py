"""2:4 sparse layers in a run: their scales after initialisation, the phases of the run, and what is shown of them."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepline.comm.fsdp import local
from stepline.kernels.sparse24 import scale_of, scale_sums, soft_threshold
from stepline.models.sparse_linear import mode_of, sparse_weights
from stepline.trainer.config import Config
from stepline.trainer.run.step import all_sum


@torch.no_grad()
def set_betas(model: nn.Module) -> None:
    """beta of every sparse weight from its values now: one all-reduce over all ranks.

    Every value is there as often as there are replicas, which their quotient does not show.
    """
    found = list(sparse_weights(model))
    if not found:
        return
    sums = torch.stack([_sums(local(weight)) for _, weight, _ in found])
    all_sum(sums)
    for (_, _, beta), value in zip(found, scale_of(sums), strict=True):
        beta.copy_(value)


def _sums(weight: Tensor) -> Tensor:
    """`scale_sums` of all of this rank's matrices, zeros where it holds none."""
    if not weight.numel():
        return weight.new_zeros(2, dtype=torch.float64)
    return scale_sums(weight).reshape(-1, 2).sum(0)


class Sparsity:
    """Of the 2:4 sparse layers of `model`; where there are none, nothing happens."""

    def __init__(self, config: Config, model: nn.Module) -> None:
        self.mode, self.weights = mode_of(model), list(sparse_weights(model))
        self.mode.draws.seed = config.run.seed
        self.mode.draws.rank = dist.get_rank() if dist.is_initialized() else 0
        self.dense_from = math.inf
        if config.sparse.dense_fraction:
            self.dense_from = round((1 - config.sparse.dense_fraction) * config.total_steps())
        self._before: list[Tensor] = []

    @torch.no_grad()
    def begin(self, step: int, watched: bool) -> None:
        """Before the step with index `step`; watched: `row` will be asked for after it."""
        self.mode.draws.begin(step)
        self.mode.sparse = step < self.dense_from
        self._before = [self._mask(weight) for _, weight, _ in self.weights] if watched else []

    @staticmethod
    def _mask(weight: Tensor) -> Tensor:
        part = local(weight.data)
        return soft_threshold(part) != 0 if part.numel() else part.bool()

    @torch.no_grad()
    def row(self) -> dict[str, float]:
        """`flip_rate`: share of all mask entries that the step changed; the range of beta. A collective."""
        if not self._before:
            return {}
        flips = torch.zeros(2, dtype=torch.float64, device=self._before[0].device)
        for (_, weight, _), before in zip(self.weights, self._before, strict=True):
            flips += torch.stack([(self._mask(weight) != before).sum(), torch.tensor(before.numel())]).to(
                flips
            )
        changed, total = all_sum(flips).tolist()
        betas = torch.stack([beta.double() for _, _, beta in self.weights])
        return {"flip_rate": changed / total, "beta_min": betas.min().item(), "beta_max": betas.max().item()}
