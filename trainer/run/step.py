"""One optimizer step: accumulate, normalise by global tokens, clip, guard, update."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from stepline.comm.fsdp import all_reduce_on_last, local, sum_of_squares, sum_over_shards
from stepline.comm.host_copy import to_device
from stepline.trainer.data.loader import Batch


@dataclass(frozen=True)
class StepMeasures:
    """What one step measured; 0-dim tensors on the device, alike on all ranks, read only when logged."""

    loss: torch.Tensor
    """Mean negative log likelihood per valid token of the global batch, in nats."""
    grad_norm: torch.Tensor
    """Global L2 norm before clipping; the largest of the replicas' where each has its own."""
    skipped: torch.Tensor
    """1.0 where the guard left parameters and optimizer untouched."""


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """Sums in place over all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def all_max(value: torch.Tensor) -> torch.Tensor:
    """The largest of all ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def accumulate(
    model: nn.Module, batch: Batch, device: torch.device, z_weight: float, parts: int = 1,
    announce: Callable[[nn.Module, bool], None] = all_reduce_on_last, midway: Callable[[], None] = lambda: None,
) -> torch.Tensor:  # fmt: skip
    """Forward and backward of a global batch; returns this rank's part of its loss (0-dim; their sum over all ranks is
    the mean over the batch's valid tokens).

    Every micro-batch's loss is a SUM divided by the number of valid tokens of the whole global batch, and
    gradients are summed over micro-batches and ranks: no token weighs more than another, wherever it stands.
    parts: into as many the sum over the global batch is left, each in a replica or a rank, whose mean is its gradient.
    announce: told before each micro-batch whether it is the last one. midway: called once, after a forward.
    batch.inputs, batch.targets: `[accumulation, micro_batch, seq]`; targets of -100 carry no loss.
    """
    targets = to_device(batch.targets, device)
    inputs, doc_ids = to_device(batch.inputs, device), to_device(batch.doc_ids, device)
    if batch.valid is None:
        valid = all_sum((targets != -100).sum()).clamp(min=1)
    else:
        valid = torch.full((), batch.valid, device=device)
    total = torch.zeros((), device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
    for i in range(len(inputs)):
        announce(model, i == len(inputs) - 1)
        scale = parts / valid.to(total.dtype)
        sums = model(inputs[i], targets[i], None if doc_ids is None else doc_ids[i], scale)
        loss = sums.nll / valid
        if z_weight:
            loss = loss + z_weight * sums.z / valid
        if i == len(inputs) // 2:
            midway()
        (loss * parts).backward()
        total += sums.nll.detach()
    return total / valid


@torch.no_grad()
def measure(
    gradients: list[torch.Tensor], mesh: DeviceMesh | None, loss: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The L2 norm of a replica's gradients and the sum of its ranks' losses, in one collective.

    Gradients are plain, or DTensors sharded over `mesh["shard"]`.
    """
    parts = [local(g) for g in gradients]
    wide = torch.promote_types(loss.dtype, parts[0].dtype)
    both = torch.stack([loss.to(wide), sum_of_squares(parts, wide).to(loss.device)])
    loss, squares = sum_over_shards(both, mesh).unbind()
    return squares.sqrt(), loss


@torch.no_grad()
def clip(gradients: list[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scales gradients of this L2 norm in place so that it is at most max_norm."""
    parts = [local(g) for g in gradients]
    torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(parts[0].device))


def train_step(state, batch: Batch, lr: float) -> StepMeasures:
    """One step of the run: afterwards the parameters are updated, or untouched where the guard said skip."""
    config, synchronizer = state.config, state.synchronizer
    model, parts = synchronizer.through(state.model), synchronizer.parts
    z_loss, hooks = config.model.z_loss, (synchronizer.announce, synchronizer.midway)
    own = accumulate(model, batch, state.device, z_loss, parts, *hooks)
    gradients = synchronizer.gradients()
    mine, own = measure(gradients, state.mesh, own)
    loss, norm = synchronizer.agree(own, mine)
    # of gradients that are alike, the norm is too: as summed in other groups of ranks its last bits need not be
    clip(gradients, mine if synchronizer.averages_replicas else norm, config.optimizer.grad_clip)
    skip = state.guard.check(loss, norm)
    result = synchronizer.step(lr, skip)
    if result.jumped:  # a skip would not bring the old loss back: every step after it would be a spike too
        state.guard.forget()
    synchronizer.zero_grad()
    state.balance.step(skip)
    state.traffic.add(result.bytes_sent, result.bytes_received)
    return StepMeasures(loss, norm, skip)
